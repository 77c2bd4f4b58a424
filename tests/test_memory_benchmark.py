"""benchmarks/memory.py: what its options are for, what it says before it measures, its rows."""

import json
from pathlib import Path

import memory
import pytest
import torch
from make_tiny_checkpoint import VAE_CONFIG
from random_model import RandomModelRun

from nova.vae import CausalVideoVAE, VAEConfig


def test_results_of_others_are_not_written_over(tmp_path):
    path = tmp_path / "fps.json"
    path.write_text(json.dumps({"machine": {}, "rows": []}))
    with pytest.raises(SystemExit, match="holds no list of rows"):
        memory.main(["sampling", "--geometry", "tiny-video", "--json", str(path)])
    assert json.loads(path.read_text()) == {"machine": {}, "rows": []}
    (tmp_path / "file").write_text("[]")
    with pytest.raises(SystemExit, match="cannot be used"):
        memory.main(["sampling", "--json", str(tmp_path / "file" / "memory.json")])


@pytest.mark.parametrize(
    "part, option, value, message",
    [
        ("sampling", "--batch", "0", "'0' is no whole number of at least 1"),
        ("sampling", "--sets", "0", "'0' is no whole number of at least 1"),
        ("vae", "--frames", "-3", "'-3' is no whole number of at least 1"),
        ("vae", "--memory-budget", "nan", "'nan' is no finite number above 0"),
    ],
)
def test_bad_numbers(capsys, part, option, value, message):
    with pytest.raises(SystemExit):
        memory.main([part, option, value])
    assert f"argument {option}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["vae", "--frames", "16"], r"--frames must be 1 \+ 4 n, got 16"),
        (["vae", "--height", "100"], "--height and --width must be multiples of 8, got 100"),
        (["vae", "--tile-latents", "1"], "tile_latents must be a whole number of at least 2"),
        (["vae", "--tile-pixels", "20"], "do not fit the VAE: use multiples of 8"),
        (["sampling", "--geometry", "tiny-class"], "tiny-class takes no text"),
        (["sampling", "--device", "tpu"], "'tpu' is no device"),
    ],
)
def test_what_cannot_be_measured(monkeypatch, words, message):
    monkeypatch.setattr(VAEConfig, "osp", lambda: VAE_CONFIG)
    with pytest.raises(SystemExit, match=message):
        memory.main([*words, "--worker"])


@pytest.mark.parametrize(
    "words, call, shape, attributes",
    [
        ([], "decode", (1, 4, 3, 4, 6), {"tile_latents": 5}),
        (["--encode"], "encode", (1, 3, 9, 32, 48), {}),
        (["--tile-latents", "2"], "decode", (1, 4, 3, 4, 6), {"tile_latents": 2}),
        (["--memory-budget", "0.5"], "decode", (1, 4, 3, 4, 6), {"memory_budget": 500_000_000}),
        (["--dtype", "bfloat16"], "decode", (1, 4, 3, 4, 6), {"dtype": torch.bfloat16}),
    ],
)
def test_options_of_the_vae(monkeypatch, capsys, words, call, shape, attributes):
    seen = []
    for name in ("decode", "encode"):

        def record(vae, x, name=name):
            seen.append((name, tuple(x.shape), vae))

        monkeypatch.setattr(CausalVideoVAE, name, record)
    monkeypatch.setattr(VAEConfig, "osp", lambda: VAE_CONFIG)
    size = ["--frames", "9", "--height", "32", "--width", "48"]
    memory.main(["vae", *size, *words, "--worker"])
    ((name, of, vae),) = seen
    assert (name, of) == (call, shape)
    assert {name: getattr(vae, name) for name in attributes} == attributes
    row = json.loads(capsys.readouterr().out)
    assert (row["what"], row["geometry"]) == (f"vae {call}", "9 x 32 x 48")


@pytest.mark.parametrize(
    "words, option, value, named",
    [
        (["--batch", "3"], "batch", 3, "batch 3"),
        (["--latents", "2"], "num_frames", 2, "T=2"),
        (["--steps", "4"], "num_steps", 4, "A=4"),
        (["--diffusion-steps", "7"], "num_diffusion_steps", 7, "D=7"),
        (["--sets", "2"], "num_sets", 2, "2 of "),
        (["--dtype", "bfloat16"], "dtype", torch.bfloat16, ""),
    ],
)
def test_options_of_sampling(monkeypatch, capsys, words, option, value, named):
    made = []

    class Recorded(RandomModelRun):
        def __init__(self, name, **options):
            made.append((name, options))
            super().__init__(name, **options)

        def sample(self):
            pass

    monkeypatch.setattr("random_model.RandomModelRun", Recorded)
    for options in ([], words):
        memory.main(["sampling", "--geometry", "tiny-video", *options, "--worker"])
    (first, usual), (second, asked) = made
    assert first == second == "tiny-video"
    assert asked == {**usual, option: value} and usual[option] != value
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["what"] == "sampling" and named in row["geometry"]


def test_rows_are_added(tmp_path):
    path = tmp_path / "memory.json"
    options = ["--geometry", "tiny-video", "--steps", "2", "--diffusion-steps", "2", "--sets", "1"]
    for _ in range(2):
        memory.main(["sampling", *options, "--json", str(path)])
    assert [row["what"] for row in json.loads(path.read_text())] == ["sampling"] * 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_earlier_rows(tmp_path, monkeypatch):
    path = tmp_path / "memory.json"
    path.write_text("[1]")

    def half(file, text, **options):
        with file.open("w") as opened:
            opened.write(text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    options = ["--geometry", "tiny-video", "--steps", "2", "--diffusion-steps", "2", "--sets", "1"]
    with pytest.raises(OSError, match="No space left"):
        memory.main(["sampling", *options, "--json", str(path)])
    assert path.read_text() == "[1]" and list(tmp_path.iterdir()) == [path]
