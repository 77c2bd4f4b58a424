"""Configs, named sizes, parameter names, and the layers that stand alone."""

import json

import pytest
import torch
from safetensors import safe_open
from small_models import SMALL, SMALL_IMAGE, SMALL_ROTARY, small_model
from test_parity import GOLDEN

from nova.config import NAMED_CONFIGS, ModelConfig, named_config
from nova.errors import ConfigError
from nova.layers import (
    Attention,
    KeyValueCache,
    Rotary,
    patchify,
    unpatchify,
)
from nova.model import Mixer, NOVATransformer
from nova.positions import frame_times


def num_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        model = NOVATransformer(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "name, billions",
    [
        ("nova-d48w1024-osp480", 0.65),
        ("nova-d48w1024-sd512", 0.64),
        ("nova-d48w768-sdxl1024", 0.37),
        ("nova-d48w1024-sdxl1024", 0.64),
        ("nova-d48w1536-sdxl1024", 1.40),
    ],
)
def test_released_sizes(name, billions):
    """The names' 0.3B, 0.6B and 1.4B."""
    assert num_parameters(named_config(name)) == pytest.approx(billions * 1e9, rel=0.03)


def test_released_video_geometry():
    config = named_config("nova-d48w1024-osp480")
    assert (config.latent_shape, config.num_image_tokens) == ((4, 60, 96), 1440)
    assert (config.num_frame_tokens, config.patch_size, config.token_dim) == (360, 2, 16)


@pytest.mark.parametrize("config", [*NAMED_CONFIGS.values(), SMALL, SMALL_ROTARY, SMALL_IMAGE])
def test_config_files_round_trip(config):
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_of_the_reference():
    """The reference's own keys: names for architectures, one number for square images."""
    config = ModelConfig.from_dict(
        {
            "_class_name": "NOVATransformer3DModel",
            "_diffusers_version": "0.32.1",
            "image_dim": 4,
            "image_size": 512,
            "image_stride": 8,
            "text_token_dim": 2560,
            "text_token_len": 256,
            "image_base_size": [32, 32],
            "video_base_size": [1, 16, 16],
            "video_mixer_rank": None,
            "rotary_pos_embed": False,
            "arch": ["vit_d16w1024", "vit_d32w1024", "mlp_d3w1280"],
        }
    )
    assert config == named_config("nova-d48w1024-sd512")
    assert config.video_encoder.num_heads == 16 and config.image_encoder.head_dim == 64


@pytest.mark.parametrize(
    "change, message",
    [
        ({"arch": ["vit_d16w1024", "vit_d32w1024"]}, "`arch` must be"),
        ({"arch": ["vit_d16w1024", "mlp_d3w1280", "vit_d32w1024"]}, "`arch` must be"),
        ({"arch": None}, "lacks"),
        ({"arch_dims": [1, 2, 3]}, "has both `arch` and `arch_dims`; keep one"),
        ({"arch": None, "arch_dims": [{"depth": 1}] * 3}, "`arch_dims` must be"),
        ({"image_dim": None}, "image_dim"),
        ({"image_size": [500, 512]}, "divisible by 32"),
        ({"image_base_size": [16, 16]}, "image_base_size"),
        ({"text_token_len": None}, "text_token_len"),
        ({"text_token_len": 600}, "1 to 512"),
        ({"hidden_act": "gelu"}, "unknown keys"),
        ({"video_base_size": [1, 16]}, "3 numbers"),
        ({"image_size": "512"}, "positive integers"),
        ({"image_size": [16, 16.5]}, "positive integers"),
        ({"text_token_dim": 2560.0}, "`text_token_dim` must be an integer"),
        ({"text_token_dim": -5}, "`text_token_dim` must be positive"),
        ({"video_mixer_rank": "24"}, "`video_mixer_rank` must be an integer"),
        ({"rotary_pos_embed": "false"}, "`rotary_pos_embed` is true or false"),
    ],
)
def test_bad_config(change, message):
    config = {**named_config("nova-d48w1024-sd512").to_dict(), **change}
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(config)


def test_unknown_size_lists_the_known_ones():
    with pytest.raises(ConfigError, match="nova-d48w1024-osp480"):
        named_config("nova-large")


@pytest.mark.parametrize(
    "case", ["t2v_flow_cfg", "t2v_rope_cfg", "t2i_rope_cfg", "c2i_min_guidance"]
)
def test_state_dict_keys_are_the_reference_ones(case):
    case = json.loads((GOLDEN / case / "case.json").read_text())
    with safe_open(GOLDEN / case["weights"], "pt") as weights:
        expected = {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}
    model = NOVATransformer(ModelConfig.from_dict(case["config"]))
    assert {key: tuple(v.shape) for key, v in model.state_dict().items()} == expected


def test_patchify_round_trip_and_order():
    latents = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    tokens = patchify(latents, 2)
    assert torch.equal(unpatchify(tokens, 2, (4, 6)), latents)
    # Token 1 is the patch at row 0, column 1; its values: row, column, channel.
    expected = latents[0, :, 0:2, 2:4].permute(1, 2, 0).flatten()
    assert torch.equal(tokens[0, 1], expected)


def test_clips_of_any_length_span_the_same_times():
    """From 0 to just below the time base, however many frames there are."""
    assert frame_times(3, time_base=3).tolist() == [0, 1, 2]
    assert frame_times(6, time_base=3).tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    assert frame_times(2, time_base=3).tolist() == [0, 1.5]


def test_patch_embedding_of_tokens_is_the_convolution():
    embed = small_model().image_encoder.patch_embed
    latents = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(embed.embed_tokens(patchify(latents, 2)), embed(latents))


def test_mixers_of_full_rank_have_no_first_projection():
    full, low = Mixer(8, rank=-1), Mixer(8, rank=8)
    torch.nn.init.eye_(low.lora.weight)
    low.proj.load_state_dict(full.proj.state_dict())
    first, current = torch.randn(2, 3, 5, 8)
    torch.testing.assert_close(full(first, current), low(first, current))
    scale, shift = full.proj(torch.nn.functional.silu(current)).split(8, dim=-1)
    torch.testing.assert_close(full(first, current), first * (1 + scale) + shift)


def test_cached_attention_equals_block_causal_attention():
    attention = Attention(16, 2).requires_grad_(False)
    x = torch.randn(2, 9, 16)
    whole = attention(x, block_lengths=[4, 3, 2])
    cache = KeyValueCache(9)
    parts = [attention(x[:, a:b], cache=cache) for a, b in ((0, 4), (4, 7), (7, 9))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    cache = KeyValueCache(9)
    first = attention(x[:, :4], cache=cache)
    later = attention(x[:, 4:], cache=cache, block_lengths=[3, 2])
    torch.testing.assert_close(torch.cat([first, later], dim=1), whole)


def test_attention_rows_equal_those_of_the_whole():
    attention = Attention(16, 2).requires_grad_(False)
    x, rotary = torch.randn(2, 9, 16), Rotary.from_angles(torch.randn(9, 4), torch.float32)
    some = attention(x, rotary=rotary, queries=x[:, 3:7], query_rotary=rotary.slice(3, 7))
    torch.testing.assert_close(some, attention(x, rotary=rotary)[:, 3:7])
    with pytest.raises(ValueError, match="query_rotary"):
        attention(x, rotary=rotary, queries=x[:, 3:7])


def test_import_is_light():
    """Core modules import torch and numpy alone, and not torch.compile, which takes seconds."""
    import subprocess
    import sys

    core = "config layers positions model head schedule guidance noise conditioning token_order"
    core += " video_context denoising sampling plain_sampling objective vae"
    code = "import sys\n" + "".join(f"import nova.{name}\n" for name in core.split())
    code += "heavy = {'transformers', 'diffusers', 'PIL', 'av', 'huggingface_hub', 'safetensors'}\n"
    code += "heavy.add('torch._dynamo')\n"
    code += "print(sorted(heavy & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
