"""benchmarks/denoise.py: counts by hand, and the figures in docs/denoise.md."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import denoise as benchmark
import pytest
import torch
from denoise_costs import Card, step_cost

from nova_kernels.cpp_kernels import extension as cpp_extension
from nova_kernels.cuda_kernels.denoise_plan import DenoiseShape, DeviceLimits

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "denoise.md"


def test_costs_by_hand():
    # Two clusters of one block; memory and L2 move a byte a second, and nothing else takes time.
    card = Card("", DeviceLimits({1: 2}, 10**6), 1.0, float("inf"), 1.0, 0.0, 0.0, 0.0)
    cost = step_cost(DenoiseShape(tokens=3, passes=2, width=32, depth=1, token_dim=4), card)
    row = 32 * 6  # values of all rows
    read = 2 * 2 * row * 2  # both blocks read the inputs of both layers
    written = row * 2 + row * 4 + row * (4 + 2)  # hidden; branch, read once; normed
    assert cost.barriers == 3 and cost.weight_bytes == 0
    assert cost.modulation_bytes == row * 5 * 2
    assert cost.activation_bytes == read + written
    assert cost.operations == 2 * 6 * (2 * 32 * 32 + 2 * 32 * 4)
    assert cost.seconds == cost.modulation_bytes + cost.activation_bytes


def test_layers_that_do_not_fit_are_read_in_every_step():
    card = Card("", DeviceLimits({1: 2}, 60_000), 1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    cost = step_cost(DenoiseShape(tokens=1, passes=1, width=96, depth=4, token_dim=4), card)
    assert cost.plan.weight_slots == 2 and cost.weight_bytes == 8 * 96 * 96 * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="it measures where there is a GPU")
def test_the_docs_have_what_the_command_predicts(tmp_path, monkeypatch, capsys):
    file = tmp_path / "denoise.json"
    monkeypatch.setattr(sys, "argv", ["denoise.py", "--json", str(file)])
    assert benchmark.main() == 0
    assert "nothing was timed" in capsys.readouterr().out
    docs = DOCS.read_text()
    for row in json.loads(file.read_text())["rows"]:
        cells = [str(row["tokens"]), str(row["rows"]), row["card"]]
        cells += [f"{row[f'{what}_MB']:.3g} MB" for what in ("weight", "activation", "modulation")]
        cells += [str(row["barriers"])]
        cells += [f"{row['floor_us']:.3g} us", f"{row['predicted_us']:.3g} us"]
        assert f"| {' | '.join(cells)} |" in docs


def test_the_docs_have_what_was_measured_on_a_cpu():
    file = ROOT / "benchmarks" / "results" / "denoise_cpu.json"
    times = {}
    for row in json.loads(file.read_text())["rows"]:
        times.setdefault((row["tokens"], row["rows"]), []).append(row["microseconds_a_step"])
    docs = DOCS.read_text()
    for (tokens, rows), (eager, cpp) in times.items():
        line = f"| {tokens} | {rows} | {eager:.0f} us | {cpp:.0f} us | {eager / cpp:.1f} |"
        assert line in docs


def test_the_docs_have_what_was_measured_on_a_gpu():
    file = ROOT / "benchmarks" / "results" / "denoise_h200.json"
    columns = ["eager", "eager, graph", "Triton, graph", "one launch"]
    columns.append("one launch, clusters of 4, graph")
    times = {}
    for row in json.loads(file.read_text())["rows"]:
        if "refused" in row:
            continue
        of_size = times.setdefault((row["tokens"], row["rows"]), {})
        of_size[row["implementation"]] = f"{row['microseconds_a_step']:.3g}"
    docs = DOCS.read_text()
    for (tokens, rows), of_size in times.items():
        cells = [str(tokens), str(rows), *(of_size[column] for column in columns)]
        assert f"| {' | '.join(cells)} |" in docs


def test_it_measures_on_a_cpu_after_a_gate(tmp_path, monkeypatch, capsys):
    file = tmp_path / "denoise.json"
    options = ["--cpu", "--width", "32", "--depth", "1", "--tokens", "2", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["denoise.py", *options, "--json", str(file)])
    assert benchmark.main() == 0
    rows = json.loads(file.read_text())["rows"]
    assert rows[0]["implementation"] == "eager"
    assert all(row["microseconds_a_step"] > 0 and row["error"] < 1e-5 for row in rows)

    monkeypatch.setattr(
        benchmark, "by_many_launches", lambda loop, shape: {"wrong": lambda: lambda: loop.x + 1}
    )
    assert benchmark.main() == 1
    assert "wrong: error" in json.loads(file.read_text())["rows"][0]["refused"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--tokens", "2,"], "'2,' is no list of whole numbers of at least 1, such as 2,11"),
        (["--tokens", "0"], "'0' is no list of whole numbers"),
        (["--depth", "x"], "'x' is no whole number of at least 1"),
        (["--token-dim", "6"], "--token-dim must be a multiple of 4"),
    ],
)
def test_bad_options(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["denoise.py", *words])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--width", "40"], ["--depth", "99"], ["--tokens", "999"]])
@pytest.mark.skipif(torch.cuda.is_available(), reason="it measures where there is a GPU")
def test_nothing_is_predicted_of_sizes_that_one_launch_does_not_take(
    tmp_path, monkeypatch, capsys, words
):
    file = tmp_path / "denoise.json"
    monkeypatch.setattr(sys, "argv", ["denoise.py", *words, "--json", str(file)])
    assert benchmark.main() == 1
    rows = json.loads(file.read_text())["rows"]
    assert rows and all("it takes" in row["refused"] for row in rows)


@pytest.mark.parametrize("is_lost", [False, True])
def test_one_launch_comes_last_and_its_failure_loses_nothing(
    tmp_path, monkeypatch, capsys, is_lost
):
    file = tmp_path / "denoise.json"
    kept = []

    def fail():
        kept.append(len(json.loads(file.read_text())["rows"]))
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    def failing(loop, shape):
        return {"not recorded": fail, "not there": lambda: None, "kernel": lambda: fail}

    monkeypatch.setattr(benchmark, "by_one_launch", failing)
    monkeypatch.setattr(benchmark, "is_lost", lambda device: is_lost and len(kept) == 2)
    options = ["--cpu", "--width", "32", "--depth", "1", "--tokens", "2,3", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["denoise.py", *options, "--json", str(file)])
    assert benchmark.main() == 1
    rows = json.loads(file.read_text())["rows"]
    refused = [row for row in rows if "refused" in row]
    timed = len(rows) - len(refused)
    assert timed == 2 * (1 + (cpp_extension.obstacle() is None))
    assert {row["tokens"] for row in rows if "refused" not in row} == {2, 3}
    assert kept == [timed + n for n in range(2 if is_lost else 4)]
    assert len(refused) == len(kept)
    assert refused[0]["refused"] == (
        "failed: RuntimeError: CUDA error: an illegal memory access was encountered"
    )
    assert ("the GPU refuses all work after kernel" in capsys.readouterr().err) == is_lost


def test_an_extension_that_does_not_run_is_told(monkeypatch):
    """Its figures would be missing as if there were no such kernel."""

    def refuse(*arguments):
        raise RuntimeError("denoise: CUDA says cudaErrorInsufficientDriver")

    monkeypatch.setattr(benchmark.persistent, "obstacle", refuse)
    loop = SimpleNamespace(
        x=SimpleNamespace(is_cuda=True), steps=[], condition=None, weights=None, run=None
    )
    assert list(benchmark.by_one_launch(loop, None)) == ["one launch"]
