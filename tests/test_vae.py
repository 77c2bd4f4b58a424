"""The video VAE: the reference's results, tiles of time and space, streaming, less memory."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nova.errors import ConfigError, InputError
from nova.vae import CausalVideoVAE, VAEConfig, autoencoder, sample_latents
from nova.vae.framewise import decode_framewise
from nova.vae.layers import CausalConv3d
from nova.vae.tiles import SpatialTiling, blend_tiles, time_tiles

GOLDEN = Path(__file__).resolve().parent / "data" / "golden"

# Latent frames, height, width, batch.
SIZES = [(1, 2, 3, 1), (2, 3, 2, 2), (3, 4, 4, 1), (5, 2, 3, 2)]


@pytest.fixture(scope="module")
def golden():
    """The reference's inputs (in.*) and outputs (out.*)."""
    return load_file(GOLDEN / "vae_osp" / "vectors.safetensors")


@pytest.fixture
def vae():
    """The golden case's VAE, without gradients."""
    config = json.loads((GOLDEN / "vae_osp" / "case.json").read_text())["config"]
    vae = CausalVideoVAE(VAEConfig.from_dict(config))
    weights = load_file(GOLDEN / "weights" / "vae_osp.safetensors")
    vae.load_state_dict({key: tensor.float() for key, tensor in weights.items()})
    with torch.no_grad():
        yield vae.eval()


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())


def latents_of(length, height=4, width=6, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, length, height, width, generator=generator)


def pixels_of(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- the reference's results


@pytest.mark.parametrize("budget", [0, None])
@pytest.mark.parametrize("name", ["1", "3", "5", "9", "_image"])
def test_decode_matches_reference(vae, golden, name, budget):
    vae.memory_budget = budget
    pixels = vae.decode_unscaled(golden[f"in.z{name}"])
    assert relative_error(pixels, golden[f"out.decode{name}"]) < 1e-5


@pytest.mark.parametrize("budget", [0, None])
def test_encode_matches_reference(vae, golden, budget):
    vae.memory_budget = budget
    mean, logvar = vae.encode_moments(golden["in.video"])
    assert relative_error(mean, golden["out.video_mean"]) < 1e-5
    assert relative_error(logvar, golden["out.video_logvar"]) < 1e-5
    mean, _ = vae.encode_moments(golden["in.image"])
    assert relative_error(mean, golden["out.image_mean"]) < 1e-5


def test_scaled_latents(vae, golden):
    vae.config = replace(vae.config, shift_factor=0.3)
    mean, _ = vae.encode_moments(golden["in.video"])
    latents = vae.encode(golden["in.video"], sample=False)
    torch.testing.assert_close(latents, (mean - 0.3) * 0.5)
    assert relative_error(vae.decode(latents), vae.decode_unscaled(mean)) < 1e-5


def test_variance_is_bounded(vae):
    vae.quant_conv.bias[4:6] += 1000
    vae.quant_conv.bias[6:] -= 1000
    _, logvar = vae.encode_moments(pixels_of(1, 3, 16, 24))
    assert (logvar[:, :2] == 20).all() and (logvar[:, 2:] == -30).all()


# --- frame by frame


@pytest.mark.parametrize("length, height, width, batch", SIZES)
def test_frame_by_frame_equals_plain(vae, length, height, width, batch):
    latents = latents_of(length, height, width, batch)
    pixels = pixels_of(batch, 3, 1 + 4 * (length - 1), 8 * height, 8 * width)
    vae.memory_budget = None
    decoded, (mean, logvar) = vae.decode(latents), vae.encode_moments(pixels)
    vae.memory_budget = 0
    assert relative_error(vae.decode(latents), decoded) < 1e-5
    again = vae.encode_moments(pixels)
    assert relative_error(again[0], mean) < 1e-5
    assert relative_error(again[1], logvar) < 1e-5


def test_less_memory_means_more_work(vae, monkeypatch):
    """How often the convolutions of the largest frames run, for 13 frames."""
    convolve, calls = CausalConv3d.convolve, Counter()

    def counted(conv, x):
        calls[conv] += 1
        return convolve(conv, x)

    latents = latents_of(4, 6, 4, batch=2)
    plain = vae.decoder(latents)
    monkeypatch.setattr(CausalConv3d, "convolve", counted)
    upsampler = vae.decoder.up_blocks[2].upsamplers[0].conv
    block = vae.decoder.up_blocks[3].resnets[0]
    counts, totals = {}, []
    for budget in (0, 3_000_000, 10_000_000, 20_000_000):
        calls.clear()
        assert relative_error(decode_framewise(vae.decoder, latents, budget), plain) < 1e-5
        counts[budget] = [calls[conv] for conv in (upsampler, block.conv1, block.conv2)]
        totals.append(sum(calls.values()))
    # What is not kept is computed twice; the last upsampler's frames even three times, for the
    # statistics of two norms and for the result.
    assert counts[0] == counts[3_000_000] == [39, 26, 13]
    assert counts[10_000_000] == [13, 26, 13]
    assert counts[20_000_000] == [13, 13, 13]
    # In between, the smaller levels are kept.
    assert totals[0] > totals[1] > totals[2] > totals[3]


def test_which_path_is_taken(vae, monkeypatch):
    """Frame by frame where memory is short and no gradients are wanted."""
    taken = []

    def spy(name):
        function = getattr(autoencoder, name)
        monkeypatch.setattr(autoencoder, name, lambda *a: taken.append(name) or function(*a))

    spy("decode_framewise")
    spy("encode_framewise")

    def run(budget):
        vae.memory_budget = budget
        taken.clear()
        vae.decode(latents_of(1, 2, 3))
        vae.encode(pixels_of(1, 3, 1, 16, 24))
        return taken

    both = ["decode_framewise", "encode_framewise"]
    # Four tensors of 16 x 24 pixels, 32 channels, 4 bytes.
    needed = 4 * 16 * 24 * 32 * 4
    assert run(0) == both
    assert run(needed - 1) == both
    assert run(needed) == []
    assert run(None) == []
    with torch.enable_grad():
        assert run(0) == []


@pytest.mark.parametrize(
    "name",
    [
        "encoder.down_blocks.0.resnets.0.conv1",
        "encoder.down_blocks.1.downsamplers.0",
        "decoder.up_blocks.0.upsamplers.0",
        "decoder.conv_norm_out",
        "decoder",
    ],
)
@pytest.mark.parametrize("way", ["hook", "forward"])
def test_layers_that_somebody_altered(vae, name, way):
    """Their hooks and `forward` count, however little memory there is."""
    pixels, latents = pixels_of(1, 3, 5, 16, 24), latents_of(1, 2, 3)
    before = vae.encode_moments(pixels)[0], vae.decode(latents)
    layer = vae.get_submodule(name)
    if way == "hook":
        layer.register_forward_hook(lambda layer, given, output: output.roll(1, dims=1))
    else:
        forward = layer.forward
        layer.forward = lambda *given: forward(*given).roll(1, dims=1)
    results = []
    for budget in (None, 0):
        vae.memory_budget = budget
        results.append((vae.encode_moments(pixels)[0], vae.decode(latents)))
    is_decoder = name.startswith("decoder")
    assert relative_error(results[0][is_decoder], before[is_decoder]) > 0.01
    for plain, lean in zip(*results, strict=True):
        assert relative_error(lean, plain) < 1e-5


def test_frame_by_frame_of_half_precision(vae):
    latents = latents_of(2, 2, 3)
    exact = vae.decode(latents)
    vae.to(torch.bfloat16)
    vae.memory_budget = None
    plain_error = relative_error(vae.decode(latents).float(), exact)
    vae.memory_budget = 0
    pixels = vae.decode(latents)
    assert pixels.dtype == torch.bfloat16
    assert relative_error(pixels.float(), exact) < 2 * plain_error


def test_gradients_take_the_plain_path(vae):
    vae.memory_budget = 0
    expected = vae.decode(latents_of(2))
    with torch.enable_grad():
        latents = latents_of(2).requires_grad_()
        pixels = vae.decode(latents)
        pixels.square().mean().backward()
    assert relative_error(pixels, expected) < 1e-5
    assert latents.grad.abs().sum() > 0
    assert all(p.grad is not None for p in vae.decoder.parameters())


@pytest.mark.parametrize("down, up", [("2D 2D", "2D 2D"), ("3D 3D 2D", "3D 3D 3D"), ("3D", "3D")])
def test_other_layouts(down, up):
    torch.manual_seed(0)
    config = replace(
        VAEConfig.tiny(),
        block_out_channels=(32,) * len(down.split()),
        down_block_types=tuple(f"DownEncoderBlock{kind}" for kind in down.split()),
        up_block_types=tuple(f"UpDecoderBlock{kind}" for kind in up.split()),
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    # In float64: how far rounding goes in float32 depends on the CPU.
    vae = CausalVideoVAE(config, tile_latents=3).double()
    frames = 1 + 3 * config.temporal_factor
    pixels = pixels_of(1, 3, frames, 8, 16).double()
    results = []
    for budget in (0, None):
        vae.memory_budget = budget
        with torch.no_grad():
            mean, _ = vae.encode_moments(pixels)
            results.append((mean, vae.decode_unscaled(mean)))
    for lean, plain in zip(*results, strict=True):
        assert relative_error(lean, plain) < 1e-12
    assert results[0][0].shape[2] == 4 and results[0][1].shape == pixels.shape


# --- tiles of time


def test_time_tiles_lose_nothing():
    assert list(time_tiles(9, 5)) == [(0, 5), (4, 9)]
    assert list(time_tiles(6, 5)) == [(0, 5), (4, 6)]
    assert list(time_tiles(1, 5)) == [(0, 1)]
    assert list(time_tiles(3, 2)) == [(0, 2), (1, 3)]


@pytest.mark.parametrize("length", [2, 5, 6, 7, 9, 10])
@pytest.mark.parametrize("tile_latents", [3, 5])
def test_decoding_tiles(vae, length, tile_latents):
    """Tiles overlap by one latent; all but the first drop the frame that stands for it."""
    vae.tile_latents = tile_latents
    latents = latents_of(length, 2, 3)
    expected, start = [], 0
    while not expected or start < length - 1:
        tile = vae.decoder(vae.post_quant_conv(latents[:, :, start : start + tile_latents] / 0.5))
        expected.append(tile[:, :, 1:] if expected else tile)
        start += tile_latents - 1
    pixels = vae.decode(latents)
    assert pixels.shape == (1, 3, 1 + 4 * (length - 1), 16, 24)
    assert relative_error(pixels, torch.cat(expected, dim=2)) < 1e-5


@pytest.mark.parametrize("frames", [1, 5, 17, 21, 33, 41])
def test_encoding_tiles(vae, frames):
    """Tiles of 17 frames overlap by one; all but the first drop the latent that stands for it."""
    pixels = pixels_of(1, 3, frames, 16, 24)
    expected, start = [], 0
    while not expected or start < frames - 1:
        tile = vae.quant_conv(vae.encoder(pixels[:, :, start : start + 17]))
        expected.append(tile[:, :, 1:] if expected else tile)
        start += 16
    mean, logvar = vae.encode_moments(pixels)
    assert mean.shape == (1, 4, 1 + (frames - 1) // 4, 2, 3)
    assert relative_error(torch.cat([mean, logvar], dim=1), torch.cat(expected, dim=2)) < 1e-5


@pytest.mark.parametrize("tile_latents", [2, 3, 5])
@pytest.mark.parametrize("length", range(1, 11))
def test_the_first_frame_alone(vae, tile_latents, length):
    """It is that of an image; the others are as without."""
    vae.tile_latents = tile_latents
    latents = latents_of(length, 2, 3)
    without = vae.decode(latents)
    vae.first_frame_alone = True
    pixels = vae.decode(latents)
    assert pixels.shape == without.shape
    assert torch.equal(pixels[:, :, 0], vae.decode(latents[:, :, 0]))
    assert torch.equal(pixels[:, :, 1:], without[:, :, 1:])
    if length > 1:
        assert not torch.equal(pixels[:, :, 0], without[:, :, 0])


@pytest.mark.parametrize("first_frame_alone", [False, True])
@pytest.mark.parametrize("tile_latents", [2, 3, 5])
@pytest.mark.parametrize("length", range(1, 11))
def test_stream_equals_decode(vae, tile_latents, first_frame_alone, length):
    """However the latents come: one by one, all at once, in odd pieces, some of them empty."""
    vae.tile_latents, vae.first_frame_alone = tile_latents, first_frame_alone
    latents = latents_of(length, 2, 2)
    decoded = vae.decode(latents)
    # Random cut points, with one doubled for an empty piece.
    cuts = torch.randint(0, length + 1, (3,), generator=torch.Generator().manual_seed(length))
    cuts = sorted([*cuts.tolist(), int(cuts[0])])
    odd = [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
    for pieces in ([1] * length, [length], odd):
        stream = vae.stream()
        parts = [stream.push(piece) for piece in latents.split(pieces, dim=2)]
        parts.append(stream.finish())
        assert torch.equal(torch.cat(parts, dim=2), decoded), pieces


def test_stream_of_two_latent_tiles_gives_frames_at_once(vae):
    vae.tile_latents = 2
    stream = vae.stream()
    frames = [stream.push(latent).shape[2] for latent in latents_of(4).split(1, dim=2)]
    assert frames == [0, 5, 4, 4]
    assert stream.finish().shape == (1, 3, 0, 32, 48)


@pytest.mark.parametrize("tile_latents, expected", [(2, [1, 4, 4, 4, 4]), (4, [1, 0, 0, 12, 0])])
def test_stream_with_the_first_frame_alone_gives_it_at_once(vae, tile_latents, expected):
    vae.tile_latents, vae.first_frame_alone = tile_latents, True
    stream = vae.stream()
    frames = [stream.push(latent).shape[2] for latent in latents_of(5).split(1, dim=2)]
    assert frames == expected
    assert stream.finish().shape[2] == 17 - sum(expected)


def test_stream_of_one_latent(vae):
    stream = vae.stream()
    assert stream.push(latents_of(1)).shape == (1, 3, 0, 32, 48)
    assert torch.equal(stream.finish(), vae.decode(latents_of(1)))


def test_stream_errors(vae):
    with pytest.raises(InputError, match="nothing was pushed"):
        vae.stream().finish()
    stream = vae.stream()
    for shape in ((1, 4, 5, 6), (1, 3, 1, 5, 6)):
        with pytest.raises(InputError, match="expected .batch, 4, frames, height, width."):
            stream.push(torch.zeros(shape))
    stream.push(latents_of(1))
    with pytest.raises(InputError, match="only the number of frames"):
        stream.push(latents_of(1, height=5))
    stream.finish()
    with pytest.raises(InputError, match="finished"):
        stream.push(latents_of(1))
    with pytest.raises(InputError, match="finished"):
        stream.finish()


def test_stream_of_a_tensor_that_is_used_again(vae):
    latents, stream = latents_of(4), vae.stream()
    buffer, pieces = torch.empty_like(latents[:, :, :1]), []
    for latent in latents.split(1, dim=2):
        pieces.append(stream.push(buffer.copy_(latent)))
    pieces.append(stream.finish())
    assert torch.equal(torch.cat(pieces, dim=2), vae.decode(latents))


@pytest.mark.parametrize("failing", [0, 1])
def test_push_that_fails_can_be_repeated(vae, monkeypatch, failing):
    """In a tile that is the first of a stream, or behind one that succeeded."""
    vae.tile_latents = 2
    latents, stream = latents_of(4), vae.stream()
    decode, calls = vae._decode_frames, []

    def decode_or_fail(tile):
        calls.append(tile)
        if len(calls) == failing + 1:
            raise MemoryError
        return decode(tile)

    monkeypatch.setattr(vae, "_decode_frames", decode_or_fail)
    with pytest.raises(MemoryError):
        stream.push(latents[:, :, :3])
    pieces = [stream.push(latents[:, :, :3]), stream.push(latents[:, :, 3:]), stream.finish()]
    assert torch.equal(torch.cat(pieces, dim=2), vae.decode(latents))


def test_stream_takes_latents_of_any_type(vae):
    """Empty pieces too have the module's device and dtype, so that pieces can be put together."""
    vae.to("meta")  # stands for a GPU
    latents = latents_of(1).bfloat16()
    stream = vae.stream()
    pieces = [stream.push(latents), stream.finish()]
    assert {piece.device.type for piece in pieces} == {"meta"}
    assert {piece.dtype for piece in pieces} == {torch.float32}
    assert vae.decode(latents).device.type == "meta"


# --- tiles of space


def test_blending_is_exact_for_what_is_local():
    tiling = SpatialTiling(tile=(4, 6), overlap=(2, 1))
    x = torch.randn(2, 3, 2, 11, 13)
    torch.testing.assert_close(blend_tiles(x, lambda tile: tile, tiling, 1, 1), x)

    def double(tile):
        return tile.repeat_interleave(2, 3).repeat_interleave(2, 4)

    torch.testing.assert_close(blend_tiles(x, double, tiling, 1, 2), double(x))
    pixels = double(x)
    halved = blend_tiles(pixels, lambda tile: tile[..., ::2, ::2], tiling, 2, 1)
    torch.testing.assert_close(halved, x)


def test_tiling_approximates(vae):
    """Noise through untrained weights is the worst case; measured: 0.16 and 0.11, 0.27 and 0.22."""
    latents, pixels = latents_of(1, 20, 26), pixels_of(1, 3, 1, 160, 208)
    decoded, (mean, _) = vae.decode(latents), vae.encode_moments(pixels)
    errors = []
    for tile, overlap in ((128, 64), ((96, 96), (32, 32))):
        vae.enable_tiling(tile, overlap)
        error = relative_error(vae.decode(latents), decoded)
        errors.append((error, relative_error(vae.encode_moments(pixels)[0], mean)))
    assert errors[0][0] < 0.25 and errors[0][1] < 0.17
    # Smaller tiles are worse, and still bounded.
    assert errors[0][0] < errors[1][0] < 0.4 and errors[0][1] < errors[1][1] < 0.3
    vae.disable_tiling()
    assert torch.equal(vae.decode(latents), decoded)


def test_tile_that_covers_the_frame_is_exact(vae):
    latents = latents_of(2)
    decoded = vae.decode(latents)
    vae.enable_tiling((32, 48), 16)
    assert vae.tiling.covers(4, 6) and not vae.tiling.covers(6, 4) and not vae.tiling.covers(4, 7)
    assert torch.equal(vae.decode(latents), decoded)


@pytest.mark.parametrize(
    "tile, overlap",
    [(60, 16), (64, 12), (64, 40), (0, 0), (64, -8), (64.0, 16), ((64, 64, 64), 16), (64, None)],
)
def test_tiling_errors(vae, tile, overlap):
    with pytest.raises(InputError):
        vae.enable_tiling(tile, overlap)


def test_tiles_of_numpys_numbers(vae):
    vae.enable_tiling(np.int64(32), np.array([16, 8]))
    assert (vae.tiling.tile, vae.tiling.overlap) == ((4, 4), (2, 1))


# --- sampling


def test_list_of_generators_is_per_sample(vae):
    pixels = pixels_of(2, 3, 5, 16, 24)

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    both = vae.encode(pixels, generators())
    for index, generator in enumerate(generators()):
        alone = vae.encode(pixels[index : index + 1], [generator])
        torch.testing.assert_close(both[index : index + 1], alone)
    assert not torch.equal(both, vae.encode(pixels, sample=False))
    with pytest.raises(InputError, match="generators"):
        vae.encode(pixels, generators()[:1])


def test_samples_are_the_mean_and_noise_by_its_deviation():
    """In this order and with this sign a seed gives the reference's latents."""
    mean, logvar = torch.randn(2, 2, 4, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(2, 4, 1, 3, 3, generator=torch.Generator().manual_seed(2))
    samples = sample_latents(mean, logvar, torch.Generator().manual_seed(2))
    torch.testing.assert_close(samples, mean + logvar.exp().sqrt() * noise)


def test_generator_is_reproducible(vae):
    pixels = pixels_of(2, 3, 16, 24)
    seeded = [vae.encode(pixels, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])


def test_images_are_videos_of_one_frame(vae):
    image = pixels_of(2, 3, 16, 24)
    latents = vae.encode(image, sample=False)
    assert latents.shape == (2, 4, 2, 3)
    assert torch.equal(latents, vae.encode(image[:, :, None], sample=False)[:, :, 0])
    pixels = vae.decode(latents)
    assert pixels.shape == image.shape
    assert torch.equal(pixels, vae.decode(latents[:, :, None])[:, :, 0])


# --- wrong arguments


@pytest.mark.parametrize("frames, nearest", [(2, "1 or .* 5"), (10, "9 or .* 13")])
def test_frame_counts_that_would_lose_frames(vae, frames, nearest):
    with pytest.raises(InputError, match=nearest):
        vae.encode(pixels_of(1, 3, frames, 16, 24))


@pytest.mark.parametrize(
    "shape", [(1, 4, 5, 16, 16), (1, 3, 16), (1, 3, 1, 20, 16), (0, 3, 16, 16)]
)
def test_wrong_pixels(vae, shape):
    with pytest.raises(InputError):
        vae.encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 3, 2, 4, 4), (4, 4, 4), (1, 4, 0, 4, 4)])
def test_wrong_latents(vae, shape):
    with pytest.raises(InputError):
        vae.decode(torch.zeros(shape))


def test_tiles_of_one_latent_are_refused():
    with pytest.raises(InputError, match="tile_latents"):
        CausalVideoVAE(VAEConfig.tiny(), tile_latents=1)
    vae = CausalVideoVAE(VAEConfig.tiny())
    for wrong in (1, 2.5, "3", None):
        with pytest.raises(InputError, match="tile_latents"):
            vae.tile_latents = wrong
    assert vae.tile_latents == 5


@pytest.mark.parametrize("budget", ["6GB", "Auto", float("nan"), float("inf"), True, [5]])
def test_budgets_that_are_none(budget):
    with pytest.raises(InputError, match='memory_budget must be bytes, "auto" or None'):
        CausalVideoVAE(VAEConfig.tiny(), memory_budget=budget)


# --- configuration


def test_config_round_trip():
    for config in (VAEConfig.tiny(), VAEConfig.osp()):
        assert VAEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert (config.spatial_factor, config.temporal_factor) == (8, 4)


def test_config_ignores_what_has_no_effect():
    extra = {
        "_class_name": "AutoencoderKLOpenSora",
        "_diffusers_version": "0.30.0",
        "act_fn": "silu",
        "sample_size": 256,
        "force_upcast": True,
        "latents_mean": None,
        "latents_std": None,
    }
    assert VAEConfig.from_dict({**VAEConfig.tiny().to_dict(), **extra}) == VAEConfig.tiny()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"colour": 1}, "unknown keys.*colour"),
        ({"latent_channels": None}, "lacks.*latent_channels"),
        ({"latents_mean": [0.0] * 4}, "latents_mean"),
        ({"block_out_channels": [32, 32, 48, 64]}, "multiples"),
        ({"block_out_channels": [32, 0, 32, 64]}, "block_out_channels"),
        ({"block_out_channels": []}, "block_out_channels"),
        ({"block_out_channels": [32, 32, 64]}, "as many"),
        ({"down_block_types": ["DownBlock"] * 4}, "DownEncoderBlock2D"),
        ({"down_block_types": ["DownEncoderBlock2D"] * 4}, "time"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 2 + ["UpDecoderBlock3D"] * 2}, "all 2D"),
        ({"layers_per_block": "2"}, "layers_per_block"),
        ({"use_quant_conv": "no"}, "use_quant_conv"),
        ({"scaling_factor": 0}, "scaling_factor"),
        ({"shift_factor": float("nan")}, "shift_factor"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ConfigError, match=message):
        VAEConfig.from_dict({**VAEConfig.tiny().to_dict(), **change})


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [0, None])
def test_gpu_equals_cpu(vae, golden, budget):
    """With a generator on the CPU, which gives a GPU the same noise."""
    vae.memory_budget = budget
    pixels = golden["in.video"]
    latents = vae.encode(pixels, torch.Generator().manual_seed(0))
    decoded = vae.decode(latents)
    vae.to("cuda")
    on_gpu = vae.encode(pixels, torch.Generator().manual_seed(0))
    # Convolutions may run in TF32 there.
    assert relative_error(on_gpu.cpu(), latents) < 1e-2
    stream = vae.stream()
    pieces = [stream.push(latents), stream.finish()]
    assert relative_error(torch.cat(pieces, dim=2).cpu(), decoded) < 1e-2


def test_automatic_budget():
    """Small clips take the plain pass on a CPU; an explicit budget or none overrides."""
    vae = CausalVideoVAE(VAEConfig.tiny())
    with torch.no_grad():
        assert vae._budget() == 6e9
        vae.memory_budget = 5
        assert vae._budget() == 5
        vae.memory_budget = None
        assert vae._budget() == float("inf")
    vae.memory_budget = 5
    assert vae._budget() == float("inf")  # with gradients the plain pass is the only one


def fails_once(compute, error):
    """`compute` that raises `error` at its first call."""
    calls = []

    def call(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise error
        return compute(*arguments)

    return call


@pytest.mark.parametrize(
    "budget, error, is_tried_again",
    [
        ("auto", torch.OutOfMemoryError("CUDA out of memory"), True),
        ("auto", RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        ("auto", RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"), False),
        (None, torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
def test_less_memory_than_counted(budget, error, is_tried_again, monkeypatch):
    """What "auto" counted may not be there: then the least is tried, where it was our choice."""
    vae = CausalVideoVAE(VAEConfig.tiny(), memory_budget=budget).eval()
    pixels, latents = torch.rand(1, 3, 5, 32, 32) * 2 - 1, torch.randn(1, 4, 3, 4, 4)
    with torch.no_grad():
        expected = vae.encode_moments(pixels)[0], vae.decode_unscaled(latents)
        for part in (type(vae.encoder), type(vae.decoder)):
            monkeypatch.setattr(part, "forward", fails_once(part.forward, error))
        if not is_tried_again:
            with pytest.raises(type(error), match=str(error)):
                vae.encode_moments(pixels)
            return
        result = vae.encode_moments(pixels)[0], vae.decode_unscaled(latents)
    for found, wanted in zip(result, expected, strict=True):
        assert relative_error(found, wanted) < 1e-5
