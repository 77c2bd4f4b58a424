"""Builds the CUDA extension, where that is possible; all metadata is in pyproject.toml.

NOVA_CUDA=auto (default)  with the CUDA extension if nvcc is found and the build succeeds
NOVA_CUDA=1               with the CUDA extension, or fail
NOVA_CUDA=0               without it
NOVA_CUDA_ARCHS           architectures in CMake's words, for example "80-real;90"
MAX_JOBS                  compilers that run at the same time
CUDACXX, CUDA_HOME        where nvcc is, if it is not on PATH

torch is never imported, and no GPU is looked for: the machine that builds often has neither.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
EXTENSION = "nova_kernels._cuda"
# Memory that one nvcc process may take on large kernels.
BYTES_PER_JOB = 4 * 2**30


def say(message):
    """Prints one line; pip shows it with -v, or when the build fails."""
    print(f"nova-kernels: {message}", flush=True)


def cuda_mode():
    """The value of NOVA_CUDA, checked."""
    mode = os.environ.get("NOVA_CUDA", "auto") or "auto"
    if mode not in ("auto", "1", "0"):
        raise SetupError(f"NOVA_CUDA must be auto, 1 or 0, not {mode!r}")
    return mode


def find_nvcc():
    """Path of the CUDA compiler, from CUDACXX, CUDA_HOME or CUDA_PATH, or PATH; None if absent."""
    named = os.environ.get("CUDACXX")
    if named and shutil.which(named):
        return shutil.which(named)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and shutil.which("nvcc", path=str(Path(home) / "bin")):
            return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc")


def parallel_jobs():
    """MAX_JOBS, or as many jobs as there are cores and memory for."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    jobs = os.cpu_count() or 1
    if "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        jobs = min(jobs, memory // BYTES_PER_JOB)
    return max(1, jobs)


def remove_module_in_place():
    """Deletes the module of an earlier editable install, which would pass for the new source's."""
    *package, name = EXTENSION.split(".")
    module = ROOT.joinpath(*package, name + sysconfig.get_config_var("EXT_SUFFIX"))
    module.unlink(missing_ok=True)


class CMakeBuild(build_ext):
    """Builds the one extension with CMake.

    `run` is overridden as a whole because setuptools forgives an optional extension only the
    failures of its own compiler, not those of CMake.
    """

    def run(self):
        try:
            self.build_with_cmake()
        except Exception as error:  # whatever it is, `auto` goes on without the extension
            if cuda_mode() == "1":
                raise SetupError(f"NOVA_CUDA=1, but the CUDA extension failed: {error}") from error
            say(
                f"WARNING: installing without the CUDA extension, its build failed: {error}."
                " NOVA_CUDA=1 makes this an error, NOVA_CUDA=0 does not try."
            )
            self.extensions = []  # setuptools must not look for its file
            if self.inplace:
                remove_module_in_place()
        else:
            if self.inplace:  # an editable install: the module belongs beside nova_kernels/*.py
                self.copy_extensions_to_source()

    def build_with_cmake(self):
        module = (ROOT / self.build_lib / self.get_ext_filename(EXTENSION)).resolve()
        module.unlink(missing_ok=True)  # an earlier build's must not end in this one's wheel
        nvcc = find_nvcc()
        if nvcc is None:
            raise RuntimeError("no nvcc in CUDACXX, CUDA_HOME/bin or PATH")
        # After PATH, the folder of this Python's own tools: it need not be on PATH.
        environment = dict(os.environ)
        search_path = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
        environment["PATH"] = search_path
        cmake = shutil.which("cmake", path=search_path)
        if cmake is None:
            raise RuntimeError("cmake is not installed")
        try:
            import pybind11
        except ImportError:
            raise RuntimeError("pybind11 is not installed") from None

        # Always anew: CMake remembers the paths of tools, and pip deletes its build environment.
        build_dir = (ROOT / self.build_temp / "cmake").resolve()
        shutil.rmtree(build_dir, ignore_errors=True)
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{build_dir}",
            f"-DCMAKE_CUDA_COMPILER={nvcc}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        if os.environ.get("NOVA_CUDA_ARCHS"):
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={os.environ['NOVA_CUDA_ARCHS']}")
        if shutil.which("ninja", path=search_path):
            configure.append("-GNinja")
        build = [cmake, "--build", str(build_dir), "--parallel", str(parallel_jobs())]
        for step, command in (("configuring", configure), ("compiling", build)):
            status = subprocess.run(command, env=environment).returncode
            if status != 0:
                raise RuntimeError(f"{step} with CMake ended with status {status}")
        if not module.is_file():
            raise RuntimeError(f"CMake did not make {module.name}")
        say(f"built the CUDA extension {module.name} with {nvcc}")


mode = cuda_mode()
nvcc_found = find_nvcc() is not None
with_cuda = mode == "1" or (mode == "auto" and nvcc_found)

distribution = setup(
    # Without an extension the wheel is pure Python and serves every platform.
    ext_modules=[Extension(EXTENSION, sources=[])] if with_cuda else [],
    cmdclass={"build_ext": CMakeBuild},
    # setuptools reports these as needed for this build, and pip installs them into the isolated
    # build environment; it installs nothing with --no-build-isolation. Static requirements would
    # make every machine without CUDA fetch (or, on a rare platform, compile) CMake for nothing.
    setup_requires=["cmake>=3.24", "ninja", "pybind11"] if with_cuda and nvcc_found else [],
)
if not with_cuda:
    if distribution.have_run.get("editable_wheel"):
        remove_module_in_place()
    if distribution.have_run.get("build_py"):
        reason = "NOVA_CUDA=0" if mode == "0" else "no nvcc in CUDACXX, CUDA_HOME/bin or PATH"
        say(f"built without the CUDA extension: {reason}")
