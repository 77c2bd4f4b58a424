"""Kernels that do not start on a GPU are not chosen automatically."""

import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from kernel_testing import needs_triton
from torch._subclasses.fake_tensor import FakeTensorMode

from nova_kernels import startup
from nova_kernels.cuda_kernels import extension
from nova_kernels.dispatch import Op

OP = Op("rope3d", verified=frozenset({"triton"}))


@pytest.fixture
def start(monkeypatch):
    """What starting Triton's kernels does, on a card that is not there; counts its calls."""

    def starts(device):
        starts.count += 1
        if starts.error is not None:
            raise starts.error

    starts.count, starts.error = 0, None
    card = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setitem(startup.STARTS, "triton", starts)
    startup.failure_to_start.cache_clear()
    with FakeTensorMode():
        yield starts
    startup.failure_to_start.cache_clear()


@needs_triton
def test_torch_runs_where_kernels_do_not_start(start):
    start.error = RuntimeError("Failed to find C compiler.\nPlease specify via CC.")
    x = torch.empty(4, device="cuda")
    with pytest.warns(
        startup.StartupWarning, match="'triton' do not start on cuda:0.*find C compiler. "
    ):
        assert OP.choose("auto", x) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said
        assert OP.choose("auto", x) == "reference"
    assert start.count == 1
    assert OP.choose("triton", x) == "triton"  # by name: runs or raises


@needs_triton
def test_kernels_that_start_are_started_once(start):
    x = torch.empty(4, device="cuda")
    assert [OP.choose("auto", x), OP.choose("auto", x)] == ["triton", "triton"]
    assert start.count == 1


@needs_triton
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_short_memory_is_no_verdict(start, error):
    start.error = error
    x = torch.empty(4, device="cuda")
    with pytest.raises(RuntimeError, match="out of memory"):
        OP.choose("auto", x)
    start.error = None
    assert OP.choose("auto", x) == "triton"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", startup.STARTS)
def test_kernels_start(backend):
    if backend == "cuda" and extension.obstacle() is not None:
        pytest.skip(extension.obstacle())
    device = torch.device("cuda", torch.cuda.current_device())
    with FakeTensorMode():
        assert startup.failure_to_start.__wrapped__(backend, device) is None


@pytest.mark.skipif(extension.obstacle() is not None, reason="the CUDA extension is not built")
@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels start where there is a GPU")
def test_what_cuda_says_is_the_reason(monkeypatch):
    """The extension sees no GPU where it is too new for a driver that torch can use."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    startup.failure_to_start.cache_clear()
    with pytest.warns(startup.StartupWarning, match="denoise: CUDA says cudaError"):
        assert startup.failure_to_start("cuda", torch.device("cuda", 0)) is not None
    startup.failure_to_start.cache_clear()
