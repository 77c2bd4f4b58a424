"""Candidates that no GPU has run before run first in a process of their own.

A kernel that reads where it must not ruins all work of its process on the GPU, and one that never
ends stops it. Here that is another process, and the candidate is refused.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from ..config import ModelConfig
from ..guidance import Guidance
from ..schedule import DiffusionSchedule

PROGRAM = [sys.executable, "-m", "nova.tuning.trial_process"]
# For the start of the process, and for each candidate, which may have to be compiled.
TIMEOUT_S = 120.0

Candidate = tuple[str, str]  # the name of a choice, and of a candidate


@dataclass(frozen=True)
class TrialRun:
    """What a candidate computes in its trial: the step in the middle of a random model's frame.

    Attributes:
        device, dtype: such as "cuda:0" and "bfloat16".
        cuda_graphs: whether it is also recorded and replayed.
    """

    device: str
    dtype: str
    config: ModelConfig
    schedule: DiffusionSchedule
    guidance: Guidance
    set_sizes: list[int]
    batch_size: int
    cuda_graphs: bool

    def to_json(self, candidates: Sequence[Candidate]) -> str:
        """For the process, which gets it as its input."""
        fields = {**vars(self), "config": self.config.to_dict(), "candidates": candidates}
        fields |= {name: asdict(fields[name]) for name in ("schedule", "guidance")}
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> tuple["TrialRun", list[Candidate]]:
        """What `to_json` was called with."""
        fields = json.loads(text)
        candidates = [tuple(candidate) for candidate in fields.pop("candidates")]
        fields["config"] = ModelConfig.from_dict(fields["config"])
        schedule = {name: tuple(values) for name, values in fields["schedule"].items()}
        fields["schedule"] = DiffusionSchedule(**schedule)
        fields["guidance"] = Guidance(**fields["guidance"])
        return cls(**fields), candidates


def refused_in_trial(run: TrialRun, candidates: Sequence[Candidate]) -> dict[Candidate, str]:
    """Run candidates in other processes.

    Returns:
        Those that failed, computed something else than what runs without a choice, or took their
        process along, and why.
    """
    refused: dict[Candidate, str] = {}
    waiting = list(candidates)
    while waiting:
        has_started = False
        for answer in _answers(run, list(waiting)):
            if isinstance(answer, str):  # why there are no more
                # Before anything ran, it would be no different the next time.
                guilty = waiting[:1] if has_started else waiting
                refused |= dict.fromkeys(guilty, f"in a trial {answer}")
                del waiting[: len(guilty)]
            elif answer:
                choice, name, reason = answer
                waiting.remove((choice, name))
                if reason is not None:
                    refused[choice, name] = reason
            has_started = True
    return refused


def _answers(run: TrialRun, candidates: list[Candidate]) -> Iterator[list[Any] | str]:
    """What a process says: [] once it has started, then [choice, candidate, reason or None].

    If it ends before all are through, a sentence why is the last.
    """
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            PROGRAM,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        try:
            lines = _read_beside(process.stdout)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(run.to_json(candidates))
                process.stdin.close()
            for _ in range(1 + len(candidates)):
                line = lines.get(timeout=TIMEOUT_S)
                if line is None:
                    yield f"the process ended with code {process.wait()}{_last_line(errors)}"
                    return
                yield json.loads(line)
        except queue.Empty:
            yield f"there was no answer within {TIMEOUT_S:.0f} s"
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
