"""Work in other processes: what fails, crashes or hangs there is an answer like others."""

import json
import os
import sys
import time

import pytest

from nova_kernels.isolation import Ended, run_apart

# It answers with a task's double, or does what the task says.
PROGRAM = """
import json, os, sys, time
print("what libraries print", end="", flush=True)
from nova_kernels.isolation import answers_to_parent
say = answers_to_parent()
tasks = json.load(sys.stdin)
say("started")
for task in tasks:
    if task == "exit":
        os._exit(3)
    if task == "abort":
        os.abort()
    if task == "raise":
        raise RuntimeError("CUDA error: misaligned address\\nMuch advice")
    if task == "hang":
        time.sleep(60)
    if task == "close":
        os.close(1)
        time.sleep(60)
    if task == "pid":
        say(os.getpid())
    else:
        say(2 * task, last=task == "ruin")
"""
COMMAND = [sys.executable, "-c", PROGRAM]


def run(*tasks, command=COMMAND, timeout_s=30.0):
    return list(run_apart(command, json.dumps, tasks, timeout_s))


def test_answers():
    assert run(1, "a", 2.5) == [(1, 2), ("a", "aa"), (2.5, 5.0)]
    assert run() == []


def test_much_input():
    text = "x" * 10**6  # more than a pipe holds
    assert run(text) == [(text, 2 * text)]


@pytest.mark.parametrize(
    "task, reason",
    [
        ("exit", "code 3"),
        ("abort", "SIGABRT"),
        ("raise", "code 1: RuntimeError: CUDA error: misaligned address"),
    ],
)
def test_what_ends_its_process_harms_no_other_task(task, reason):
    ended = Ended(f"its process ended with {reason}")
    assert run(1, task, 2, task) == [(1, 2), (task, ended), (2, 4), (task, ended)]


@pytest.mark.parametrize("task", ["hang", "close"])
def test_what_never_ends_harms_no_other_task(task, monkeypatch):
    monkeypatch.setattr("nova_kernels.isolation.SECONDS_TO_END", 1.0)
    # Long enough for a process to start.
    ended = Ended("its process gave no answer within 5 s")
    assert run(task, 1, timeout_s=5.0) == [(task, ended), (1, 2)]


def test_a_process_that_may_be_ruined_is_left():
    (_, first), ruin, (_, second), (_, third) = run("pid", "ruin", "pid", "pid")
    assert ruin == ("ruin", "ruinruin")
    assert first != second == third


@pytest.mark.parametrize(
    "command, reason",
    [
        ([sys.executable, "-c", "raise OSError('no GPU')"], "ended with code 1: OSError: no GPU"),
        ([sys.executable, "-m", "none_such"], "No module named none_such"),
        (["/none/such"], "does not start: "),
    ],
)
def test_a_process_that_does_not_start_is_tried_once(command, reason):
    (first, answer), second = run(1, 2, command=command)
    assert (first, second) == (1, (2, answer)) and reason in answer.reason


def test_it_imports_what_this_one_imports(tmp_path, monkeypatch):
    """And nothing by the names of files in the current folder."""
    (tmp_path / "queue.py").write_text("raise ImportError")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])  # Python passes over what is no text
    if sys.version_info >= (3, 11):
        assert run(1) == [(1, 2)]


def test_it_is_not_left_behind():
    """Whoever stops listening stops the process too."""
    answers = run_apart(COMMAND, json.dumps, ["pid", "hang"], 30.0)
    _, pid = next(answers)
    start = time.monotonic()
    answers.close()
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
