"""What is built and shipped, and what is said where that is not possible. Needs no nvcc.

Every build runs in a copy, with this environment's own build tools.
"""

import ast
import shutil
import sys
import sysconfig
import tarfile
import zipfile

import pytest
from builds import PACKAGES, ROOT, build_info_of, build_wheel, make_checkout, run

import nova.training
import nova_kernels

needs_cxx = pytest.mark.skipif(
    not (shutil.which("c++") and shutil.which("cmake")), reason="needs a C++ compiler and cmake"
)


@pytest.fixture
def no_compiler(tmp_path):
    """Environment variables under which no compiler can be found."""
    empty = tmp_path / "empty-path"
    empty.mkdir()
    return {"PATH": str(empty), "CUDACXX": None, "CUDA_HOME": None, "CUDA_PATH": None, "CXX": None}


@pytest.fixture
def checkout(tmp_path):
    return make_checkout(tmp_path)


def test_setup_py_imports_no_torch():
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert "setuptools" in imported
    assert not imported & {"torch", "triton", "nova", "nova_kernels"}


def test_the_version_is_one():
    assert f'version = "{nova.__version__}"' in (ROOT / "pyproject.toml").read_text().splitlines()


@pytest.mark.parametrize("module", [nova, nova.training, nova_kernels])
def test_public_names_are_listed_before_they_are_imported(module):
    assert set(module.__all__) <= set(dir(module))


def test_importing_nova_kernels_imports_neither_torch_nor_triton():
    code = (
        "import sys, nova_kernels, nova_kernels.build as module;"
        "module.build_info(); module.devices();"
        "print(sorted({'torch', 'triton'} & set(sys.modules)))"
    )
    process = run("-c", code, cwd=ROOT)
    assert process.stdout.strip() == "[]"


def test_sdist_carries_what_a_wheel_is_built_from(checkout, tmp_path, no_compiler):
    # A binary of this machine must go into neither.
    (checkout / "nova_kernels" / "_cuda.leftover.so").write_bytes(b"")
    build_sdist = ("-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path / "dist")
    process = run(*build_sdist, cwd=checkout, **no_compiler)
    assert process.returncode == 0, process.stdout
    (sdist,) = (tmp_path / "dist").glob("nova_kernels-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    sources = {str(path.relative_to(ROOT)) for path in files}
    modules = {
        str(path.relative_to(checkout))
        for package in PACKAGES
        for path in (checkout / package).rglob("*.py")
    }
    assert sources | modules | {"CMakeLists.txt", "LICENSE", "setup.py"} <= names
    assert not [name for name in names if name.endswith(".so")]

    (unpacked,) = (tmp_path / "unpacked").iterdir()
    process, wheel = build_wheel(unpacked, tmp_path, NOVA_CUDA="0", **no_compiler)
    assert process.returncode == 0, process.stdout
    assert "built without the CUDA extension: NOVA_CUDA=0" in process.stdout
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert modules <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.fixture
def tools(tmp_path):
    """Environment variables under which nothing is on PATH but a compiler, CMake and Ninja.

    Called with what `cmake --version` says; None: CMake and Ninja do not run, as tools of a hidden
    environment.
    """

    def make(version):
        folder = tmp_path / "tools"
        folder.mkdir()
        says = "exit 1" if version is None else f"echo cmake version {version}"
        for name in ("c++", "cmake", "ninja"):
            (folder / name).write_text(f"#!/bin/sh\n{says}\n")
            (folder / name).chmod(0o755)
        return {"PATH": str(folder), "CXX": None, "NOVA_CUDA": "0", "NOVA_CPP": "auto"}

    return make


@pytest.mark.skipif(sys.platform == "win32", reason="the tools are shell scripts")
@pytest.mark.parametrize(
    "version, packages",
    [
        ("3.24.0", ["pybind11"]),
        ("4.1.2", ["pybind11"]),
        ("3.20.6", ["pybind11", "cmake>=3.24"]),
        (None, ["pybind11", "cmake>=3.24", "ninja"]),
    ],
)
def test_packages_are_asked_for_in_place_of_tools_that_do_not_do(
    checkout, tools, version, packages
):
    hook = "from setuptools.build_meta import get_requires_for_build_wheel as get; print(get())"
    process = run("-c", hook, cwd=checkout, **tools(version))
    assert process.stdout.splitlines()[-1] == str(packages)


@pytest.mark.skipif(sys.platform == "win32", reason="the tools are shell scripts")
def test_an_sdist_needs_no_tools(checkout, tools, tmp_path):
    build_sdist = ("-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path / "dist")
    process = run(*build_sdist, cwd=checkout, **tools(None))
    assert process.returncode == 0, process.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="the tools are shell scripts")
@pytest.mark.parametrize("jobs", ["abc", "0", "-1"])
def test_a_number_of_jobs_that_is_none_is_an_error_in_every_mode(checkout, tools, tmp_path, jobs):
    process, wheel = build_wheel(checkout, tmp_path, **tools("3.24.0"), MAX_JOBS=jobs)
    assert process.returncode != 0 and wheel is None
    assert f"MAX_JOBS must be a whole number of at least 1, not '{jobs}'" in process.stdout


def test_auto_without_compilers_is_pure_python(checkout, tmp_path, no_compiler):
    # What an earlier build in this folder left must not get into the wheel.
    left = checkout / "build" / "lib" / "nova_kernels" / "removed.py"
    left.parent.mkdir(parents=True)
    left.write_text("")
    modes = {"NOVA_CUDA": "auto", "NOVA_CPP": "auto"}
    process, wheel = build_wheel(checkout, tmp_path, **modes, **no_compiler)
    assert process.returncode == 0, process.stdout
    assert process.stdout.count("built without the CUDA extension: no nvcc in") == 1
    assert process.stdout.count("built without the C++ extension: no C++ compiler in") == 1
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "nova_kernels/removed.py" not in zipfile.ZipFile(wheel).namelist()
    assert "'cuda_extension': False, 'error': 'not built" in build_info_of(wheel, tmp_path / "new")


def test_strict_without_nvcc_fails_and_says_why(checkout, tmp_path, no_compiler):
    process, wheel = build_wheel(checkout, tmp_path, NOVA_CUDA="1", **no_compiler)
    assert process.returncode != 0 and wheel is None
    assert "NOVA_CUDA=1, but the CUDA extension failed: no nvcc in CUDACXX" in process.stdout


def test_strict_without_a_cpp_compiler_fails_and_says_why(checkout, tmp_path, no_compiler):
    modes = {"NOVA_CUDA": "0", "NOVA_CPP": "1"}
    process, wheel = build_wheel(checkout, tmp_path, **modes, **no_compiler)
    assert process.returncode != 0 and wheel is None
    assert "NOVA_CPP=1, but the C++ extension failed: no C++ compiler in CXX" in process.stdout


def test_unknown_mode_is_refused(checkout, tmp_path):
    process, wheel = build_wheel(checkout, tmp_path, NOVA_CUDA="yes")
    assert process.returncode != 0 and wheel is None
    assert "NOVA_CUDA must be auto, 1 or 0, not 'yes'" in process.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="the broken compiler is a shell script")
@pytest.mark.parametrize("mode", ["auto", "1"])
def test_broken_nvcc(checkout, tmp_path, mode):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    process, wheel = build_wheel(checkout, tmp_path, NOVA_CUDA=mode, CUDACXX=str(broken))
    if mode == "1":
        assert process.returncode != 0 and wheel is None
        assert "NOVA_CUDA=1, but the CUDA extension failed: " in process.stdout
    else:
        assert process.returncode == 0, process.stdout
        assert process.stdout.count("WARNING: installing without the CUDA extension") == 1
        assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


@pytest.mark.skipif(sys.platform == "win32", reason="the old compiler is a shell script")
def test_an_old_nvcc_is_told_as_such(checkout, tmp_path):
    old = tmp_path / "nvcc"
    old.write_text("#!/bin/sh\necho Cuda compilation tools, release 11.8, V11.8.89\n")
    old.chmod(0o755)
    process, wheel = build_wheel(checkout, tmp_path, NOVA_CUDA="1", CUDACXX=str(old))
    assert process.returncode != 0 and wheel is None
    assert f"{old} is of CUDA 11.8, and it takes 12.0 or newer" in process.stdout


def test_an_nvcc_that_is_named_is_the_one_or_none(checkout, tmp_path):
    process, wheel = build_wheel(checkout, tmp_path, NOVA_CUDA="1", CUDACXX="/none/nvcc")
    assert process.returncode != 0 and wheel is None
    assert "the CUDA extension failed: no nvcc in CUDACXX" in process.stdout


@needs_cxx
def test_cpp_wheel_without_nvcc(checkout, tmp_path):
    """The extension for CPUs needs a C++ compiler alone, and works in a new environment."""
    # What an earlier build in this folder left must not get into the wheel.
    built = checkout / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    left = built / "nova_kernels" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"")
    left.with_name("removed.py").write_text("")
    process, wheel = build_wheel(checkout, tmp_path, NOVA_CUDA="0", NOVA_CPP="1")
    assert process.returncode == 0, process.stdout
    assert process.stdout.count("built the C++ extension") == 1
    assert not wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = [name for name in names if name.endswith(".so")]
    assert len(modules) == 1 and modules[0].startswith("nova_kernels/_cpp")
    sources = {str(path.relative_to(checkout)) for path in checkout.glob("nova*/**/*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    printed = build_info_of(wheel, tmp_path / "new")
    assert "'cpp_extension': True, 'cpp_error': None" in printed and "'baseline']" in printed


def test_a_compiler_that_is_no_command_is_an_error(checkout, tmp_path):
    process, wheel = build_wheel(checkout, tmp_path, NOVA_CPP="auto", NOVA_CUDA="0", CXX='"g++')
    assert process.returncode != 0 and wheel is None
    assert 'SetupError: CXX="g++ is no command: No closing quotation' in process.stdout


def write_cpp_sources(checkout, text):
    """In place of the C++ extension's own, whose compilation takes long."""
    for source in (checkout / "csrc" / "cpp").glob("*.cpp"):
        source.write_text(text if source.name == "binding.cpp" else "")


@needs_cxx
def test_broken_cpp_source(checkout, tmp_path):
    write_cpp_sources(checkout, "#error broken on purpose\n")
    process, wheel = build_wheel(checkout, tmp_path, NOVA_CUDA="0", NOVA_CPP="auto")
    assert process.returncode == 0, process.stdout
    assert process.stdout.count("WARNING: installing without the C++ extension") == 1
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


@needs_cxx
def test_editable_install_has_the_extension_beside_the_package(checkout, tmp_path):
    hook = f"from setuptools.build_meta import build_editable as build; build({str(tmp_path)!r})"
    # The C++ extension for both: setup.py treats them alike, and nvcc takes several times as long.
    write_cpp_sources(checkout, "#ifndef WITH_OPTIONS\n#error without options\n#endif\n")
    # By a path from here, while CMake runs elsewhere.
    (checkout / "c++").symlink_to(shutil.which("c++"))
    modes = {"NOVA_CUDA": "0", "NOVA_CPP": "1", "CXX": "./c++ -DWITH_OPTIONS"}
    process = run("-c", hook, cwd=checkout, **modes)
    assert process.returncode == 0, process.stdout
    (module,) = (checkout / "nova_kernels").glob("_cpp*.so")

    # A later install without it takes it away: an old module must not pass for the new source's.
    (checkout / "csrc" / "cpp" / "CMakeLists.txt").write_text('message(FATAL_ERROR "broken")\n')
    process = run("-c", hook, cwd=checkout, **{**modes, "NOVA_CPP": "auto"})
    assert process.returncode == 0, process.stdout
    assert "WARNING: installing without the C++ extension" in process.stdout
    assert not module.exists()

    module.write_bytes(b"")
    process = run("-c", hook, cwd=checkout, NOVA_CPP="0", NOVA_CUDA="0")
    assert process.returncode == 0, process.stdout
    assert not module.exists()
