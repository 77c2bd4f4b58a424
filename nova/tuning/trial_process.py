"""The process that `trial.py` starts: it runs candidates one by one, and says how they did."""

import json
import os
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..graph_recording import CUDARecorder
from ..model import NOVATransformer
from .choices import Stage, choices_of
from .measuring import measure
from .step import MiddleStep
from .trial import TrialRun


def main() -> None:
    """Read a `TrialRun` and its candidates, and write a line of JSON for each."""
    run, candidates = TrialRun.from_json(sys.stdin.read())
    # What else writes, such as a compiler, goes where errors go.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: list[Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    device = torch.device(run.device)
    torch.manual_seed(0)
    with device:
        model = NOVATransformer(run.config).to(getattr(torch, run.dtype))
    model.eval().requires_grad_(False)
    step = MiddleStep(model, run.schedule, run.guidance, run.set_sizes, run.batch_size)
    choices = {choice.name: choice for choice in choices_of(model, device, layouts=False)}
    with torch.inference_mode():
        for stage in Stage:
            step.run(stage)
    say([])
    recorder = CUDARecorder() if run.cuda_graphs else None
    for name, candidate in candidates:
        choice = choices[name]
        pair = replace(choice, candidates=(choice.candidates[0], candidate))
        found = measure(pair, partial(step.run, choice.stage), device, record=recorder)
        choice.undo()
        say([name, candidate, found.refused.get(candidate)])


if __name__ == "__main__":
    main()
