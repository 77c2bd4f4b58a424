"""Builds the extensions, where that is possible; all metadata is in pyproject.toml.

NOVA_CUDA=auto (default)  with the CUDA extension if nvcc is found and the build succeeds
NOVA_CUDA=1               with the CUDA extension, or fail
NOVA_CUDA=0               without it
NOVA_CPP                  the same for the C++ extension (kernels for CPUs) and a C++ compiler
NOVA_CUDA_ARCHS           architectures in CMake's words, for example "80-real;90"
MAX_JOBS                  compilers that run at the same time
CUDACXX                   nvcc itself; CUDA_HOME or CUDA_PATH: its toolkit, before PATH
CXX                       the C++ compiler, if it is not the system's, and options of it

torch is never imported, and no GPU is looked for: the machine that builds often has neither.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
# Memory that one nvcc process may take on large kernels.
BYTES_PER_JOB = 4 * 2**30
# What CMakeLists.txt asks for.
OLDEST_CMAKE = "3.24"
# The first that compiles clusters of thread blocks.
OLDEST_NVCC = "12.0"
# After PATH, the folder of this Python's own tools: it need not be on PATH.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])


def say(message):
    """Prints one line; pip shows it with -v, or when the build fails."""
    print(f"nova-kernels: {message}", flush=True)


def which(name, path=None):
    """An absolute path, since CMake runs in another folder; None if there is no such program."""
    found = shutil.which(name, path=path)
    return found and os.path.abspath(found)


def find_nvcc():
    """Path of the CUDA compiler, from CUDACXX, CUDA_HOME or CUDA_PATH, or PATH; None if absent."""
    named = os.environ.get("CUDACXX")
    if named:  # no other: its kernels might need another driver
        return which(named)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        found = which("nvcc", path=str(Path(home) / "bin")) if home else None
        if found:
            return found
    return which("nvcc")


def find_cxx():
    """A C++ compiler, from CXX or by GCC's and Clang's usual names; None if absent.

    Options, as in CXX="ccache g++", follow the path behind semicolons, as CMake has them.
    """
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise SetupError(f"CXX={os.environ['CXX']} is no command: {error}") from None
    if named:
        path = which(named[0])
        return path and ";".join([path, *named[1:]])
    return which("c++") or which("g++") or which("clang++")


def numbers(version):
    return [int(number) for number in version.split(".")]


def find_tool(name, oldest="0"):
    """Path of a build tool that runs and is at least as new as `oldest`; None if there is none."""
    path = shutil.which(name, path=SEARCH_PATH)
    if path is None:
        return None
    # It may be found and not run: isolated builds hide the packages of the environment that they
    # are started from, and pip's cmake is a script that needs its package.
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    version = re.search(r"\d+(\.\d+)+", done.stdout)
    return path if version and numbers(version[0]) >= numbers(oldest) else None


def check_nvcc(path):
    """Raises RuntimeError for one that is too old; one that does not say is left to CMake."""
    done = subprocess.run([path, "--version"], capture_output=True, text=True)
    version = re.search(r"release (\d+\.\d+)", done.stdout)
    if version and numbers(version[1]) < numbers(OLDEST_NVCC):
        raise RuntimeError(f"{path} is of CUDA {version[1]}, and it takes {OLDEST_NVCC} or newer")


def find_cmake():
    """Path of a CMake that builds this project; None if there is none."""
    return find_tool("cmake", OLDEST_CMAKE)


class Part(NamedTuple):
    """An extension that may be left out.

    Attributes:
        title: what it is called.
        module: Python module that it becomes.
        variable: environment variable with its mode: auto, 1 or 0.
        source: folder with its CMakeLists.txt.
        language: of CMake.
        find_compiler, missing: how its compiler is found, and what to say if it is not.
    """

    title: str
    module: str
    variable: str
    source: Path
    language: str
    find_compiler: Callable[[], str | None]
    missing: str

    @property
    def mode(self):
        """The value of its variable, checked."""
        mode = os.environ.get(self.variable, "auto") or "auto"
        if mode not in ("auto", "1", "0"):
            raise SetupError(f"{self.variable} must be auto, 1 or 0, not {mode!r}")
        return mode

    @property
    def is_wanted(self):
        return self.mode == "1" or (self.mode == "auto" and self.find_compiler() is not None)

    def remove_in_place(self):
        """Deletes the module of an earlier editable install, which would pass for a new one."""
        *package, name = self.module.split(".")
        module = ROOT.joinpath(*package, name + sysconfig.get_config_var("EXT_SUFFIX"))
        module.unlink(missing_ok=True)


CUDA = Part(
    title="CUDA extension",
    module="nova_kernels._cuda",
    variable="NOVA_CUDA",
    source=ROOT,
    language="CUDA",
    find_compiler=find_nvcc,
    missing="no nvcc in CUDACXX, CUDA_HOME/bin or PATH",
)
CPP = Part(
    title="C++ extension",
    module="nova_kernels._cpp",
    variable="NOVA_CPP",
    source=ROOT / "csrc" / "cpp",
    language="CXX",
    find_compiler=find_cxx,
    missing="no C++ compiler in CXX or PATH",
)
PARTS = {part.module: part for part in (CUDA, CPP)}


def parallel_jobs():
    """MAX_JOBS, checked, or as many jobs as there are cores and memory for."""
    wanted = os.environ.get("MAX_JOBS")
    if wanted:
        if not (wanted.isdecimal() and int(wanted) >= 1):
            raise SetupError(f"MAX_JOBS must be a whole number of at least 1, not {wanted!r}")
        return int(wanted)
    jobs = os.cpu_count() or 1
    if "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        jobs = min(jobs, memory // BYTES_PER_JOB)
    return max(1, jobs)


class FreshBuild(build):
    """Takes nothing of an earlier build along: its modules would end in this one's wheel.

    An editable install runs the steps of a build without this one.
    """

    def run(self):
        # A folder that was named by an option may hold other files.
        is_default = self.build_lib in (self.build_purelib, self.build_platlib)
        has_begun = any(map(self.distribution.have_run.get, self.get_sub_commands()))
        if is_default and not has_begun:
            shutil.rmtree(ROOT / self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Builds the extensions with CMake.

    `run` is overridden as a whole because setuptools forgives an optional extension only the
    failures of its own compiler, not those of CMake.
    """

    def run(self):
        jobs = parallel_jobs()  # here, since `auto` forgives what goes wrong in building
        self.extensions = [e for e in self.extensions if self.build_part(PARTS[e.name], jobs)]
        if self.inplace:  # an editable install: the modules belong beside nova_kernels/*.py
            self.copy_extensions_to_source()

    def module_of(self, part):
        """Where a part's module is built."""
        return (ROOT / self.build_lib / self.get_ext_filename(part.module)).resolve()

    def build_part(self, part, jobs):
        """Whether it was built; a part that must be and cannot be is an error."""
        try:
            self.build_with_cmake(part, jobs)
        except Exception as error:  # whatever it is, `auto` goes on without the extension
            if part.mode == "1":
                raise SetupError(
                    f"{part.variable}=1, but the {part.title} failed: {error}"
                ) from error
            say(
                f"WARNING: installing without the {part.title}, its build failed: {error}."
                f" {part.variable}=1 makes this an error, {part.variable}=0 does not try."
            )
            if self.inplace:
                part.remove_in_place()
            return False
        return True

    def build_with_cmake(self, part, jobs):
        module = self.module_of(part)
        compiler = part.find_compiler()
        if compiler is None:
            raise RuntimeError(part.missing)
        if part is CUDA:
            check_nvcc(compiler)
        cmake = find_cmake()
        if cmake is None:
            raise RuntimeError(f"no cmake in PATH that runs and is {OLDEST_CMAKE} or newer")
        try:
            import pybind11
        except ImportError:
            raise RuntimeError("pybind11 is not installed") from None

        # Always anew: CMake remembers the paths of tools, and pip deletes its build environment.
        build_dir = (ROOT / self.build_temp / part.module).resolve()
        shutil.rmtree(build_dir, ignore_errors=True)
        configure = [
            cmake,
            f"-S{part.source}",
            f"-B{build_dir}",
            f"-DCMAKE_{part.language}_COMPILER={compiler}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        if part is CUDA and os.environ.get("NOVA_CUDA_ARCHS"):
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={os.environ['NOVA_CUDA_ARCHS']}")
        if find_tool("ninja"):
            configure.append("-GNinja")
        build = [cmake, "--build", str(build_dir), "--parallel", str(jobs)]
        environment = {**os.environ, "PATH": SEARCH_PATH}
        for step, command in (("configuring", configure), ("compiling", build)):
            status = subprocess.run(command, env=environment).returncode
            if status != 0:
                raise RuntimeError(f"{step} with CMake ended with status {status}")
        if not module.is_file():
            raise RuntimeError(f"CMake did not make {module.name}")
        say(f"built the {part.title} {module.name} with {compiler}")


def build_requirements(parts):
    """Python packages that building these needs: none for tools that are here already.

    Static requirements would make every machine without a compiler fetch (or, on a rare platform,
    compile) CMake for nothing, and a build without isolation ask for packages of tools that the
    system has.
    """
    # Setuptools asks alike for an sdist and a wheel; what a frontend asks it for is an argument of
    # the process that the frontend starts.
    if "get_requires_for_build_sdist" in sys.orig_argv:
        return []
    if not any(part.find_compiler() for part in parts):
        return []
    packages = ["pybind11"]
    if find_cmake() is None:
        packages.append(f"cmake>={OLDEST_CMAKE}")
    if find_tool("ninja") is None:
        packages.append("ninja")
    return packages


wanted = [part for part in PARTS.values() if part.is_wanted]

distribution = setup(
    # Where none is wanted the wheel is pure Python and serves every platform. One whose build fails
    # later leaves a wheel without it, of this platform.
    ext_modules=[Extension(part.module, sources=[]) for part in wanted],
    cmdclass={"build": FreshBuild, "build_ext": CMakeBuild},
    # setuptools reports these as needed for this build, and pip installs them into the isolated
    # build environment; it installs nothing with --no-build-isolation.
    setup_requires=build_requirements(wanted),
)
for part in PARTS.values():
    if part in wanted:
        continue
    if distribution.have_run.get("editable_wheel"):
        part.remove_in_place()
    if distribution.have_run.get("build_py"):
        reason = f"{part.variable}=0" if part.mode == "0" else part.missing
        say(f"built without the {part.title}: {reason}")
