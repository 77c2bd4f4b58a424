"""Linear layers and convolutions by oneDNN."""

import copy
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from nova.vae.layers import CausalConv3d
from nova_kernels import onednn
from nova_kernels.dispatch import VARIABLE
from nova_kernels.onednn import PackedLinear

needs_onednn = pytest.mark.skipif(
    not onednn.is_usable(torch.zeros(1, 1)), reason="torch has no oneDNN for this CPU"
)


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def library(request, monkeypatch):
    """Products in float32 by either."""
    monkeypatch.setattr(onednn, "multiplies_faster", lambda: request.param)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@needs_onednn
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("rows", [(1,), (2, 0), (2, 3), (7, 1, 5)])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (33, 100), (256, 768)])
def test_products_are_as_exact_as_torchs(library, inputs, outputs, rows, gelu):
    x, weight, bias = (
        random(*rows, inputs),
        random(outputs, inputs, seed=1),
        random(outputs, seed=2),
    )
    activation = F.gelu if gelu else lambda y: y
    expected = activation(F.linear(x.double(), weight.double(), bias.double()))
    allowed = 2 * (activation(F.linear(x, weight, bias)) - expected).norm() + 1e-6 * expected.norm()
    results = [PackedLinear(weight, bias, gelu=gelu)(x)]
    if not gelu:
        results.append(onednn.linear(x, weight, bias))
    for result in results:
        assert result.shape == expected.shape and result.dtype == torch.float32
        assert (result - expected).norm() <= allowed


@needs_onednn
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(
    ("dtype", "may_be_there"),
    [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False)],
)
def test_half_precision_is_rounded_once(library, monkeypatch, dtype, may_be_there, gelu):
    if not may_be_there:
        monkeypatch.setattr(onednn, "_has", lambda dtype: False)
    x, weight, bias = (
        tensor.to(dtype) for tensor in (random(2, 7, 33), random(100, 33, seed=1), random(100))
    )
    assert onednn.can_pack(weight)
    activation = F.gelu if gelu else lambda y: y
    expected = activation(F.linear(x.double(), weight.double(), bias.double()))
    results = [PackedLinear(weight, bias, gelu=gelu)(x)]
    if onednn.is_usable(weight) and not gelu:
        results.append(onednn.linear(x, weight, bias))
    eps = torch.finfo(dtype).eps
    for result in results:
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=eps, atol=1e-3)


@needs_onednn
def test_strided_inputs_and_weights(library):
    x, weight, bias = random(6, 5, 4), random(8, 3), random(3)
    layer = PackedLinear(weight.t()[:, ::2], bias)
    expected = F.linear(x.transpose(0, 1)[1:], weight.t()[:, ::2], bias)
    torch.testing.assert_close(layer(x.transpose(0, 1)[1:]), expected)
    weight, bias = random(3, 4), random(3, 2)[:, 1]
    torch.testing.assert_close(PackedLinear(weight, bias)(x), F.linear(x, weight, bias))
    torch.testing.assert_close(onednn.linear(x, weight, bias), F.linear(x, weight, bias))


@needs_onednn
def test_nan_is_not_hidden(library):
    x = random(3, 16)
    x[1, 5] = float("nan")
    result = PackedLinear(random(8, 16), random(8), gelu=True)(x)
    assert result[1].isnan().all() and result[[0, 2]].isfinite().all()


@needs_onednn
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(
    ("batch", "channels", "outputs", "kernel", "stride", "size"),
    [
        (1, 1, 1, 1, 1, (1, 1, 1)),
        (1, 16, 3, 3, 1, (4, 9, 7)),
        (2, 5, 33, (3, 1, 1), 1, (3, 2, 6)),
        (1, 16, 16, 3, 2, (5, 8, 8)),
        (3, 8, 8, (1, 3, 3), (1, 2, 2), (2, 5, 6)),
    ],
)
def test_convolutions_are_as_exact_as_torchs(
    batch, channels, outputs, kernel, stride, size, layout
):
    torch.manual_seed(0)
    conv = CausalConv3d(channels, outputs, kernel, stride, padding=1)
    x = random(batch, channels, *size)
    exact = copy.deepcopy(conv).double()(x.double())
    by_torch = conv(x)  # because of the gradient
    with torch.no_grad():
        result = conv(x.to(memory_format=layout))
    assert by_torch.requires_grad and result.shape == exact.shape
    assert (result - exact).norm() <= 2 * (by_torch - exact).norm() + 1e-6 * exact.norm()


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_convolutions_in_half_precision_are_rounded_once(monkeypatch, dtype):
    monkeypatch.setattr(onednn, "_has", lambda dtype: False)
    torch.manual_seed(0)
    conv, x = CausalConv3d(16, 16, 3, padding=1).to(dtype), random(1, 16, 3, 6, 6).to(dtype)
    exact = copy.deepcopy(conv).double()(x.double())
    with torch.no_grad():
        result = conv(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("has_half", [False, True])
def test_whose_convolutions_are_computed(monkeypatch, has_half):
    """oneDNN's without a gradient, unless it has the half precision or a backend is named."""

    def refuse(*arguments):
        raise AssertionError("called")

    monkeypatch.setattr(onednn, "conv3d", refuse)
    monkeypatch.setattr(onednn, "_has", lambda dtype: has_half)
    conv, x = CausalConv3d(4, 4, 3, padding=1), random(1, 4, 2, 3, 3)
    conv(x).sum().backward()
    with torch.no_grad():
        with pytest.raises(AssertionError, match="called"):
            conv(x)
        with nullcontext() if has_half else pytest.raises(AssertionError, match="called"):
            conv.bfloat16()(x.bfloat16())
        monkeypatch.setenv(VARIABLE, "reference")
        conv.float()(x)


@pytest.mark.parametrize(
    "capability, intel, has_mkl, threads, expected",
    [
        ("AVX512", False, True, True, True),
        ("AVX512", False, True, False, False),
        ("AVX512", True, True, True, False),
        ("AVX512", True, False, True, True),
        ("AVX2", False, True, True, False),
        ("DEFAULT", False, True, True, False),
        ("AVX2", False, False, True, True),
    ],
)
def test_whose_products_are_faster(monkeypatch, capability, intel, has_mkl, threads, expected):
    monkeypatch.setattr(onednn, "_is_from_intel", lambda: intel)
    monkeypatch.setattr(onednn, "gives_all_threads", lambda: threads)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    assert onednn.multiplies_faster.__wrapped__() == expected


@needs_onednn
def test_float32_is_packed_where_that_gains_something(library):
    weight = torch.zeros(1, 1)
    assert onednn.can_pack(weight) == onednn.multiplies_faster() and onednn.is_usable(weight)
    assert onednn.can_pack(weight.bfloat16())


@needs_onednn
def test_what_is_packed_is_a_copy(library):
    weight, x = random(3, 4), random(2, 4)
    layer = PackedLinear(weight, torch.zeros(3))
    before = layer(x)
    weight.mul_(2)
    assert torch.equal(layer(x), before)


def test_what_is_not_usable(monkeypatch):
    elsewhere, half = torch.zeros(2, 2, device="meta"), torch.zeros(2, 2, dtype=torch.float16)
    for check in (onednn.is_usable, onednn.can_pack):
        assert not check(elsewhere)
    monkeypatch.setattr(onednn, "_has", lambda dtype: True)
    assert not onednn.can_pack(half) and not onednn.is_usable(half)
    assert not onednn.is_usable(half.bfloat16())


PRODUCTS = """
import torch
from nova_kernels import onednn
from nova_kernels.openmp import gives_all_threads

torch.set_num_threads(4)
x, weight = torch.randn(512, 1024), torch.randn(1024, 1024)
expected = x.double() @ weight.double().T
for _ in range(3):
    product = onednn.linear(x, weight, torch.zeros(1024))
    assert (product - expected).norm() < 1e-5 * expected.norm()
print(gives_all_threads())
"""


@needs_onednn
@pytest.mark.parametrize(
    "variables", [{}, {"OMP_THREAD_LIMIT": "2"}, {"OMP_DYNAMIC": "TRUE", "OMP_THREAD_LIMIT": "2"}]
)
def test_with_fewer_threads_than_torch_asks_for(variables):
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", PRODUCTS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(not variables)


def test_torchs_switch_turns_it_off(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not onednn.is_usable(torch.zeros(1, 1)) and not onednn.can_pack(torch.zeros(1, 1))
