"""Work in a process of its own.

A kernel that reads where it must not ruins all work of its process on the GPU, and one that never
ends stops it, deaf to Ctrl-C. In another process either is only a task that did not end well.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, TypeVar

Task = TypeVar("Task")
# In front of an answer; other lines, such as a library's, are none.
MARK = "nova answer: "
SECONDS_TO_END = 10.0


@dataclass(frozen=True)
class Ended:
    """Stands for the answer of a task whose process ended without one.

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
        program: command line of the process, such as `[sys.executable, "-m", module]`; it imports
            from the folders that this one imports from. It answers by `answers_to_parent`.
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


def answers_to_parent() -> Callable[..., None]:
    """For the other process: what tells `run_apart` an answer, any value of JSON.

    The first one says that the process has started. With `last=True` the tasks behind it go to a
    new process, as they should where this one may be ruined.
    """

    def say(answer: Any, *, last: bool = False) -> None:
        print(f"\n{MARK}{json.dumps([answer, last])}", flush=True)

    return say


def _answers(
    program: Sequence[str], given: str, count: int, timeout_s: float
) -> Iterator[Any | Ended]:
    """So many answers of a new process, or fewer, the last of which may be an `Ended`."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as file,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
    ):
        # A pipe would wait for a process that does not read.
        file.write(given)
        file.seek(0)
        try:
            process = subprocess.Popen(
                program,
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                errors="replace",
                env=_environment(),
            )
        except OSError as error:
            yield Ended(f"its process does not start: {error}")
            return
        try:
            answers = _read_beside(process.stdout)
            for _ in range(count):
                line = answers.get(timeout=timeout_s)
                if line is None:
                    code = process.wait(timeout=SECONDS_TO_END)
                    yield Ended(f"its process ended with {_name(code)}{_cause(errors)}")
                    return
                answer, is_last = json.loads(line)
                yield answer
                if is_last:
                    return
        except (queue.Empty, subprocess.TimeoutExpired):
            yield Ended(f"its process gave no answer within {timeout_s:.0f} s")
        finally:
            process.kill()
            # One that waits for a GPU may take a while to end; nobody has to wait for it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=SECONDS_TO_END)


def _environment() -> dict[str, str]:
    folders = [folder or os.getcwd() for folder in sys.path if isinstance(folder, str)]
    # Without the second the current folder would come first (from Python 3.11 on).
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "PYTHONSAFEPATH": "1"}


def _read_beside(stream: IO[str]) -> "queue.Queue[str | None]":
    """Answers as they come, then None; read by a thread, since a read cannot be given up."""
    answers: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        with stream:
            for line in stream:
                if line.startswith(MARK):
                    answers.put(line.removeprefix(MARK))
        answers.put(None)

    threading.Thread(target=read, daemon=True).start()
    return answers


def _name(code: int) -> str:
    with contextlib.suppress(ValueError):
        return f"code {code}" if code >= 0 else signal.Signals(-code).name
    return f"code {code}"


def _cause(file: IO[str]) -> str:
    """Of what a process wrote the error below the last traceback, or the last line."""
    file.seek(0)
    lines = [line for line in file.read().splitlines() if line.strip()]
    starts = [index for index, line in enumerate(lines) if line.startswith("Traceback")]
    below = [line for line in lines[starts[-1] + 1 :] if line[0] != " "] if starts else lines[-1:]
    return f": {below[0].strip()}" if below else ""
