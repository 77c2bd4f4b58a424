"""Makes .venv in the checkout, with torch, this project and its test tools; `make` calls it.

Needs Python's standard library only. Where nothing has changed since the last time, it does
nothing. What it cannot do itself it says in one line.

PYTHON (of the Makefile)  the interpreter that runs this file and that .venv is made with
TORCH                     a torch version instead of the tested one, for example 2.11.0; with a
                          label, 2.13.0+cpu or 2.13.0+cu126, exactly that build of it

.venv belongs to this script: one that works is kept, any other is replaced.
"""

# No annotations here: an older python3 must get as far as finding a newer one.

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
CREATED = VENV / "nova-created.txt"  # where and with which Python .venv was made
STAMP = VENV / "nova-setup.stamp"  # what the last complete set-up was made from

# Environment variables that may name a CUDA toolkit.
CUDA_FOLDERS = ("CUDA_HOME", "CUDA_PATH")
# The Pythons that the tested torch has wheels for.
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 14)
TESTED_TORCH = "2.13.0"
# PyTorch's own indexes, one for each build: cpu, cu126...
TORCH_INDEX = "https://download.pytorch.org/whl/{}"
# PyPI's build of it has CUDA 13, which drivers from this one on run; older ones, from 525 on, run
# the build with CUDA 12.
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
OLDEST_DRIVER_OF_PYPI, BUILD_FOR_OLDER_DRIVERS = 580, "cu126"


def say(message):
    print(f"setup: {message}", flush=True)


def stop(message):
    say(message)
    sys.exit(1)


def succeeds(command):
    """Whether a command can be run and ends well; its output is not shown."""
    try:
        subprocess.check_output(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def read(path):
    """Text of a file, or an empty string if it is absent."""
    return path.read_text() if path.exists() else ""


def use_supported_python():
    """Goes on in a suitable python3.x, if the one that runs this file is too old or too new."""
    running = sys.version_info[:2]
    if OLDEST_PYTHON <= running <= NEWEST_PYTHON:
        return
    for minor in range(NEWEST_PYTHON[1], OLDEST_PYTHON[1] - 1, -1):
        path = shutil.which(f"python3.{minor}")
        # Version managers put launchers on PATH for versions that are not there: try it.
        if path and succeeds([path, "-c", f"import sys; sys.exit(sys.version_info[1] != {minor})"]):
            os.execv(path, [path, str(Path(__file__).resolve())])
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST_PYTHON, NEWEST_PYTHON))
    stop(
        f"Python {oldest} to {newest} is needed, and {sys.executable} is {running[0]}.{running[1]}:"
        " install one, or name it, for example: make PYTHON=/path/to/python3.12 test"
    )


def wanted_state():
    """A digest of all that decides what a complete set-up contains."""
    digest = hashlib.sha256()
    names = ["TORCH", "NOVA_CUDA", "NOVA_CUDA_ARCHS", "NOVA_CPP", "CXX", "CUDACXX", *CUDA_FOLDERS]
    for name in names:
        digest.update(f"{name}={os.environ.get(name, '')}\n".encode())
    digest.update(f"{compilers()}\n".encode())  # one may be new, or another by the same name
    digest.update(f"{torch_build()}\n".encode())  # a GPU or a driver may be new
    sources = ["pyproject.toml", "setup.py", "CMakeLists.txt", "scripts/setup_env.py"]
    sources += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*"))
    for name in sources:
        digest.update(name.encode() + b"\n" + (ROOT / name).read_bytes())
    return digest.hexdigest()


def compilers():
    """The files that the compilers of the extensions are, or None where there is none."""
    homes = [os.environ[name] for name in CUDA_FOLDERS if os.environ.get(name)]
    folders = [os.path.join(home, "bin") for home in homes] + [os.environ.get("PATH", "")]
    found = [
        shutil.which(name, path=os.pathsep.join(folders))
        for name in ("nvcc", "c++", "g++", "clang++")
    ]
    return [path and os.path.realpath(path) for path in found]


def created_as():
    """What `CREATED` holds for a .venv of this place and this Python."""
    # Scripts inside a .venv hold its path: a copied one would run the original's.
    return f"{VENV} {sys.version_info[0]}.{sys.version_info[1]}\n"


def create_venv():
    """Makes .venv with pip in it, unless a usable one is there."""
    usable = succeeds([str(VENV_PYTHON), "-m", "pip", "--version"])
    if usable and read(CREATED) in (created_as(), ""):  # "": made by hand
        CREATED.write_text(created_as())
        return
    say(f"making .venv with {sys.executable}")
    command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    if not succeeds(command):
        install_venv_package()
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            stop(f"{shlex.join(command)} failed: {(result.stdout + result.stderr).strip()}")
    CREATED.write_text(created_as())


def install_venv_package():
    """Debian and Ubuntu keep the part of Python that makes a venv in a package of its own."""
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    if not shutil.which("apt-get"):
        return  # another system: the second try shows what is wrong
    if os.geteuid() == 0:
        as_root = []
    elif succeeds(["sudo", "-n", "true"]):
        as_root = ["sudo", "-n"]
    else:
        stop(
            "a part of Python that makes virtual environments is missing;"
            f" run: sudo apt-get install {package}"
        )
    say(f"installing {package} with apt-get")
    apt = [*as_root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]
    # An out-of-date list may still do, so only the installation must succeed.
    subprocess.run([*apt, "update", "-qq"], stdin=subprocess.DEVNULL)
    install = [*apt, "install", "-y", "-qq", "--no-install-recommends", package]
    if subprocess.run(install, stdin=subprocess.DEVNULL).returncode != 0:
        stop(f"{package} could not be installed; install it by hand: apt-get install {package}")


def pip_install(*arguments):
    """Runs pip in .venv; whether it succeeded. A person sees its progress, a log only problems."""
    command = [str(VENV_PYTHON), "-m", "pip", "install"]
    if not sys.stdout.isatty():
        command.append("--quiet")
    return subprocess.run([*command, *arguments]).returncode == 0


def has_nvidia_gpu():
    """Looks at the driver; torch is not there yet, and must not decide which torch to install."""
    return Path("/dev/nvidiactl").exists() or succeeds(["nvidia-smi"])


def nvidia_driver():
    """The driver's first number, such as 570; None where it cannot be found out."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        said = read(Path("/proc/driver/nvidia/version"))
    version = re.search(r"\b(\d+)\.\d+", said)
    return int(version[1]) if version else None


def torch_build():
    """The build of torch for this machine: its label, or an empty string for PyPI's."""
    if sys.platform != "linux":
        return ""  # PyPI's for macOS is small and serves every machine
    if not has_nvidia_gpu():
        return "cpu"
    driver = nvidia_driver()
    is_old = driver is not None and driver < OLDEST_DRIVER_OF_PYPI
    return BUILD_FOR_OLDER_DRIVERS if is_old else ""


def runs_here(present, build):
    """Whether a build of torch that is installed will do where `build` is wanted."""
    if build == "cpu":
        return True
    if build == BUILD_FOR_OLDER_DRIVERS:
        return present.startswith("cu12")
    return present != "cpu"


def installed_torch():
    """Version of torch in .venv, or an empty string."""
    code = "import importlib.metadata as metadata; print(metadata.version('torch'))"
    result = subprocess.run([str(VENV_PYTHON), "-c", code], capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else ""


def install_torch():
    """Installs torch: a build for the NVIDIA driver, or the small CPU build where there is none."""
    wanted = os.environ.get("TORCH") or TESTED_TORCH
    version, _, label = wanted.partition("+")
    build = label or torch_build()
    present_version, _, present_build = installed_torch().partition("+")
    fits = present_build == label if label else runs_here(present_build, build)
    if present_version == version and fits:
        return
    if build:
        say(f"installing torch {version}, build {build}")
        if install_torch_build(f"torch=={version}+{build}", TORCH_INDEX.format(build)):
            return
        if label:
            stop(f"torch {wanted} was not found, neither by pip as set up nor in PyTorch's index")
        say("no such build within reach: taking PyPI's, with CUDA 13, a large download")
    else:
        say(f"installing torch {version}")
    # For pip the CPU build of the same version would do.
    again = ["--force-reinstall"] if present_build == "cpu" else []
    if not pip_install(*again, f"torch=={version}"):
        stop(f"torch {version} could not be installed")


def install_torch_build(requirement, index):
    """Installs one build of torch from where pip looks anyway, or from PyTorch's index."""
    # torch alone; what it depends on comes with the project, from the usual places. The first try
    # is silent, because on most machines it only finds out that PyPI does not have this build.
    arguments = ["--no-deps", "--only-binary", "torch", requirement]
    if succeeds([str(VENV_PYTHON), "-m", "pip", "install", "--retries", "1", *arguments]):
        return True
    # Few retries: where the index cannot be reached, waiting does not help.
    return pip_install("--index-url", index, "--retries", "1", "--timeout", "15", *arguments)


def numpy_beside(torch):
    """What the tests ask of NumPy beside a version of torch, as requirements of pip.

    Triton's interpreter, which the tests run kernels in, turns arrays of one number into integers
    up to Triton 3.6, which torch 2.11 brings along; NumPy refuses that from 2.4 on.
    """
    major_minor = tuple(int(number) for number in torch.split(".")[:2])
    return ["numpy<2.4"] if major_minor < (2, 12) else []


def install_project():
    """Installs this checkout, editable, with all it can use and what its tests need."""
    say("installing the project and its test tools")
    # Naming torch once more keeps pip from choosing another version.
    torch = installed_torch()
    requirements = [f"torch=={torch}", *numpy_beside(torch)]
    if not pip_install("--editable", f"{ROOT}[all,test]", *requirements):
        stop("the project could not be installed; see pip's message above")


def main():
    use_supported_python()
    state = wanted_state()
    if read(STAMP) == state and read(CREATED) == created_as():
        return
    create_venv()
    install_torch()
    install_project()
    subprocess.run([str(VENV_PYTHON), "-m", "nova_kernels", "--build"], check=True)
    if has_nvidia_gpu() and not succeeds(
        [str(VENV_PYTHON), "-c", "import torch; torch.cuda.init()"]
    ):
        say("torch cannot use this machine's GPU; .venv/bin/nova doctor says more")
    STAMP.write_text(state)


if __name__ == "__main__":
    main()
