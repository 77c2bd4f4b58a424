"""LatentCodec: one interface over the video VAE and the image VAE of diffusers."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import small_image_codec

from nova.codec import LatentCodec, read_temporal_factor
from nova.errors import CheckpointError, ConfigError, DependencyError, InputError
from nova.vae import CausalVideoVAE, VAEConfig

GOLDEN = Path(__file__).resolve().parent / "data" / "golden"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def codec():
    """The tiny video VAE with random weights, and a shift beside the scaling."""
    torch.manual_seed(0)
    config = VAEConfig.from_dict({**VAEConfig.tiny().to_dict(), "shift_factor": 0.3})
    return LatentCodec(CausalVideoVAE(config))


@pytest.fixture
def image_codec():
    return small_image_codec()


def pixels_of(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def latents_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_moments_whatever_autocast_says(codec, image_codec):
    given = (codec, pixels_of(1, 3, 5, 16, 16)), (image_codec, pixels_of(2, 3, 16, 16))
    for one, pixels in given:
        expected = one.encode_moments(pixels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for moments, wanted in zip(one.encode_moments(pixels), expected, strict=True):
                assert torch.equal(moments, wanted)


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def change_config(folder, **changes):
    """Rewrite config.json; None removes a key."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def with_old_attention_names(state_dict):
    """The names and shapes of diffusers before 0.18: projections are 1x1 convolutions."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, tensor in state_dict.items():
        for new, name in old.items():
            if f".attentions.0.{new}." in key:
                key = key.replace(f".{new}.", f".{name}.")
                tensor = tensor[:, :, None, None] if key.endswith("weight") else tensor
        renamed[key] = tensor.contiguous()
    assert sum(".proj_attn." in key for key in renamed) == 4
    return renamed


def assert_same_weights(a, b):
    a, b = a.module.state_dict(), b.module.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


# --- both VAEs


@pytest.mark.parametrize("name", ["codec", "image_codec"])
def test_save_and_load(name, request, tmp_path):
    codec = request.getfixturevalue(name)
    codec.save(tmp_path / "parent" / "vae")
    loaded = LatentCodec.load(tmp_path / "parent" / "vae")
    assert type(loaded.module) is type(codec.module)
    assert loaded.is_video == codec.is_video == (name == "codec")
    assert_same_weights(loaded, codec)
    assert loaded.scaling_factor == codec.scaling_factor
    assert loaded.shift_factor == codec.shift_factor
    factor = read_temporal_factor(tmp_path / "parent" / "vae")
    assert factor == loaded.temporal_factor == (4 if codec.is_video else 1)
    assert not loaded.module.training
    assert not any(p.requires_grad for p in loaded.module.parameters())
    latents = latents_of(1, 4, 2, 2)
    assert torch.equal(loaded.decode(latents), codec.decode(latents))


@pytest.mark.parametrize("name", ["codec", "image_codec"])
def test_precision_is_the_callers_choice(name, request, tmp_path):
    codec = request.getfixturevalue(name)
    codec.save(tmp_path)
    half = LatentCodec.load(tmp_path, torch.bfloat16)
    pixels = pixels_of(1, 3, 16, 16)
    latents, exact = half.encode(pixels, sample=False), codec.encode(pixels, sample=False)
    assert latents.dtype == torch.bfloat16
    torch.testing.assert_close(latents.float(), exact, atol=0.02, rtol=0.02)
    decoded = half.decode(latents)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, codec.decode(exact), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("name", ["codec", "image_codec"])
def test_batches(name, request):
    """Results do not depend on how many samples go through the network at a time."""
    codec = request.getfixturevalue(name)
    pixels, latents = pixels_of(3, 3, 16, 16), latents_of(3, 4, 2, 2)
    decoded = [codec.decode(latents, batch_size=size) for size in (1, 2, 3)]
    encoded = [codec.encode(pixels, seeds(1, 2, 3), batch_size=size) for size in (1, 2, 3)]
    for results in (decoded, encoded):
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], atol=1e-5, rtol=1e-4)
    alone = codec.encode(pixels[2:], seeds(3))
    torch.testing.assert_close(alone, encoded[0][2:], atol=1e-5, rtol=1e-4)
    for call in (codec.decode, codec.encode):
        with pytest.raises(InputError, match="batch_size"):
            call(latents if call == codec.decode else pixels, batch_size=0)


@pytest.mark.parametrize("name", ["codec", "image_codec"])
def test_no_gradients(name, request):
    codec = request.getfixturevalue(name)
    latents = latents_of(1, 4, 2, 2).requires_grad_()
    assert not codec.decode(latents).requires_grad
    assert not codec.encode(pixels_of(1, 3, 16, 16).requires_grad_()).requires_grad


@pytest.mark.parametrize("name", ["codec", "image_codec"])
def test_old_attention_names(name, request, tmp_path):
    codec = request.getfixturevalue(name)
    codec.save(tmp_path)
    save_file(with_old_attention_names(codec.module.state_dict()), tmp_path / WEIGHTS)
    assert_same_weights(LatentCodec.load(tmp_path), codec)


def test_unknown_class(codec, tmp_path):
    codec.save(tmp_path)
    change_config(tmp_path, _class_name="VQModel")
    with pytest.raises(CheckpointError, match="'VQModel'; known are .*AutoencoderKL"):
        LatentCodec.load(tmp_path)
    change_config(tmp_path, _class_name=None)
    with pytest.raises(CheckpointError, match="None"):
        LatentCodec.load(tmp_path)


# --- the video VAE


def test_video_scaling(codec):
    """Latents are (z - shift) * scaling, decoding undoes it."""
    pixels = pixels_of(1, 3, 5, 16, 24)
    with torch.no_grad():
        mean, logvar = codec.module.encode_moments(pixels)
        expected = codec.module.decode_unscaled(mean)
    latents = codec.encode(pixels, sample=False)
    torch.testing.assert_close(latents, (mean - 0.3) * 0.5)
    torch.testing.assert_close(codec.decode(latents), expected, atol=1e-5, rtol=1e-4)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(4))
    drawn = codec.encode(pixels, torch.Generator().manual_seed(4))
    torch.testing.assert_close(drawn, (mean + (0.5 * logvar).exp() * noise - 0.3) * 0.5)
    with torch.no_grad():
        assert torch.equal(drawn, codec.module.encode(pixels, *seeds(4)))


def test_video_shapes(codec):
    properties = codec.latent_channels, codec.scaling_factor, codec.shift_factor
    assert (*properties, codec.spatial_factor) == (4, 0.5, 0.3, 8)
    video, image = codec.encode(pixels_of(2, 3, 9, 16, 24)), codec.encode(pixels_of(2, 3, 16, 24))
    assert video.shape == (2, 4, 3, 2, 3) and image.shape == (2, 4, 2, 3)
    assert codec.decode(video).shape == (2, 3, 9, 16, 24)
    assert codec.decode(image).shape == (2, 3, 16, 24)


@pytest.mark.parametrize(
    "call, shape",
    [
        ("encode", (1, 3, 6, 16, 16)),
        ("encode", (1, 3, 5, 16, 20)),
        ("encode", (1, 4, 5, 16, 16)),
        ("decode", (1, 3, 2, 4, 4)),
        ("decode", (4, 2, 4)),
    ],
)
def test_wrong_video_shapes(codec, call, shape):
    with pytest.raises(InputError):
        getattr(codec, call)(torch.zeros(shape))


def test_video_stream(codec):
    codec.module.tile_latents = 3
    latents = latents_of(2, 4, 6, 2, 3)
    stream = codec.stream()
    parts = [stream.push(part) for part in latents.split([1, 3, 2], dim=2)] + [stream.finish()]
    assert [part.shape[2] for part in parts] == [0, 9, 8, 4]
    streamed = torch.cat(parts, dim=2)
    torch.testing.assert_close(streamed, codec.decode(latents), atol=1e-5, rtol=1e-4)
    codec.module.first_frame_alone = True
    first = codec.stream().push(latents[:, :, :1])
    torch.testing.assert_close(first, codec.decode(latents)[:, :, :1], atol=1e-5, rtol=1e-4)


def test_streamed_pieces_are_alike(codec, image_codec):
    """Pieces of no frames too have the type of the result, whatever the latents have."""
    for each in (codec, image_codec):
        stream = each.stream()
        latents = latents_of(1, 4, 1, 2, 2).bfloat16()
        pieces = [stream.push(latents[:, :, :0]), stream.push(latents), stream.finish()]
        assert {piece.dtype for piece in pieces} == {torch.float32}
        assert {piece.shape[3:] for piece in pieces} == {(2 * each.spatial_factor,) * 2}
        assert sum(piece.shape[2] for piece in pieces) == 1


def test_folder_as_released(tmp_path):
    """Keys that the released configs carry, weights in half precision, results as recorded."""
    config = json.loads((GOLDEN / "vae_osp" / "case.json").read_text())["config"]
    extra = {
        "_class_name": "AutoencoderKLOpenSora",
        "_diffusers_version": "0.31.0",
        "_name_or_path": "somewhere/vae",
        "act_fn": "silu",
        "sample_size": 256,
        "force_upcast": True,
        "latents_mean": None,
        "latents_std": None,
        "norm_num_groups": 32,
        "shift_factor": None,
    }
    (tmp_path / "config.json").write_text(json.dumps({**config, **extra}))
    weights = load_file(GOLDEN / "weights" / "vae_osp.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    save_file(weights, tmp_path / WEIGHTS)
    assert LatentCodec.load(tmp_path).module.dtype == torch.float16
    codec = LatentCodec.load(tmp_path, torch.float32)
    vectors = load_file(GOLDEN / "vae_osp" / "vectors.safetensors")
    latents = codec.encode(vectors["in.video"], sample=False)
    torch.testing.assert_close(latents / 0.5, vectors["out.video_mean"], atol=1e-5, rtol=1e-4)
    pixels = codec.decode(vectors["in.z3"] * 0.5)
    torch.testing.assert_close(pixels, vectors["out.decode3"], atol=1e-4, rtol=1e-4)


def test_shards(codec, tmp_path):
    codec.save(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    keys = sorted(weights)
    shards = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for name, part in shards.items():
        save_file({key: weights[key] for key in part}, tmp_path / name)
    index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert_same_weights(LatentCodec.load(tmp_path), codec)


def test_pickles_only_if_asked_for(codec, tmp_path):
    codec.save(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save(codec.module.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="allow_pickle"):
        LatentCodec.load(tmp_path)
    assert_same_weights(LatentCodec.load(tmp_path, allow_pickle=True), codec)


def test_wrong_video_folders(codec, tmp_path):
    codec.save(tmp_path)
    change_config(tmp_path, latent_channels=8)
    with pytest.raises(CheckpointError, match="mis-shaped"):
        LatentCodec.load(tmp_path)
    change_config(tmp_path, latent_channels=None)
    with pytest.raises(ConfigError, match="latent_channels"):
        LatentCodec.load(tmp_path)
    with pytest.raises(CheckpointError, match="missing"):
        LatentCodec.load(tmp_path / "nowhere")


# --- the image VAE of diffusers


def test_image_scaling(image_codec):
    """The same numbers as diffusers' own calls."""
    module, image = image_codec.module, pixels_of(2, 3, 16, 24)
    assert (image_codec.scaling_factor, image_codec.shift_factor) == (0.25, 0.1)
    assert (image_codec.latent_channels, image_codec.spatial_factor) == (4, 2)
    latents = image_codec.encode(image, *seeds(0))
    expected = (module.encode(image).latent_dist.sample(*seeds(0)) - 0.1) * 0.25
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-4)
    expected = module.decode(latents / 0.25 + 0.1).sample
    torch.testing.assert_close(image_codec.decode(latents), expected, atol=1e-5, rtol=1e-4)


def test_image_with_a_frame_axis(image_codec):
    image = pixels_of(2, 3, 1, 16, 24)
    latents = image_codec.encode(image, sample=False)
    assert latents.shape == (2, 4, 1, 8, 12)
    assert torch.equal(latents[:, :, 0], image_codec.encode(image[:, :, 0], sample=False))
    pixels = image_codec.decode(latents)
    assert pixels.shape == image.shape
    assert torch.equal(pixels[:, :, 0], image_codec.decode(latents[:, :, 0]))


def test_image_stream(image_codec):
    """Every frame by itself, as soon as it is there."""
    latents = latents_of(2, 4, 3, 4, 4)
    stream = image_codec.stream()
    parts = [stream.push(latents[:, :, :1]), stream.push(latents[:, :, 1:]), stream.finish()]
    assert [part.shape[2] for part in parts] == [1, 2, 0]
    frames = [image_codec.decode(frame) for frame in latents.unbind(2)]
    assert torch.equal(torch.cat(parts, dim=2), torch.stack(frames, dim=2))


@pytest.mark.parametrize(
    "call, shape",
    [
        ("encode", (1, 3, 2, 16, 16)),
        ("encode", (1, 3, 16, 17)),
        ("encode", (1, 4, 16, 16)),
        ("encode", (3, 16, 16)),
        ("decode", (1, 4, 2, 4, 4)),
        ("decode", (1, 3, 4, 4)),
        ("decode", (0, 4, 4, 4)),
    ],
)
def test_wrong_image_shapes(image_codec, call, shape):
    with pytest.raises(InputError):
        getattr(image_codec, call)(torch.zeros(shape))


def test_image_config_that_diffusers_refuses(image_codec, tmp_path):
    image_codec.save(tmp_path)
    change_config(tmp_path, down_block_types=["NoSuchBlock"] * 2)
    with pytest.raises(ConfigError, match="NoSuchBlock"):
        LatentCodec.load(tmp_path)


def test_float16_is_raised_where_it_overflows(image_codec, tmp_path):
    """SDXL's config says force_upcast; without it the caller's choice holds."""
    image_codec.save(tmp_path)
    change_config(tmp_path, force_upcast=True)
    assert LatentCodec.load(tmp_path, torch.float16).module.dtype == torch.float32
    assert LatentCodec.load(tmp_path, torch.bfloat16).module.dtype == torch.bfloat16
    assert LatentCodec.load(tmp_path).to(dtype=torch.float16).module.dtype == torch.float32
    change_config(tmp_path, force_upcast=False)
    assert LatentCodec.load(tmp_path, torch.float16).module.dtype == torch.float16


def test_casts_are_silent(image_codec, tmp_path):
    """Diffusers would warn of modules to keep in float32, of which there are none."""
    image_codec.save(tmp_path)
    records, handler = [], logging.Handler()
    handler.emit = records.append
    logging.getLogger("diffusers").addHandler(handler)
    try:
        LatentCodec.load(tmp_path, torch.bfloat16).to(torch.device("cpu"), torch.float32)
    finally:
        logging.getLogger("diffusers").removeHandler(handler)
    assert not records


def test_without_diffusers(tmp_path, monkeypatch, codec):
    """An image VAE says what to install; a video VAE needs nothing."""
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(DependencyError, match="pip install diffusers"):
        LatentCodec.load(tmp_path)
    codec.save(tmp_path / "video")
    assert LatentCodec.load(tmp_path / "video").is_video


def test_decoding_is_compiled(codec):
    """As pipelines' users do; what torch.compile cannot trace is left out."""
    latents = latents_of(1, 4, 3, 4, 4)
    torch._dynamo.reset()
    compiled = torch.compile(codec.module.decode, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(latents), codec.decode(latents), rtol=1e-4, atol=1e-4)
