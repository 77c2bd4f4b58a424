"""Work in a process of its own.

A kernel that reads where it must not ruins all work of its process on the GPU, and one that never
ends stops it, deaf to Ctrl-C. In another process either is only a task that did not end well.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, TypeVar

Task = TypeVar("Task")


@dataclass(frozen=True)
class Ended:
    """What there is of a task in place of an answer.

    Attributes:
        reason: how its process ended.
    """

    reason: str


def run_apart(
    program: Sequence[str],
    input_for: Callable[[Sequence[Task]], str],
    tasks: Sequence[Task],
    timeout_s: float,
) -> Iterator[tuple[Task, Any]]:
    """Have another process work on tasks, one after the other.

    After a task that ends the process, or takes too long, the rest goes to a new one; none is
    started where a process ended before its first task.

    Args:
        program: command line of the process, such as `[sys.executable, "-m", module]`; it finds
            what this one finds. It answers by `answers_to_parent`.
        input_for: what it reads, given the tasks that are left.
        timeout_s: for its start, and for each task.

    Yields:
        Every task with its answer, or with an `Ended`.
    """
    waiting = list(tasks)
    while waiting:
        has_started = False
        for answer in _answers(program, input_for(waiting), 1 + len(waiting), timeout_s):
            if has_started:
                yield waiting.pop(0), answer
            elif isinstance(answer, Ended):
                # It would be no different the next time.
                yield from ((task, answer) for task in waiting)
                return
            has_started = True


def answers_to_parent() -> Callable[[Any], None]:
    """For the other process: what tells `run_apart` an answer, any value of JSON.

    The first one says that the process has started. What else is written to the standard output
    goes where errors go from here on.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    return say


def _answers(
    program: Sequence[str], given: str, count: int, timeout_s: float
) -> Iterator[Any | Ended]:
    """So many answers of a new process, or an `Ended` as the last."""
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        try:
            lines = _read_beside(process.stdout)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(given)
                process.stdin.close()
            for _ in range(count):
                line = lines.get(timeout=timeout_s)
                if line is None:
                    code = process.wait()
                    yield Ended(f"its process ended with code {code}{_last_line(errors)}")
                    return
                yield json.loads(line)
        except queue.Empty:
            yield Ended(f"its process gave no answer within {timeout_s:.0f} s")
        finally:
            process.kill()
            # One that waits for a GPU may take a while to end; nobody has to wait for it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)


def _read_beside(stream: IO[str]) -> "queue.Queue[str | None]":
    """Lines as they come, then None; read by a thread, since a read cannot be given up."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _last_line(file: IO[str]) -> str:
    file.seek(0)
    lines = file.read().strip().splitlines()
    return f": {lines[-1]}" if lines else ""
