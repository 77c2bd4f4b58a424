"""Compiles the CUDA kernels for the CPU (tests/cuda_emulator), for the tests of their source."""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "tests" / "cuda_emulator"
NAME = "cuda_emulator"

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux",
    reason="emulating CUDA needs g++ on Linux",
)


@cache
def emulated_extension() -> ModuleType:
    """A module with the launches of nova_kernels._cuda, which run on CPU tensors.

    Compiled once a process, in some ten seconds.
    """
    pybind11 = pytest.importorskip("pybind11")
    library = Path(mkdtemp(prefix="nova-emulator-")) / f"{NAME}.so"
    includes = [SOURCES, ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
    command += [f"-I{folder}" for folder in includes]
    command += [str(SOURCES / "binding.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    specification = importlib.util.spec_from_file_location(NAME, library)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
