"""The profile of sampling, on a CPU."""

import json

import kernel_times
import pytest


def run(monkeypatch, *options):
    monkeypatch.setattr("sys.argv", ["kernel_times.py", "--device", "cpu", *map(str, options)])
    return kernel_times.main()


def test_operators_of_a_run(tmp_path, monkeypatch, capsys):
    files = tmp_path / "new" / "times.json", tmp_path / "trace.json"
    options = ("--geometry", "tiny-video", "--json", files[0], "--trace", files[1])
    assert run(monkeypatch, *options) == 0
    result = json.loads(files[0].read_text())
    rows, facts = result["rows"], result["machine"]
    # No time counts twice.
    assert 0 < sum(row["ms"] for row in rows) < facts["run_ms"]
    assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)
    calls = {row["name"]: row["calls"] for row in rows}
    assert calls["aten::scaled_dot_product_attention"] > 0 and facts["dtype"] == "float32"
    assert json.loads(files[1].read_text())["traceEvents"]
    shown = capsys.readouterr().out
    assert rows[0]["name"] in shown and "together" in shown and "tiny-video, batch 1" in shown


@pytest.mark.parametrize(
    "options, what, dtype",
    [
        ((), "tiny-video, batch 1, 14 sets, exact", "float32"),
        (("--run-latents", 2), "tiny-video, batch 1, 28 sets, exact", "float32"),
        (("--batch", 2, "--sampler", "plain"), "tiny-video, batch 2, 14 sets, plain", "float32"),
        (("--dtype", "bfloat16"), "tiny-video, batch 1, 14 sets, exact", "bfloat16"),
    ],
)
def test_options(tmp_path, monkeypatch, capsys, options, what, dtype):
    file = tmp_path / "times.json"
    monkeypatch.setattr(kernel_times, "kernel_times", lambda *_: ([], 1.0))
    assert run(monkeypatch, "--geometry", "tiny-video", "--json", file, *options) == 0
    facts = json.loads(file.read_text())["machine"]
    assert (facts["run"], facts["dtype"]) == (what, dtype)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--batch", 0), "batches must be at least 1"),
        (("--sampler", "graphs"), "needs a GPU"),
        (("--backend", "cuda"), "cannot run"),  # an op in Triton may be the first to say so
        (("--geometry", "tiny-class"), "takes class labels"),
        (("--json", "/"), "cannot be written"),
    ],
)
def test_bad_options(options, message, monkeypatch, capsys):
    geometry = () if "--geometry" in options else ("--geometry", "tiny-video")
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *geometry, *options)
    assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


@pytest.mark.gpu
def test_kernels_of_a_run_from_graphs(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "sys.argv", ["", "--geometry", "tiny-video", "--json", f"{tmp_path}/a.json"]
    )
    assert kernel_times.main() == 0
    result = json.loads((tmp_path / "a.json").read_text())
    busy = sum(row["ms"] for row in result["rows"])
    assert 0 < busy < result["machine"]["run_ms"]
