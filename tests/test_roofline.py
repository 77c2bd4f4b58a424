"""benchmarks/roofline.py: figures by hand, and those in the docs."""

import json
import sys
from pathlib import Path

import pytest
import roofline
import torch
from ceilings import CARDS, Ceilings
from roofline import cells, machine_row, video_work
from work_counts import VAE, Work

from nova.config import named_config
from nova.errors import InputError

DOCS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
NUMBERS = {
    "num_frames": 9,
    "num_steps": 64,
    "num_diffusion_steps": 25,
    "guidance_scale": 5.0,
    "dtype": torch.bfloat16,
}


def test_row_by_hand():
    # The first stage is limited by arithmetic, the second by memory.
    work = {"a": Work(100, 10), "b": Work(10, 30), VAE: Work(90, 0)}
    row = machine_row("a machine", Ceilings(10.0, 5.0), "predicted", work, batch=2, num_frames=3)
    assert row["floor_s"] == 11.0 and row["roofline_s"] == 10.0 + 6.0
    # Two clips of nine frames.
    assert row["fps_at_floor"] == 18 / 11 and row["fps_at_roofline"] == 18 / 16
    assert row["fps_at_floor_with_vae"] == 18 / 20
    del work[VAE]
    row = machine_row("a machine", Ceilings(10.0, 5.0), "predicted", work, batch=2, num_frames=1)
    assert row["fps_at_floor_with_vae"] is None and row["fps_at_floor"] == 2 / 11


def test_the_docs_have_what_is_predicted():
    docs = DOCS.read_text()
    config = named_config("nova-d48w1024-osp480")
    for batch in (1, 24):
        work = video_work(config, batch=batch, **NUMBERS)
        if batch == 1:
            for stage, w in work.items():
                line = f"| {stage} | {w.operations / 1e12:.4g} | {w.bytes / 1e9:.3g} |"
                assert line in docs, line
        for card in CARDS:
            row = machine_row(card.name, card.ceilings, "predicted", work, batch, 9)
            line = f"| {' | '.join([card.name, *cells(row)])} |"
            assert line in docs, line
            assert card.source.split(" of ")[-1].split(",")[0] in docs


def test_without_guidance_half_the_rows():
    config, numbers = named_config("tiny-video"), {**NUMBERS, "num_frames": 2, "num_steps": 4}
    guided = video_work(config, batch=1, **numbers)
    plain = video_work(config, batch=1, **{**numbers, "guidance_scale": 1.0})
    assert plain["image encoder"].operations * 2 == guided["image encoder"].operations


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_frames": 0}, "at least 1"),
        ({"batch": 0}, "at least 1"),
        ({"num_frames": 2}, "an image model makes one latent frame"),
        ({"num_steps": 0}, "num_inference_steps"),
    ],
    ids=str,
)
def test_bad_numbers(change, message):
    with pytest.raises(InputError, match=message):
        video_work(named_config("tiny-image"), **{"batch": 1, **NUMBERS, "num_frames": 1, **change})


def test_command(tmp_path, monkeypatch, capsys):
    file = tmp_path / "roofline.json"
    command = "roofline.py --geometry tiny-image --batch 1 2 --steps 4 --device cpu --json"
    monkeypatch.setattr("ceilings.MATRIX_SIDE", {"cpu": 64})
    monkeypatch.setattr(sys, "argv", [*command.split(), str(file)])
    assert roofline.main() == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["kind"] for row in rows] == ["predicted"] * 4 + ["ceilings measured, float32"] * 2
    printed = capsys.readouterr().out
    assert "predicted" in printed and "2.75" not in printed
    monkeypatch.setattr(sys, "argv", ["roofline.py", "--geometry", "x"])
    with pytest.raises(SystemExit):
        roofline.main()
    assert "no size named 'x'" in capsys.readouterr().err
