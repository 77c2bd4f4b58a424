"""Candidates that are not verified on a GPU run first in a process of their own."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from nova_kernels.isolation import Ended, run_apart

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


@dataclass(frozen=True)
class TrialResult:
    """How candidates did.

    Attributes:
        refused: those that failed, computed something else than what runs without a choice, or
            took their process along, and why.
        is_complete: whether all of them came to an end by themselves.
    """

    refused: Mapping[Candidate, str]
    is_complete: bool

    def refused_of(self, choice: str) -> dict[str, str]:
        """The candidates of a choice that were refused, and why."""
        return {name: reason for (of, name), reason in self.refused.items() if of == choice}


def try_apart(run: TrialRun, candidates: Sequence[Candidate]) -> TrialResult:
    """Run candidates in another process."""
    refused: dict[Candidate, str] = {}
    is_complete = True
    for candidate, answer in run_apart(PROGRAM, run.to_json, candidates, TIMEOUT_S):
        if isinstance(answer, Ended):
            refused[candidate] = f"in a trial {answer.reason}"
            is_complete = False
        elif answer is not None:
            refused[candidate] = answer
    return TrialResult(refused, is_complete)
