"""The script that makes .venv: when it does so anew, and which build of torch a machine gets."""

import subprocess

import pytest
import setup_env


@pytest.mark.parametrize(
    "gpu, driver, build",
    [
        (False, None, "cpu"),
        (True, "535.183.01\n", "cu126"),
        (True, "580.65.06\n580.65.06\n", ""),
        (True, "no answer\n", ""),
    ],
)
def test_torch_fits_the_driver(monkeypatch, gpu, driver, build):
    monkeypatch.setattr(setup_env.sys, "platform", "linux")
    monkeypatch.setattr(setup_env, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(setup_env.subprocess, "check_output", lambda *command, **options: driver)
    assert setup_env.torch_build() == build


def test_the_driver_without_nvidia_smi(monkeypatch):
    def fail(*command, **options):
        raise subprocess.CalledProcessError(9, "nvidia-smi")

    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build"
    monkeypatch.setattr(setup_env.subprocess, "check_output", fail)
    monkeypatch.setattr(setup_env, "read", lambda path: text)
    assert setup_env.nvidia_driver() == 570
    monkeypatch.setattr(setup_env, "read", lambda path: "")
    assert setup_env.nvidia_driver() is None


@pytest.mark.parametrize(
    "present, build, will_do",
    [
        ("", "cpu", True),
        ("cu130", "cpu", True),
        ("cpu", "", False),
        ("", "", True),
        ("cu130", "", True),
        ("cpu", "cu126", False),
        ("", "cu126", False),
        ("cu128", "cu126", True),
    ],
)
def test_an_installed_build_is_kept_where_it_runs(present, build, will_do):
    assert setup_env.runs_here(present, build) == will_do


@pytest.mark.parametrize("name", ["CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH"])
def test_a_compiler_that_is_named_is_another_set_up(monkeypatch, name):
    monkeypatch.setattr(setup_env, "torch_build", lambda: "cpu")
    before = setup_env.wanted_state()
    monkeypatch.setenv(name, "/none")
    assert setup_env.wanted_state() != before


@pytest.mark.parametrize("name", ["nvcc", "c++", "g++", "clang++"])
def test_a_compiler_that_is_new_or_another_is_another_set_up(monkeypatch, tmp_path, name):
    monkeypatch.setattr(setup_env, "torch_build", lambda: "cpu")
    monkeypatch.setenv("PATH", str(tmp_path))
    states = {setup_env.wanted_state()}
    for version in ("12", "13"):
        program = tmp_path / f"{name}-{version}"
        program.write_text("")
        program.chmod(0o755)
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(program)
        states |= {setup_env.wanted_state(), setup_env.wanted_state()}
    assert len(states) == 3


def test_nvcc_in_a_toolkit_that_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    program = tmp_path / "bin" / "nvcc"
    program.parent.mkdir()
    program.write_text("")
    program.chmod(0o755)
    assert setup_env.compilers()[0] == str(program.resolve())


def test_macos_takes_pypi(monkeypatch):
    monkeypatch.setattr(setup_env.sys, "platform", "darwin")
    assert setup_env.torch_build() == ""


@pytest.mark.parametrize(
    "torch, requirements",
    [
        ("2.9.1", ["numpy<2.4"]),
        ("2.11.0+cu126", ["numpy<2.4"]),
        ("2.12.0", []),
        ("2.13.0+cpu", []),
        ("3.0.0", []),
    ],
)
def test_numpy_fits_the_interpreter_of_triton(torch, requirements):
    assert setup_env.numpy_beside(torch) == requirements
