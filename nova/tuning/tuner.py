"""`nova.tune(pipe)`: measure once, remember, and run by what was fastest."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from nova_kernels.autocast import without_autocast
from nova_kernels.out_of_memory import says_out_of_gpu_memory

from .. import __version__
from ..devices import free_memory, out_of_memory
from ..engine import SamplingGraphs
from ..errors import InputError
from ..graph_recording import CUDARecorder
from ..guidance import Guidance
from ..libraries.packages import installed_packages
from ..model import NOVATransformer
from ..numeric import checked_count
from ..request import Request
from ..schedule import DiffusionSchedule, set_sizes
from .choices import DEFAULT, Choice, Stage, choices_of, together
from .measuring import measure
from .record import Measurement, TuningRecord, load_record, save_record
from .step import MiddleStep
from .trial import TrialResult, TrialRun, try_apart


class Tunable(Protocol):
    """What samples: a `NOVAPipeline`, or what `nova.accelerate` puts into the reference's."""

    graphs: SamplingGraphs | None
    tuning: "AppliedTuning | None"


@dataclass(frozen=True)
class AppliedTuning:
    """What a model runs by at present.

    Attributes:
        device, dtype: of the model when it was tuned.
    """

    record: TuningRecord
    choices: tuple[Choice, ...]
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def apply(
        cls, record: TuningRecord, choices: list[Choice], model: NOVATransformer
    ) -> "AppliedTuning":
        """Make a model run by what a record says.

        Args:
            choices: of this model.
        """
        chosen = {entry.choice: entry.chosen for entry in record.measurements}
        for choice in choices:
            choice.set(chosen[choice.name])
        return cls(record, tuple(choices), model.device, model.dtype)

    def fits(self, model: NOVATransformer) -> bool:
        """Whether the model is still where and as it was."""
        return (self.device, self.dtype) == (model.device, model.dtype)

    def undo(self) -> None:
        """Make it run as it would without."""
        for choice in self.choices:
            choice.undo()


def tune(
    pipe: Any,
    *,
    batch_size: int = 1,
    num_inference_steps: int | None = None,
    num_diffusion_steps: int | None = None,
    guidance_scale: float | None = None,
    measure_again: bool = False,
) -> TuningRecord:
    """Choose the attention library, the layout of weights and the ops' implementations.

    Candidates take turns on a step in the middle of a frame, for some seconds. One that is faster
    than what runs by default, by 5 %, or by 1 % if each of its turns was, and computes the same up
    to rounding, is taken. What was found is kept in the user's cache folder ($NOVA_CACHE, else
    ~/.cache/nova-kernels) for the card, the versions and the sizes, so that it is measured once.
    Print what is returned, or `nova.report(pipe)`, to see it. Moving or converting the pipeline
    undoes it.

    Implementations that are not verified on a GPU yet are candidates too; they run first in another
    process, which takes memory for a second model and some ten seconds. With CUDA graphs on
    (`enable_cuda_graphs`), replays of graphs are timed.

    Args:
        pipe: a `NOVAPipeline`, or a pipeline after `nova.accelerate` (whose weights are shared, so
            that their layout stays).
        batch_size: samples that will be made at a time.
        num_inference_steps, num_diffusion_steps, guidance_scale: of the calls to come; None: what
            the checkpoint recommends.
        measure_again: measure even if there is a record.

    Raises:
        InputError: a pipeline of the reference that is not accelerated, or numbers below 1.
        DeviceError: too little memory.
    """
    from ..acceleration import accelerated_sampling
    from ..pipeline import NOVAPipeline

    batch_size = checked_count("batch_size", batch_size, least=1)
    options = {
        "num_inference_steps": num_inference_steps,
        "num_diffusion_steps": num_diffusion_steps,
        "guidance_scale": guidance_scale,
    }
    if isinstance(pipe, NOVAPipeline):
        request = pipe.generation_config.request(**options)
        schedule = pipe.scheduler.schedule(request.num_diffusion_steps, request.flow_shift)
        with pipe.transformer_on_device() as model:
            run = TunedRun.of(model, request, schedule, batch_size)
            return tune_sampler(pipe, run, measure_again=measure_again)
    sampling = accelerated_sampling(pipe)
    request = Request(**{name: value for name, value in options.items() if value is not None})
    schedule = sampling.schedule(request.num_diffusion_steps)
    run = TunedRun.of(sampling.model, request, schedule, batch_size)
    return tune_sampler(sampling, run, layouts=False, measure_again=measure_again)


@dataclass(frozen=True)
class TunedRun:
    """The kind of run that a model is tuned for."""

    model: NOVATransformer
    schedule: DiffusionSchedule
    guidance: Guidance
    set_sizes: list[int]
    batch_size: int

    @classmethod
    def of(
        cls, model: NOVATransformer, request: Request, schedule: DiffusionSchedule, batch_size: int
    ) -> "TunedRun":
        """Of a call."""
        sizes = set_sizes(model.config.num_image_tokens, request.num_inference_steps)
        return cls(model, schedule, request.guidance, sizes, batch_size)


def tune_sampler(
    sampler: Tunable, run: TunedRun, *, layouts: bool = True, measure_again: bool = False
) -> TuningRecord:
    """`tune` for anything that samples.

    Args:
        layouts: whether the model's parameters may be replaced by copies in another layout.

    Raises:
        InputError: the blocks are compiled: every candidate would be a variant of the code, and
            torch.compile keeps few.
    """
    if run.model.has_compiled_blocks:
        raise InputError("tune first, then call compile_blocks(): it keeps what was chosen")
    if sampler.tuning is not None:
        sampler.tuning.undo()
        sampler.tuning = None
    model = run.model
    choices = choices_of(model, model.device, layouts=layouts)
    facts = _facts(run, choices, sampler.graphs is not None and model.device.type == "cuda")
    record = None if measure_again else load_record(facts)
    if record is None:
        try:
            # As calls are sampled: generate_frames.
            with out_of_memory("tuning", "a smaller batch_size"), without_autocast(model.device):
                trial = _try_unproven(run, choices, facts["cuda_graphs"])
                record = _measure_all(run, choices, facts, trial)
        except BaseException:
            for choice in choices:
                choice.undo()
            raise
        # Where a process ended, it may go well the next time.
        if trial.is_complete and not _may_pass(record):
            save_record(record)
    sampler.tuning = AppliedTuning.apply(record, choices, model)
    return record


def _measure_all(
    run: TunedRun, choices: list[Choice], facts: dict[str, Any], trial: TrialResult
) -> TuningRecord:
    """One choice after the other, each with those before it as they were made."""
    step = MiddleStep(run.model, run.schedule, run.guidance, run.set_sizes, run.batch_size)
    recorder = CUDARecorder() if facts["cuda_graphs"] else None
    exact = _exact_results(step) if run.model.dtype.itemsize < 4 else {}
    measurements: list[Measurement] = []
    stages: list[Measurement] = []
    for stage in Stage:
        of_stage = [choice for choice in choices if choice.stage is stage]
        time = partial(
            measure,
            work=partial(step.run, stage),
            device=run.model.device,
            record=recorder,
            exact=exact.get(stage),
        )
        found = [time(choice, refused=trial.refused_of(choice.name)) for choice in of_stage]
        chosen = [entry.chosen for entry in found]
        defaults = [choice.candidates[0] for choice in of_stage]
        if chosen != defaults:
            # Small gains may have been noise: do they add up?
            stages.append(time(together(of_stage, chosen)))
            if stages[-1].chosen == DEFAULT:
                found = [replace(m, chosen=d) for m, d in zip(found, defaults, strict=True)]
        measurements += found
    return TuningRecord(facts, tuple(measurements), tuple(stages))


@torch.inference_mode()
def _exact_results(step: MiddleStep) -> dict[Stage, Tensor]:
    """What candidates in half precision are held against."""
    in_float32 = step.in_float32()
    return {stage: in_float32.run(stage) for stage in Stage}


def _try_unproven(run: TunedRun, choices: list[Choice], cuda_graphs: bool) -> TrialResult:
    """Candidates that were not verified on a GPU, where they do no harm."""
    model = run.model
    candidates = [(choice.name, name) for choice in choices for name in sorted(choice.unproven)]
    trial = TrialRun(
        str(model.device),
        str(model.dtype).removeprefix("torch."),
        model.config,
        run.schedule,
        run.guidance,
        run.set_sizes,
        run.batch_size,
        cuda_graphs,
    )
    free_memory(model.device)  # which the other process needs
    return try_apart(trial, candidates)


def _may_pass(record: TuningRecord) -> bool:
    """Whether a candidate was refused for what may be otherwise soon.

    Memory was short, or a package lacks another one, which `_facts` does not tell.
    """
    passing = tuple(e.__name__ for e in (torch.OutOfMemoryError, ImportError, ModuleNotFoundError))
    reasons = [reason for entry in record.measurements for reason in entry.refused.values()]
    return any(reason.startswith(passing) or says_out_of_gpu_memory(reason) for reason in reasons)


def _facts(run: TunedRun, choices: list[Choice], cuda_graphs: bool) -> dict[str, Any]:
    """What a record holds for, as JSON can hold it."""
    model = run.model
    on_gpu = model.device.type == "cuda"
    cpu = f"{model.device} ({torch.backends.cpu.get_cpu_capability()})"
    return {
        "device": torch.cuda.get_device_name(model.device) if on_gpu else cpu,
        "threads": None if on_gpu else torch.get_num_threads(),
        "nova": __version__,
        "torch": str(torch.__version__),
        "packages": installed_packages(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "cuda_graphs": cuda_graphs,
        "geometry": model.config.to_dict(),
        "batch_size": run.batch_size,
        "passes": run.guidance.passes,
        "num_sets": len(run.set_sizes),
        "num_diffusion_steps": len(run.schedule.timesteps),
        "choices": {choice.name: list(choice.candidates) for choice in choices},
    }
