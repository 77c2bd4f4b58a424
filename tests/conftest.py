"""Shared fixtures: small checkpoint folders, a fresh compiler; skipping what needs a GPU."""

import importlib.util
import os
import sys
from pathlib import Path

# Small tensors gain nothing from threads, and threads that wait for each other on busy cores lose:
# torch's, NumPy's (in which Triton's interpreter computes), and those of every command that is run.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from failures import pytest_addoption, pytest_configure  # noqa: F401
from hypothesis import Phase, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
sys.path.insert(0, str(ROOT / "benchmarks"))


if not torch.cuda.is_available():
    # Triton reads it when kernels are defined; its interpreter runs them on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        from triton_interpreter import patch_interpreter

        patch_interpreter()
else:
    # A smaller example of a failure would take minutes: each has kernels to compile.
    settings.register_profile("gpu", phases=[phase for phase in Phase if phase is not Phase.shrink])
    settings.load_profile("gpu")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def fresh_compiler():
    """Nothing compiled by torch.compile before, nor left behind; its counters begin at zero."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def no_plots(monkeypatch):
    """Training that draws no plots: one takes longer than a few steps."""
    from nova.training import run

    monkeypatch.setattr(run, "plot_metrics", lambda folder: None)


def _tiny_folder(tmp_path_factory, size):
    from make_tiny_checkpoint import make_tiny_checkpoint

    return make_tiny_checkpoint(tmp_path_factory.mktemp(size) / "checkpoint", size)


@pytest.fixture(scope="session")
def tiny_video_folder(tmp_path_factory):
    """Checkpoint folder of a text-to-video model. Copy it before damaging it."""
    return _tiny_folder(tmp_path_factory, "tiny-video")


@pytest.fixture(scope="session")
def tiny_image_folder(tmp_path_factory):
    """Checkpoint folder of a text-to-image model. Copy it before damaging it."""
    return _tiny_folder(tmp_path_factory, "tiny-image")


@pytest.fixture(scope="session")
def tiny_class_folder(tmp_path_factory):
    """Checkpoint folder of a class-to-image model. Copy it before damaging it."""
    return _tiny_folder(tmp_path_factory, "tiny-class")
