"""benchmarks/fusion_costs.py: counts by hand, counts of a real run, and the figures in the docs."""

from pathlib import Path

import pytest
import torch
from ceilings import Ceilings
from fusion_costs import Fusion, break_even, mlp_rows, mlp_values, norm_silu_values, report
from random_model import RandomModelRun

from nova.config import named_config
from nova.layers import Mlp
from nova.vae import VAEConfig

DOCS = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"


def test_mlp_rows_by_hand():
    # 24 image tokens in sets of 7 and 17, 6 frame tokens, 16 + 2 tokens in front.
    first_half = 2 * (6 + (6 + 7))  # two blocks: the condition, and what is revealed
    second_half = 2 * (6 + 24)  # one block before the last, for both sets
    last_block = 7 + 17
    video = 2 * (18 + 6 + 6)  # two blocks: what is in front, and two frames
    config = named_config("tiny-video")
    rows = 2 * (2 * (first_half + second_half + last_block) + video)
    assert mlp_rows(config, num_frames=2, num_steps=2, passes=2) == rows == 608
    assert mlp_values(config, num_frames=2, num_steps=2, passes=2) == 608 * 4 * 64


def test_mlp_rows_are_those_of_the_sampler(monkeypatch):
    forward, rows = Mlp.forward, []

    def counting(self, x):
        rows.append(x.shape[:-1].numel())
        return forward(self, x)

    monkeypatch.setattr(Mlp, "forward", counting)
    monkeypatch.setenv("NOVA_KERNELS_BACKEND", "reference")  # which calls it on a CPU, too
    RandomModelRun(
        "tiny-video",
        batch=1,
        num_frames=3,
        num_steps=5,
        num_diffusion_steps=1,
        device=torch.device("cpu"),
        dtype=torch.float32,
    ).sample()
    assert sum(rows) == mlp_rows(named_config("tiny-video"), 3, 5, passes=2)


def test_norm_silu_values_by_hand():
    # Two latents of 1 x 2, channels 64, 32, 32, 32; in the middle and at every level two residual
    # blocks of two norms each. The first norm of a level sees the channels of the one before.
    middle, level0 = 4 * 64 * (2 * 1 * 2), 4 * 64 * (2 * 1 * 2)
    level1 = (64 + 3 * 32) * (3 * 2 * 4)
    level2 = 4 * 32 * (5 * 4 * 8)
    level3, last = 4 * 32 * (5 * 8 * 16), 32 * (5 * 8 * 16)
    config = VAEConfig.tiny()
    two = norm_silu_values(config, (2, 1, 2))
    assert two == middle + level0 + level1 + level2 + level3 + last
    # Tiles of five latents overlap by one.
    assert norm_silu_values(config, (6, 1, 2)) == norm_silu_values(config, (5, 1, 2)) + two


def test_seconds_and_break_even_by_hand():
    ceilings = Ceilings(rate=1000.0, bandwidth=4000.0)
    fusion = Fusion("five passes to three", values=1000, passes_now=5, passes_fused=3)
    assert (fusion.bytes_now, fusion.bytes_fused) == (10_000, 6_000)
    assert fusion.seconds_saved(ceilings) == 1.0
    # The library's product takes 3 s, and 1 s is saved: ours may take 4 s.
    assert break_even(3000, 4000, ceilings) == pytest.approx(0.75)


def test_the_docs_have_what_is_printed():
    docs = " ".join(DOCS.read_text().split())
    for line in report():
        assert line in docs
