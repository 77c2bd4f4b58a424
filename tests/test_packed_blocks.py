"""The image encoder's blocks made of linear layers by oneDNN."""

import copy

import pytest
import torch
from small_models import SMALL, SMALL_ROTARY, sample, small_model
from test_onednn import needs_onednn, random
from torch import nn
from torch.nn import functional as F

from nova.packed_blocks import packed_blocks
from nova_kernels import onednn
from nova_kernels.onednn import PackedLinear


@pytest.fixture(autouse=True)
def packing_gains_something(monkeypatch):
    monkeypatch.setattr(onednn, "multiplies_faster", lambda: True)


def run(blocks, x):
    with torch.no_grad():
        for block in blocks:
            x = block(x)
    return x


@needs_onednn
def test_blocks_compute_the_same():
    blocks = small_model().image_encoder.blocks
    packed = packed_blocks(blocks)
    assert all(type(block.attn.proj) is PackedLinear for block in packed)
    x = random(2, 7, 64)
    torch.testing.assert_close(run(packed, x), run(blocks, x))
    queries = x[:, 2:5]
    with torch.no_grad():
        torch.testing.assert_close(packed[-1](x, queries=queries), blocks[-1](x, queries=queries))


@needs_onednn
@pytest.mark.parametrize("config", [SMALL, SMALL_ROTARY], ids=["absolute", "rotary"])
def test_sampling_packs_and_gives_the_same(config, monkeypatch):
    model = small_model(config)
    weights = copy.deepcopy(model.state_dict())
    calls = []
    forward = PackedLinear.forward
    monkeypatch.setattr(
        PackedLinear, "forward", lambda layer, x: calls.append(layer) or forward(layer, x)
    )
    packed = sample(model)
    assert calls
    monkeypatch.setattr(onednn, "can_pack", lambda weight: False)
    torch.testing.assert_close(packed, sample(model), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@needs_onednn
def test_a_run_sees_weights_that_changed_before_it():
    model = small_model()
    before = sample(model)
    with torch.no_grad():
        model.image_encoder.blocks[0].mlp.fc1.weight.mul_(1.5)
    changed = sample(model)
    assert not torch.allclose(before, changed)
    other = small_model()
    other.load_state_dict(model.state_dict())
    assert torch.equal(sample(other), changed)


@needs_onednn
def test_options_of_blocks_are_kept_and_small_tensors_shared():
    blocks = small_model().image_encoder.blocks
    blocks[0].attn.kernel_library = "math"
    packed = packed_blocks(blocks)
    assert packed[0].attn.kernel_library == "math" and packed[0] is not blocks[0]
    assert packed[0].norm1.weight is blocks[0].norm1.weight
    assert packed[-1].attn.qkv.weight is blocks[-1].attn.qkv.weight


@needs_onednn
def test_hooks_of_a_block_are_called():
    blocks, calls = small_model().image_encoder.blocks, []
    blocks[0].register_forward_hook(lambda *_: calls.append("block"))
    blocks[0].attn.register_forward_pre_hook(lambda *_: calls.append("attention"))
    packed = packed_blocks(blocks)
    assert packed[0] is not blocks[0]
    run(packed, random(1, 3, 64))
    assert calls == ["attention", "block"]


class Other(nn.Linear):
    """A layer that somebody put in the place of one of ours."""


class Quantised(torch.Tensor):
    """Weights that only their own layer knows to use."""


CHANGES = ["hook", "layer", "bias", "forward", "weights", "compiled", "backend", "float64"]


@pytest.mark.parametrize("change", CHANGES)
def test_blocks_that_somebody_changed_stay_as_they_are(change):
    model = small_model()
    blocks = model.image_encoder.blocks
    if change == "hook":
        blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)
    elif change == "layer":
        blocks[0].attn.proj = Other(64, 64)
    elif change == "bias":
        blocks[0].mlp.fc2 = nn.Linear(256, 64, bias=False)
    elif change == "forward":
        layer = blocks[0].mlp.fc1
        layer.forward = lambda x: F.linear(x, layer.weight, layer.bias) + 1
    elif change == "weights":
        layer = blocks[0].mlp.fc1
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised), False)
    elif change == "compiled":
        blocks[0].compile()
    elif change == "backend":
        blocks[0].backend = "reference"
    else:
        model.double()
    packed = packed_blocks(blocks)
    assert packed[0] is blocks[0]
    assert (packed[1] is blocks[1]) == (change == "float64" or not onednn.can_pack(random(1, 1)))


@needs_onednn
def test_a_wrapper_around_a_block_is_left_alone():
    model = small_model()
    expected = sample(model)
    wrapped = torch.compile(model.image_encoder.blocks[0], backend="eager", dynamic=True)
    names = list(model.state_dict())
    model.image_encoder.blocks[0] = wrapped
    torch.testing.assert_close(sample(model), expected, atol=1e-4, rtol=1e-4)
    assert packed_blocks(model.image_encoder.blocks)[0] is wrapped
    assert len(model.state_dict()) == len(names)
    torch.compiler.reset()
