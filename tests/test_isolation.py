"""Work in other processes: what fails, crashes or hangs there is an answer like others."""

import json
import sys

import pytest

from nova_kernels.isolation import Ended, run_apart

# It answers with a task's double, or does what the task says.
PROGRAM = """
import json, os, sys, time
from nova_kernels.isolation import answers_to_parent
say = answers_to_parent()
tasks = json.load(sys.stdin)
print("what libraries print")
say("started")
for task in tasks:
    if task == "abort":
        print("not on this card", file=sys.stderr, flush=True)
        os._exit(3)
    if task == "hang":
        time.sleep(60)
    say(2 * task)
"""


def run(*tasks, program=PROGRAM, timeout_s=30.0):
    return list(run_apart([sys.executable, "-c", program], json.dumps, tasks, timeout_s))


def test_answers():
    assert run(1, "a", 2.5) == [(1, 2), ("a", "aa"), (2.5, 5.0)]
    assert run() == []


def test_what_ends_its_process_harms_no_other_task():
    ended = Ended("its process ended with code 3: not on this card")
    assert run(1, "abort", 2, "abort") == [(1, 2), ("abort", ended), (2, 4), ("abort", ended)]


def test_what_never_ends_harms_no_other_task():
    # Long enough for a process to start.
    ended = Ended("its process gave no answer within 5 s")
    assert run("hang", 1, timeout_s=5.0) == [("hang", ended), (1, 2)]


@pytest.mark.parametrize("program", ["raise RuntimeError('no GPU')", "import none_such"])
def test_a_process_that_does_not_start_is_tried_once(program):
    (first, answer), second = run(1, 2, program=program)
    assert (first, second) == (1, (2, answer))
    assert answer.reason.startswith("its process ended with code 1: ")
    assert "no GPU" in answer.reason or "none_such" in answer.reason


def test_it_is_not_left_behind():
    """Whoever stops listening stops the process too."""
    answers = run_apart([sys.executable, "-c", PROGRAM], json.dumps, [1, "hang"], 30.0)
    assert next(answers) == (1, 2)
    answers.close()  # would wait for as long as the process sleeps
