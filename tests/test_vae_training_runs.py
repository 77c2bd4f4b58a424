"""Whole runs that train VAEs: quality, scaling factors, exact resuming, crops."""

import numpy as np
import pytest
import torch
from make_tiny_checkpoint import VAE_CONFIG
from training_data import GradientSource
from training_runs import (
    GRADIENTS_OFF,
    Stop,
    assert_same_files,
    compiled,
    losses_of,
    run_vae,
    stop_after,
)

from nova.codec import LatentCodec, to_pixels
from nova.errors import InputError
from nova.media import read_image
from nova.training import VAETrainingOptions, new_vae, train_vae
from nova.training.vae_loop import ClipSamples, detailed_crop

pytestmark = pytest.mark.usefixtures("no_plots")


def test_vae_learns_and_sets_its_scale(tmp_path):
    source = GradientSource(4, broken=(2,))
    results = []
    checkpoint = run_vae(
        tmp_path, source, steps=20, save_every=100, sample_every=20, learning_rate=2e-3,
        ema_decay=0.5, on_step=lambda _, result: results.append(result),
    )  # fmt: skip
    assert results[-1]["loss"] < 0.6 * results[0]["loss"]
    assert results[-1]["psnr"] > results[0]["psnr"] + 2
    codec = LatentCodec.load(checkpoint / "vae")
    pixels = to_pixels([source[i].frames for i in (0, 1, 3)])
    assert codec.encode(pixels, sample=False).std().item() == pytest.approx(1.0, rel=0.05)
    # The averaged weights reconstruct about as well as the last ones.
    error = (codec.decode(codec.encode(pixels, sample=False)) - pixels).clamp(-2, 2)
    assert 10 * np.log10(4 / error.square().mean().item()) > results[0]["psnr"] + 2
    assert read_image(tmp_path / "samples" / "step-00000020.png").ndim == 3


@GRADIENTS_OFF
def test_vaes_where_gradients_are_turned_off(tmp_path, off):
    source = GradientSource(4, num_frames=1)
    vaes = new_vae(VAE_CONFIG), new_vae(VAE_CONFIG)
    on = run_vae(tmp_path / "on", source, steps=2, change=lambda _: vaes[0])
    with off():
        found = run_vae(tmp_path / "off", source, steps=2, change=lambda _: vaes[1])
    assert_same_files(on, found, "vae/diffusion_pytorch_model")


def test_a_stopped_vae_run_goes_on_exactly(tmp_path):
    source = GradientSource(4, num_frames=1)
    whole = run_vae(tmp_path / "whole", source)
    with pytest.raises(Stop):
        run_vae(tmp_path / "cut", source, on_step=stop_after(3))
    resumed = run_vae(tmp_path / "cut", source, resume=True)
    assert_same_files(whole, resumed, "vae/diffusion_pytorch_model")
    assert [row[1] for row in losses_of(tmp_path / "whole")] == [
        row[1] for row in losses_of(tmp_path / "cut")
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_vaes_when_nothing_can_be_read(tmp_path, workers):
    source = GradientSource(200, broken=range(200))
    with pytest.raises(InputError, match=r"^100 clips in a row cannot be read.*is damaged$"):
        run_vae(tmp_path, source, workers=workers)


def test_a_compiled_vae_trains_as_another(tmp_path, fresh_compiler):
    source = GradientSource(4, num_frames=1)
    whole = run_vae(tmp_path / "whole", source)
    for steps in (2, 4):
        cut = run_vae(
            tmp_path / "cut", source, steps=steps, resume=steps == 4,
            change=lambda vae: compiled(vae, "decoder"),
        )  # fmt: skip
    assert_same_files(whole, cut, "vae/diffusion_pytorch_model")


def test_a_frozen_encoder_keeps_its_latents(tmp_path):
    source = GradientSource(4)
    first = run_vae(tmp_path / "first", source, steps=2)
    start = LatentCodec.load(first / "vae")
    options = VAETrainingOptions(
        out=tmp_path / "second", steps=3, batch_size=2, sample_every=0, ema_decay=0.0,
        freeze_encoder=True, device="cpu", progress=False,
    )  # fmt: skip
    again = train_vae(LatentCodec.load(first / "vae").module, source, options)
    codec = LatentCodec.load(again / "vae")
    pixels = to_pixels([source[0].frames])
    latents = start.encode(pixels, sample=False)
    assert torch.equal(codec.encode(pixels, sample=False), latents)
    assert not torch.equal(codec.decode(latents), start.decode(latents))


def test_vae_on_crops(tmp_path):
    source = GradientSource(4)
    height, width = source.format.height, source.format.width
    sample = ClipSamples(source, VAE_CONFIG, seed=0, crop=16)[0, 0]
    assert sample["pixels"].shape == (3, source.format.num_frames, 16, 16)
    assert sample["noise"].shape[2:] == (2, 2)
    again = ClipSamples(source, VAE_CONFIG, seed=0, crop=16)[0, 0]
    assert torch.equal(sample["pixels"], again["pixels"])
    whole = ClipSamples(source, VAE_CONFIG, seed=0)[0, 0]["pixels"]
    windows = whole.unfold(2, 16, 1).unfold(3, 16, 1)  # (3, T, rows, columns, 16, 16)
    same = (windows == sample["pixels"][:, :, None, None]).all(-1).all(-1).all(0).all(0)
    assert same.any()
    run_vae(tmp_path, source, steps=1, crop=16)
    for crop in (12, 8 * (1 + max(height, width) // 8)):
        with pytest.raises(InputError, match="crop must be a multiple of 8"):
            run_vae(tmp_path / "wrong", source, crop=crop)


def test_crops_show_what_is_there():
    """A small square on plain ground: in two thirds of the crops, in a quarter by chance."""
    pixels = torch.zeros(3, 1, 64, 64)
    pixels[:, :, 20:30, 40:50] = 1
    crops = [detailed_crop(pixels, 16, torch.Generator().manual_seed(k)) for k in range(200)]
    assert sum(bool(crop.any()) for crop in crops) > 120
    plain = (pixels[0, 0].unfold(0, 16, 1).unfold(1, 16, 1).sum((-1, -2)) > 0).float().mean()
    assert plain < 0.35


def test_a_source_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="cannot be read, the last one because: clip"):
        run_vae(tmp_path, GradientSource(3, broken=range(3)))
    with pytest.raises(
        InputError, match="multiples of 8 for this VAE, for example 32 x 32; got 36 x 32"
    ):
        run_vae(tmp_path, GradientSource(3, height=36))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"kl_weight": -1.0}, "kl_weight must be a finite number of at least 0, got -1.0"),
        (
            {"edge_weight": float("nan")},
            "edge_weight must be a finite number of at least 0, got nan",
        ),
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1, got 0"),
        ({"crop": 32.0}, "crop must be a whole number of at least 1, got 32.0"),
        ({"crop": 0}, "crop must be a whole number of at least 1, got 0"),
    ],
)
def test_numbers_that_no_vae_run_takes(tmp_path, values, message):
    with pytest.raises(InputError, match=message):
        VAETrainingOptions(out=tmp_path, **values)
