"""What runs on a GPU tell of failures, by runs of pytest in a folder of their own."""

import os
import subprocess
import sys
from pathlib import Path

CONFTEST = """
from pathlib import Path

import failures
from failures import pytest_addoption, pytest_configure

LOST = Path(__file__).with_name("lost")
failures.gpu_is_lost = LOST.exists
"""
ILLEGAL_ACCESS = """
from conftest import LOST

def test_before(): pass
def test_of_a_kernel():
    LOST.touch()
    assert 0, "illegal access"
def test_behind(): LOST.unlink(missing_ok=True)
"""


def start(folder, *options):
    (folder / "conftest.py").write_text(CONFTEST)
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_failures_are_told_at_once(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import time\n"
        "def test_that_fails(): assert 1 + 1 == 3, 'wrong sum'\n"
        "def test_that_hangs(): time.sleep(60)\n"
    )
    process = start(tmp_path, "--tell-at-once", "-n", "1")
    told = ""
    for line in process.stdout:
        told += line
        if "AssertionError: wrong sum" in line:
            break
    still_running = process.poll() is None
    process.terminate()
    process.wait()
    assert still_running and "test_it.py::test_that_fails" in told


def test_a_process_without_its_gpu_ends(tmp_path):
    (tmp_path / "test_it.py").write_text(ILLEGAL_ACCESS)
    told, _ = start(tmp_path).communicate()
    assert "refuses all work after test_it.py::test_of_a_kernel" in told
    assert "1 failed, 1 passed" in told


def test_other_tests_go_on_in_a_new_process(tmp_path):
    (tmp_path / "test_it.py").write_text(ILLEGAL_ACCESS)
    told, _ = start(tmp_path, "-n", "1", "--dist", "loadfile").communicate()
    assert "AssertionError: illegal access" in told
    assert "crashed while running 'test_it.py::test_behind'" in told
    assert "2 failed, 2 passed" in told
