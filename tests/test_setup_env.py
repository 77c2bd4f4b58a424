"""The script that makes .venv: which build of torch a machine gets."""

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
