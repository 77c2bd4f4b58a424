"""Compiles the CUDA kernels for the CPU (tests/cuda_emulator), for the tests of their source."""

import ctypes
import hashlib
import importlib.util
import mmap
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "tests" / "cuda_emulator"
BUILT = ROOT / "build" / "cuda_emulator"
NAME = "cuda_emulator"
ALIGNMENT = 16  # of addresses, for the widest accesses

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux",
    reason="emulating CUDA needs g++ on Linux",
)


@cache
def emulated_extension() -> ModuleType:
    """A module with the launches of nova_kernels._cuda, which run on CPU tensors.

    Compiled in some ten seconds, and kept for other processes and the next run of the tests.
    """
    pybind11 = pytest.importorskip("pybind11")
    includes = [SOURCES, ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
    command += [f"-I{folder}" for folder in includes] + [str(SOURCES / "binding.cpp")]
    library = BUILT / _state_of(command) / f"{NAME}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        # Another process may be at it as well: the finished file takes its place at once.
        unfinished = library.with_name(f"{os.getpid()}.so")
        done = subprocess.run([*command, "-o", unfinished], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        unfinished.replace(library)
    specification = importlib.util.spec_from_file_location(NAME, library)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _state_of(command: list[str]) -> str:
    """A name for what compiling comes from: the command, the compiler, this Python, all sources."""
    version = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    state = hashlib.sha256(f"{command} {sys.version}".encode() + version)
    for folder in (SOURCES, ROOT / "csrc"):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            state.update(str(path).encode() + path.read_bytes())
    return state.hexdigest()[:16]


def guarded(tensor: Tensor) -> Tensor:
    """A contiguous copy before a page that no one may touch: who does ends the process."""
    page, nobody = mmap.PAGESIZE, 0  # mprotect's PROT_NONE
    size = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    guard = -(-size // page) * page
    memory = torch.frombuffer(mmap.mmap(-1, guard + page), dtype=torch.uint8)
    address = ctypes.c_void_p(memory.data_ptr() + guard)
    assert ctypes.CDLL(None).mprotect(address, ctypes.c_size_t(page), nobody) == 0
    copy = memory[guard - size :][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


class GuardedMemory(TorchFunctionMode):
    """Inside, new and contiguous tensors, thus all that a launch gets, are `guarded`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = (torch.empty_like, Tensor.new_empty, Tensor.contiguous)
        return guarded(result) if function in made else result
