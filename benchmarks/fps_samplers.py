"""What fps.py measures: the samplers, all called like `nova.sampling.generate_frames`."""

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from reference_package import DIFFNEXT, ReferenceSampler
from shared_weights import share_weights
from torch import Tensor

from nova.conditioning import Conditioning
from nova.engine import SamplingGraphs
from nova.graph_recording import RecordingError
from nova.guidance import Guidance
from nova.model import NOVATransformer
from nova.plain_sampling import generate_frames_plain
from nova.sampling import generate_frames
from nova.schedule import DiffusionSchedule
from nova.step_hooks import StepProgress
from nova.tuning.tuner import AppliedTuning, TunedRun, tune_sampler

PLAIN, EXACT, GRAPHS, TUNED = "plain", "exact", "graphs", "tuned"
PLAIN_COMPILED, EXACT_COMPILED = "plain, compiled", "exact, compiled"
GRAPHS_COMPILED = "graphs, compiled"
REFERENCE_OPS = "exact, reference ops"
PROGRESS = "with progress bars"
DIFFNEXT_ACCELERATED = f"{DIFFNEXT}, accelerated"
# Their first run compiles, records, measures, or builds another model; it never counts as a
# measurement.
STARTING_UP = (
    PLAIN_COMPILED,
    EXACT_COMPILED,
    GRAPHS,
    GRAPHS_COMPILED,
    PROGRESS,
    TUNED,
    DIFFNEXT,
    DIFFNEXT_ACCELERATED,
)


class CompiledSampler:
    """A sampler with the model's blocks compiled (`NOVATransformer.compile_blocks`)."""

    def __init__(self, sampler: Callable):
        self._sampler = sampler
        self._model: NOVATransformer | None = None
        self._compiled: NOVATransformer | None = None

    def __call__(
        self, model: NOVATransformer, conditioning: Conditioning, **options: Any
    ) -> Iterator[Tensor]:
        if self._model is not model:
            self._model, self._compiled = model, share_weights(model)
            self._compiled.compile_blocks()
        return self._sampler(self._compiled, conditioning, **options)


class ReferenceOpsSampler:
    """The exact sampler with plain torch in place of every op: what the ops gain."""

    def __init__(self) -> None:
        self._model: NOVATransformer | None = None
        self._reference: NOVATransformer | None = None

    def __call__(
        self, model: NOVATransformer, conditioning: Conditioning, **options: Any
    ) -> Iterator[Tensor]:
        if self._model is not model:
            self._model, self._reference = model, share_weights(model)
            self._reference.set_backend("reference")
        return generate_frames(self._reference, conditioning, **options)


class GraphsSampler:
    """The exact sampler from CUDA graphs."""

    def __init__(self) -> None:
        self._graphs = SamplingGraphs()

    def __call__(
        self, model: NOVATransformer, conditioning: Conditioning, **options: Any
    ) -> Iterator[Tensor]:
        frames = generate_frames(model, conditioning, graphs=self._graphs, **options)
        return _from_graphs(self._graphs, frames)


class ProgressSampler:
    """A sampler with a pipeline's progress bars, which are drawn, but not shown."""

    def __init__(self, sampler: Callable):
        self._sampler = sampler

    def __call__(
        self,
        model: NOVATransformer,
        conditioning: Conditioning,
        *,
        num_frames: int,
        set_sizes: list[int],
        **options: Any,
    ) -> Iterator[Tensor]:
        with (
            open(os.devnull, "w") as nowhere,
            StepProgress(num_frames, len(set_sizes), {"file": nowhere}) as progress,
        ):
            yield from self._sampler(
                model,
                conditioning,
                num_frames=num_frames,
                set_sizes=set_sizes,
                on_set_end=progress.update,
                **options,
            )


class TunedSampler:
    """The exact sampler after `nova.tune`, from CUDA graphs on a GPU."""

    def __init__(self, device: torch.device):
        self.graphs = SamplingGraphs() if device.type == "cuda" else None
        self.tuning: AppliedTuning | None = None
        self._model: NOVATransformer | None = None
        self._tuned: NOVATransformer | None = None

    @property
    def chosen(self) -> dict[str, str]:
        """What `nova.tune` chose, by choice; empty before the first run."""
        if self.tuning is None:
            return {}
        return {entry.choice: entry.chosen for entry in self.tuning.record.measurements}

    def __call__(
        self,
        model: NOVATransformer,
        conditioning: Conditioning,
        *,
        schedule: DiffusionSchedule,
        guidance: Guidance,
        set_sizes: list[int],
        **options: Any,
    ) -> Iterator[Tensor]:
        if self._model is not model:
            # The other samplers go on with the model as it is.
            self._model, self._tuned, self.tuning = model, share_weights(model), None
            run = TunedRun(self._tuned, schedule, guidance, set_sizes, conditioning.batch_size)
            # Anew: a record may be of another state of this package with the same version.
            print(tune_sampler(self, run, measure_again=True), file=sys.stderr)
        frames = generate_frames(
            self._tuned,
            conditioning,
            schedule=schedule,
            guidance=guidance,
            set_sizes=set_sizes,
            graphs=self.graphs,
            **options,
        )
        return frames if self.graphs is None else _from_graphs(self.graphs, frames)


def _from_graphs(graphs: SamplingGraphs, frames: Iterator[Tensor]) -> Iterator[Tensor]:
    """The frames of a run from graphs.

    Raises:
        RecordingError: in the end, if a part was not recorded. Sampling goes on without graphs
            then, and its time would pass for that of graphs.
    """
    yield from frames
    if graphs.failure is not None:
        raise RecordingError(graphs.failure)


def make_samplers(
    device: torch.device,
    *,
    compiled: bool = False,
    reference_ops: bool = False,
    progress: bool = False,
    tuned: bool = False,
    against_diffnext: bool = False,
) -> dict[str, Callable]:
    """Samplers by name; the plain one, which the others are compared with, comes first.

    Args:
        compiled: plain, exact and graphs also with `torch.compile`.
        reference_ops: also exact with plain torch in place of every op.
        progress: also exact, from graphs on a GPU, with progress bars.
        tuned: after `nova.tune`.
        against_diffnext: also the reference package, as it is and after `nova.accelerate`, on a GPU
            with CUDA graphs.

    Raises:
        ImportError: that package is not there.
    """
    samplers: dict[str, Callable] = {PLAIN: generate_frames_plain}
    if compiled:
        # What was compiled for other models counts against the limit of variants.
        torch.compiler.reset()
        samplers[PLAIN_COMPILED] = CompiledSampler(generate_frames_plain)
    if reference_ops:
        samplers[REFERENCE_OPS] = ReferenceOpsSampler()
    samplers[EXACT] = generate_frames
    if compiled:
        samplers[EXACT_COMPILED] = CompiledSampler(generate_frames)
    if device.type == "cuda":
        samplers[GRAPHS] = GraphsSampler()
        if compiled:
            samplers[GRAPHS_COMPILED] = CompiledSampler(GraphsSampler())
    if progress:
        sampler = GraphsSampler() if device.type == "cuda" else generate_frames
        samplers[PROGRESS] = ProgressSampler(sampler)
    if tuned:
        samplers[TUNED] = TunedSampler(device)
    if against_diffnext:
        samplers[DIFFNEXT] = ReferenceSampler()
        samplers[DIFFNEXT_ACCELERATED] = ReferenceSampler(
            accelerated=True, cuda_graphs=device.type == "cuda"
        )
    return samplers
