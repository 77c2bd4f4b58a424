"""Libraries in place of torch's attention and of linear_gelu; packages for a GPU by stand-ins."""

import copy

import numpy as np
import pytest
import torch
from kernel_testing import DEVICE, assert_as_exact_as_torch, in_float64, randn
from library_stand_ins import FLASH_MODULES, stand_in
from small_models import SMALL, sample, small_model
from test_engine import counted_graphs
from torch.nn import functional as F

from nova.layers import Mlp
from nova.libraries import TORCH, attention, linear_gelu, packages
from nova.libraries.attention import attend
from nova.tuning.choices import choices_of
from nova_kernels import onednn
from nova_kernels.errors import BackendError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ALL = [*FLASH_MODULES, packages.QUACK]


def qkv(queries, keys, dtype=torch.float32, device=CPU):
    return [torch.randn(2, 3, n, 32, device=device).to(dtype) for n in (queries, keys, keys)]


def exact_attention(q, k, v):
    return (q.double() @ k.double().mT / q.shape[-1] ** 0.5).softmax(-1) @ v.double()


# What is there -----------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ALL)
def test_what_is_installed(monkeypatch, package):
    monkeypatch.setattr(packages, "version_of", lambda name: None)
    without = attention.installed_libraries(GPU), linear_gelu.installed_libraries(GPU)
    assert package not in without[0] and without[1] == (TORCH,)
    stand_in(monkeypatch, package)
    assert packages.installed_packages() == {package: "1.0"}
    of_attention, of_mlp = (m.installed_libraries(GPU) for m in (attention, linear_gelu))
    assert set(of_attention) | set(of_mlp) == {*without[0], package}
    assert (package in of_mlp) == (package == packages.QUACK)
    for module in (attention, linear_gelu):
        assert package not in module.installed_libraries(CPU)


def test_versions():
    # Not torch: its own may name a build (+cu130) that its package's leaves out.
    assert packages.version_of("numpy") == np.__version__
    assert packages.version_of("no-such-package") is None


# Attention ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [*attention.installed_libraries(CPU), "triton"])
@pytest.mark.parametrize("queries, keys", [(5, 5), (3, 20)])
def test_attention(library, queries, keys):
    q, k, v = qkv(queries, keys, device=DEVICE if library == "triton" else CPU)
    expected = exact_attention(q, k, v).float()
    torch.testing.assert_close(attend(q, k, v, library), expected)


@pytest.mark.parametrize("package", FLASH_MODULES)
def test_attention_by_packages(monkeypatch, package):
    calls = stand_in(monkeypatch, package)
    q, k, v = qkv(3, 20, torch.float16)
    close = {"atol": 2e-3, "rtol": 2e-3}
    torch.testing.assert_close(attend(q, k, v, package).double(), exact_attention(q, k, v), **close)
    assert calls == [(3, 20)]
    with pytest.raises(BackendError, match="float16 and bfloat16, not torch.float32"):
        attend(q.float(), k.float(), v.float(), package)
    compiled = torch.compile(lambda *t: attend(*t, package) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v, package) + 1)


def test_a_library_that_cannot_says_what_it_was_given():
    q = torch.randn(1, 2, 4, 32)
    with pytest.raises(BackendError, match=r"CUDNN_ATTENTION cannot take torch.float32.*on cpu"):
        attend(q, q, q, "cudnn")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_on_a_gpu(dtype):
    q, k, v = (torch.randn(2, 4, n, 64, device="cuda", dtype=dtype) for n in (100, 357, 357))
    for library in attention.installed_libraries(q.device):
        torch.testing.assert_close(
            attend(q, k, v, library).double(),
            exact_attention(q, k, v),
            atol=2e-2,
            rtol=2e-2,
            msg=library,
        )


# The first layer of an MLP -----------------------------------------------------------------------


def layer(rows, inputs, outputs, dtype=torch.float16):
    x, weight = randn(*rows, inputs, dtype=dtype), randn(outputs, inputs, dtype=dtype, seed=1)
    return x, weight * inputs**-0.5, randn(outputs, dtype=dtype, seed=2)


def assert_linear_gelu_is_right(x, weight, bias):
    result = linear_gelu.linear_gelu(x, weight, bias, packages.QUACK)
    exact = F.gelu(F.linear(*in_float64(x, weight, bias)))
    assert_as_exact_as_torch(result, F.gelu(F.linear(x, weight, bias)), exact)


@pytest.mark.parametrize("rows", [(1,), (2, 7), (3, 0)])
def test_linear_gelu(monkeypatch, rows):
    calls = stand_in(monkeypatch, packages.QUACK)
    x, weight, bias = layer(rows, 16, 40)
    assert_linear_gelu_is_right(x, weight, bias)
    assert [rows for rows, _ in calls] == [x.numel() // 16]
    assert not calls[0][1]  # the product by itself is not kept


def test_linear_gelu_of_strided_tensors(monkeypatch):
    stand_in(monkeypatch, packages.QUACK)
    x, weight, bias = layer((4, 6), 16, 40)
    columns, every_other = weight.t().contiguous().t(), torch.stack([bias, bias], 1)[:, 0]
    assert_linear_gelu_is_right(x.transpose(0, 1)[:, 1:], columns, every_other)


def test_linear_gelu_that_the_package_does_not_take(monkeypatch):
    calls = stand_in(monkeypatch, packages.QUACK)
    for message, tensors in (
        ("float16 or bfloat16, not torch.float32", layer((2,), 16, 40, torch.float32)),
        ("one dtype", (*layer((2,), 16, 40)[:2], torch.zeros(40))),
        ("multiples of 8, not 12 to 40", layer((2,), 12, 40)),
        ("multiples of 8, not 16 to 41", layer((2,), 16, 41)),
    ):
        with pytest.raises(BackendError, match=message):
            linear_gelu.linear_gelu(*tensors, packages.QUACK)
    assert not calls


@pytest.mark.gpu
@pytest.mark.skipif(packages.version_of(packages.QUACK) is None, reason="needs quack-kernels")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [(1,), (37,), (2, 1800)])
def test_linear_gelu_on_a_gpu(rows, dtype):
    assert_linear_gelu_is_right(*layer(rows, 1024, 4096, dtype))


def test_an_mlp_runs_it_for_sampling_alone(monkeypatch):
    """Not where a gradient is wanted, under torch.compile, or past a layer's hooks."""
    calls = stand_in(monkeypatch, packages.QUACK)
    mlp, x = Mlp(16, 64).half(), torch.randn(5, 16).half()
    expected = mlp(x)
    mlp.kernel_library = packages.QUACK

    def number_of_calls(run):
        before = len(calls)
        torch.testing.assert_close(run(), expected, atol=2e-3, rtol=2e-3)
        return len(calls) - before

    assert number_of_calls(lambda: mlp(x)) == 0
    with torch.no_grad():
        assert number_of_calls(lambda: mlp(x)) == 1
        compiled = torch.compile(copy.deepcopy(mlp), backend="eager", fullgraph=True)
        assert number_of_calls(lambda: compiled(x)) == 0
        hook = mlp.fc1.register_forward_hook(lambda *_: None)
        assert number_of_calls(lambda: mlp(x)) == 0
        hook.remove()
        assert number_of_calls(lambda: mlp(x)) == 1


# A model -----------------------------------------------------------------------------------------


def test_graphs_are_recorded_anew_for_another_library(monkeypatch):
    calls = stand_in(monkeypatch, packages.QUACK)
    # As on a GPU; on a CPU sampling packs weights, and runs no `Mlp`.
    monkeypatch.setattr(onednn, "can_pack", lambda weight: False)
    model, (graphs, made) = small_model().to(torch.bfloat16), counted_graphs()
    by_torch = sample(model, graphs=graphs)
    before = len(made)
    for block in model.image_encoder.blocks:
        block.mlp.kernel_library = packages.QUACK
    assert torch.equal(sample(model, graphs=graphs), sample(model)) and calls
    assert len(made) == 2 * before and graphs.failure is None
    torch.testing.assert_close(sample(model), by_torch, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("package", ALL)
def test_packages_are_tried_apart_before_they_are_measured(monkeypatch, package):
    stand_in(monkeypatch, package)
    for module in (attention, linear_gelu):
        libraries = (*module.installed_libraries(CPU), *set(module.LIBRARIES) & {package})
        monkeypatch.setattr(module, "installed_libraries", lambda device, found=libraries: found)
    model = small_model(SMALL)
    with_it = [choice for choice in choices_of(model, CPU) if package in choice.candidates]
    name = "library of linear_gelu" if package == packages.QUACK else "attention"
    assert [choice.name for choice in with_it] == [name]
    (choice,) = with_it
    assert package in choice.unproven and choice.candidates[0] == TORCH not in choice.unproven
    part = model.image_encoder.blocks[-1]
    part = part.mlp if package == packages.QUACK else part.attn
    choice.set(package)
    assert part.kernel_library == package
    choice.undo()
    assert part.kernel_library == TORCH
    model.set_backend("reference")
    assert not any(choice.name == "library of linear_gelu" for choice in choices_of(model, CPU))
