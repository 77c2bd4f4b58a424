"""What block-causal attention is timed against computes the same, packages by stand-ins."""

import pytest
import torch
from kernel_cases import attention
from library_stand_ins import FLASH_MODULES, stand_in
from op_times import gate

from nova.libraries import packages
from nova_kernels.block_layout import BlockLayout

CPU = torch.device("cpu")
LENGTHS = [7, 4, 5]


@pytest.fixture(params=FLASH_MODULES)
def package(request):
    return request.param


def small_case(prefix=0):
    return attention("small", LENGTHS, heads=2, head_dim=32, batch=2, prefix=prefix)


def reference_of(case):
    return lambda *inputs: case.run("reference", *inputs)


@pytest.mark.parametrize("prefix", [0, 3])
def test_packages_equal_the_reference_on_the_visible_pairs_alone(monkeypatch, package, prefix):
    pairs_computed = stand_in(monkeypatch, package)
    case = small_case(prefix)
    name = f"{package} by block"
    calls = {"reference": reference_of(case), name: case.peers[name]}
    # Results and all gradients are as exact as the reference's.
    assert gate(case, calls, CPU, torch.float16) == {}
    assert pairs_computed == [(7, prefix + 7), (4, prefix + 11), (5, prefix + 16)]
    visible = BlockLayout.of(LENGTHS).visible_pairs() + prefix * sum(LENGTHS)
    assert sum(queries * keys for queries, keys in pairs_computed) == visible


def test_packages_are_refused_in_float32(monkeypatch, package):
    pairs_computed = stand_in(monkeypatch, package)
    case = small_case()
    name = f"{package} by block"
    calls = {"reference": reference_of(case), name: case.peers[name]}
    refused = gate(case, calls, CPU, torch.float32)
    assert "float32" in refused[name] and not refused[name].startswith("wrong")
    assert pairs_computed == []


def test_without_packages_there_are_no_such_peers(monkeypatch):
    monkeypatch.setattr(packages, "version_of", lambda name: None)
    assert not any("flash-attn" in name for name in small_case().peers)


@pytest.mark.parametrize("prefix", [0, 3])
def test_torchs_own_peers_are_right_or_refused(prefix):
    case = small_case(prefix)
    names = ["SDPA with a mask", "SDPA by block, flash", "SDPA by block, cuDNN"]
    calls = {"reference": reference_of(case), **{name: case.peers[name] for name in names}}
    refused = gate(case, calls, CPU, torch.float16)
    # cuDNN has no kernel for a CPU.
    assert list(refused) == ["SDPA by block, cuDNN"]
    assert not refused["SDPA by block, cuDNN"].startswith("wrong")
