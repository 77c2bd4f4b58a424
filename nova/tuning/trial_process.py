"""The process that `trial.py` starts: it runs candidates one by one, and says how they did."""

import sys
from dataclasses import replace
from functools import partial

import torch

from nova_kernels.isolation import answers_to_parent

from ..devices import torch_defaults
from ..graph_recording import CUDARecorder
from ..model import NOVATransformer
from .choices import Stage, choices_of
from .measuring import measure
from .step import MiddleStep
from .trial import TrialRun


def main() -> None:
    """Read a `TrialRun` and its candidates, and answer with the reason to refuse each, or None."""
    run, candidates = TrialRun.from_json(sys.stdin.read())
    say = answers_to_parent()
    device = torch.device(run.device)
    model = _random_model(run, device)
    step = MiddleStep(model, run.schedule, run.guidance, run.set_sizes, run.batch_size)
    choices = {choice.name: choice for choice in choices_of(model, device, layouts=False)}
    with torch.inference_mode():
        for stage in Stage:
            step.run(stage)
    say("started")
    recorder = CUDARecorder() if run.cuda_graphs else None
    for name, candidate in candidates:
        choice = choices[name]
        pair = replace(choice, candidates=(choice.candidates[0], candidate))
        found = measure(pair, partial(step.run, choice.stage), device, record=recorder)
        choice.undo()
        reason = found.refused.get(candidate)
        # After some errors of a GPU nothing else goes well in the same process.
        say(reason, last=reason is not None)


def _random_model(run: TrialRun, device: torch.device) -> NOVATransformer:
    torch.manual_seed(0)
    # At once: memory may not suffice for the weights in float32.
    with torch_defaults(getattr(torch, run.dtype), device):
        return NOVATransformer(run.config).eval().requires_grad_(False)


if __name__ == "__main__":
    main()
