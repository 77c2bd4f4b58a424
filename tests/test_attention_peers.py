"""What block-causal attention is timed against computes the same, flash-attn by a stand-in."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from kernel_cases import attention
from kernels import gate
from torch.nn import functional as F

from nova_kernels.block_layout import BlockLayout

CPU = torch.device("cpu")
LENGTHS = [7, 4, 5]
PEER = "flash-attn by block"


@pytest.fixture
def pairs_computed(monkeypatch):
    """flash-attn is there, made of torch; (queries, keys) of every call are in the list."""
    calls = []

    def flash_attn_func(q, k, v):
        """(batch, tokens, heads, head_dim) each, as flash-attn's own."""
        calls.append((q.shape[1], k.shape[1]))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    module = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


def small_case(prefix=0):
    return attention("small", LENGTHS, heads=2, head_dim=32, batch=2, prefix=prefix)


def reference_of(case):
    return lambda *inputs: case.run("reference", *inputs)


@pytest.mark.parametrize("prefix", [0, 3])
def test_flash_attn_equals_the_reference_on_the_visible_pairs_alone(pairs_computed, prefix):
    case = small_case(prefix)
    calls = {"reference": reference_of(case), PEER: case.peers[PEER]}
    # Results and all gradients are as exact as the reference's.
    assert gate(case, calls, CPU, torch.float16) == {}
    assert pairs_computed == [(7, prefix + 7), (4, prefix + 11), (5, prefix + 16)]
    visible = BlockLayout.of(LENGTHS).visible_pairs() + prefix * sum(LENGTHS)
    assert sum(queries * keys for queries, keys in pairs_computed) == visible


def test_flash_attn_is_refused_in_float32(pairs_computed):
    case = small_case()
    calls = {"reference": reference_of(case), PEER: case.peers[PEER]}
    refused = gate(case, calls, CPU, torch.float32)
    assert "float32" in refused[PEER] and not refused[PEER].startswith("wrong")
    assert pairs_computed == []


def test_without_flash_attn_there_is_no_such_peer(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert PEER not in small_case().peers


@pytest.mark.parametrize("prefix", [0, 3])
def test_torchs_own_peers_are_right_or_refused(prefix):
    case = small_case(prefix)
    names = ["SDPA with a mask", "SDPA by block, flash", "SDPA by block, cuDNN"]
    calls = {"reference": reference_of(case), **{name: case.peers[name] for name in names}}
    refused = gate(case, calls, CPU, torch.float16)
    # cuDNN has no kernel for a CPU.
    assert list(refused) == ["SDPA by block, cuDNN"]
    assert not refused["SDPA by block, cuDNN"].startswith("wrong")
