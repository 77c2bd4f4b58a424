"""Builds of this project in copies of it, with this environment's own build tools."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("nova", "nova_kernels")
# Enough for a build; a copy of these is a checkout as far as packaging is concerned.
SOURCES = (*PACKAGES, "csrc", "CMakeLists.txt", "LICENSE", "MANIFEST.in", "pyproject.toml")
SOURCES += ("setup.py", "README.md")


def make_checkout(folder):
    """A fresh copy, inside a folder, of the files that a build reads."""
    copy = folder / "checkout"
    copy.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "*.so")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    return copy


def run(*command, cwd, **environment):
    """Runs this Python with arguments; variables given as None are unset.

    Without the C++ extension, unless a test asks for it: it is not what most of them are about.
    """
    variables = {**os.environ, "NOVA_CPP": "0", **environment}
    variables = {name: value for name, value in variables.items() if value is not None}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def build_wheel(source, out, isolated=False, **environment):
    """The finished process, and the wheel's path (None if there is none)."""
    pip = ["-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", out]
    if not isolated:
        pip += ["--no-build-isolation", "--no-index"]
    process = run(*pip, source, cwd=source, **environment)
    return process, next(out.glob("*.whl"), None)


def build_info_of(wheel, folder):
    """What nova_kernels says of itself and its GPUs, installed in a new, empty environment."""
    process = run("-m", "venv", "--without-pip", folder, cwd=folder.parent)
    assert process.returncode == 0, process.stdout
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    code = "import nova_kernels; from nova_kernels.build import devices;"
    code += "print(nova_kernels.build_info(), devices())"
    pip = [sys.executable, "-m", "pip", "--python", python]  # one of its own takes seconds
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    outputs = [
        subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
        for command in (
            [*pip, "install", "--no-index", "--no-deps", wheel],
            [python, "-c", code],
        )
    ]
    assert all(output.returncode == 0 for output in outputs), outputs
    return outputs[-1].stdout
