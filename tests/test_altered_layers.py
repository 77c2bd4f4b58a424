"""Layers that do more than their weights tell, by adapters or hooks, are run, not passed over."""

from operator import attrgetter

import pytest
import torch
from small_models import SMALL, SMALL_IMAGE, sample, small_model
from torch import nn

import nova
from nova.plain_sampling import generate_frames_plain
from nova.sampling import generate_frames

LAYERS = nn.Linear, nn.Conv2d, nn.LayerNorm
SHORT = {"batch": 1, "num_frames": 2, "steps": 2}


def factors(size):
    return torch.linspace(0.5, 2, size)  # not one for all, which the norms would take away again


def scaled(output, layer):
    """The features that a layer puts out, each times its factor."""
    if isinstance(layer, nn.Conv2d):
        return output * factors(output.shape[1]).view(-1, 1, 1)
    return output * factors(output.shape[-1])


class Scaling(nn.Module):
    """An adapter that offers the weights of what it wraps, as those of PEFT do."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return scaled(self.base(x), self.base)


def wrap(model, name):
    model.set_submodule(name, Scaling(model.get_submodule(name)))


def hook(model, name):
    model.get_submodule(name).register_forward_hook(lambda layer, _, output: scaled(output, layer))


def merge(model, name):
    """What both of these do, in the weights."""
    for parameter in model.get_submodule(name).parameters():
        shape = (-1, *(1,) * (parameter.dim() - 1))
        parameter.data.mul_(factors(len(parameter)).view(shape))


def names_of(parts):
    modules = small_model(SMALL).named_modules()
    return [name for name, m in modules if name.startswith(parts) and isinstance(m, LAYERS)]


@pytest.fixture(scope="module")
def unaltered():
    return sample(small_model(SMALL), **SHORT)


@pytest.mark.parametrize("alter", [wrap, hook])
@pytest.mark.parametrize("name", names_of(("video_encoder.", "image_encoder.")))
def test_encoders(name, alter, unaltered):
    altered, merged = small_model(SMALL), small_model(SMALL)
    alter(altered, name)
    merge(merged, name)
    expected = sample(merged, **SHORT)
    assert (unaltered - expected).abs().max() > 2e-3  # it matters
    for sampler in (generate_frames, generate_frames_plain):
        result = sample(altered, sampler, **SHORT)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alter", [wrap, hook])
def test_mixers_of_full_rank(alter):
    altered, merged = small_model(SMALL_IMAGE), small_model(SMALL_IMAGE)
    alter(altered, "video_encoder.mixer.proj")
    merge(merged, "video_encoder.mixer.proj")
    features = torch.randn(2, 1, 3, 64)
    torch.testing.assert_close(altered.mix(*features), merged.mix(*features))


@pytest.mark.parametrize("alter", [wrap, hook])
@pytest.mark.parametrize("name", names_of("image_decoder."))
def test_the_diffusion_mlp_in_training(name, alter):
    altered, merged = small_model(SMALL), small_model(SMALL)
    alter(altered, name)
    merge(merged, name)
    tokens, cond = torch.randn(2, 5, SMALL.token_dim), torch.randn(2, 5, 64)
    timesteps = torch.tensor([[10.0], [700.0]])
    result, expected = (m.image_decoder(tokens, timesteps, cond) for m in (altered, merged))
    torch.testing.assert_close(result, expected)


class Quantised(torch.Tensor):
    """Weights of a kind of their own, as torchao's are."""


def quantise(model, name):
    layer = model.get_submodule(name)
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Quantised), requires_grad=False)


PARTS = {
    "the transformer": ("transformer", "image_encoder.blocks.0.attn.qkv"),
    "the VAE": ("vae.module", "decoder.mid_block.resnets.0.conv1"),
    "the text encoder": ("text_encoder.module", "layers.0.mlp.fc1"),
}


@pytest.mark.parametrize("alter", [wrap, quantise])
@pytest.mark.parametrize("part", PARTS)
def test_folders_that_would_not_open_are_not_written(part, alter, tiny_video_folder, tmp_path):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_video_folder)
    module, name = PARTS[part]
    alter(attrgetter(module)(pipe), name)
    with pytest.raises(nova.CheckpointError, match=f"^{part} has layers .*{name}.*Merge adapters"):
        pipe.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
