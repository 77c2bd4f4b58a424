"""The set loop from CUDA graphs: a step of hundreds of launches becomes one replay.

The shapes of a step depend on its place in the frame alone, so that one graph a set serves all
frames, and all runs of the same sizes. Recording is checked: a step is recorded after it was
computed as usual, and the first replay has to give the same tokens. Where it does not, or where
recording fails, a warning says so once, and steps are computed as usual from then on.
"""

import warnings
from collections.abc import Callable, Hashable
from typing import Protocol

import torch
from torch import Tensor

from .denoising import SetNoise
from .head import PreparedHead
from .layers import Rotary
from .set_step import FrameTensors, SetNumbers, SetSteps
from .token_order import TokenOrder

# How far a replay may be from the computed step, relative to the largest value.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Recording(Protocol):
    """Recorded work: `replay` repeats it on the same memory, and fills `output` again."""

    output: Tensor

    def replay(self) -> None: ...


class CUDAGraphRecording:
    """Work in a CUDA graph.

    Args:
        work: launches on the current stream, without waiting for the GPU.
        pool: of memory that graphs share, from `torch.cuda.graph_pool_handle`. Graphs of one pool
            overwrite each other's output.
    """

    def __init__(self, work: Callable[[], Tensor], pool: tuple[int, int]):
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that reads data, may go on using the GPU.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.output = work()

    def replay(self) -> None:
        self._graph.replay()


def cuda_recorder() -> Callable[[Callable[[], Tensor]], Recording]:
    """A function that records work into CUDA graphs of one memory pool."""
    pool = torch.cuda.graph_pool_handle()
    return lambda work: CUDAGraphRecording(work, pool)


class SetGraphs:
    """Graphs of the steps of runs. Keep it from run to run.

    The graphs of one kind of run are kept at a time: sizes, numbers of the sampler, dtype, device
    and the addresses of the weights. Another kind drops them.

    Args:
        make_recorder: makes what records; CUDA graphs by default.

    Attributes:
        failure: why steps are no longer recorded; None as long as they are.
    """

    def __init__(
        self,
        make_recorder: Callable[[], Callable[[Callable[[], Tensor]], Recording]] = cuda_recorder,
    ):
        self.failure: str | None = None
        self._make_recorder = make_recorder
        self._key: Hashable = None
        self._recorded: RecordedSteps | None = None

    def __len__(self) -> int:
        """Number of graphs."""
        return 0 if self._recorded is None else len(self._recorded)

    def clear(self) -> None:
        """Drop all graphs and their memory; a failure is forgotten too."""
        self._key, self._recorded, self.failure = None, None, None

    def for_run(self, steps: SetSteps) -> SetSteps:
        """The steps of a run, recorded or to be recorded."""
        return GraphedSteps(self, steps)

    def recorded(self, steps: SetSteps, cond: Tensor, order: TokenOrder) -> "RecordedSteps":
        """The graphs for a run's sizes; new ones if it is of another kind than the last."""
        key = _kind(steps, cond, order)
        if self._recorded is None or key != self._key:
            # The old ones go first: there may not be memory for both.
            self._recorded = None
            self._recorded = RecordedSteps(steps, cond, order, self._make_recorder())
            self._key = key
        return self._recorded

    def give_up(self, reason: str) -> None:
        """Record no more, and say so."""
        self.clear()
        self.failure = reason
        warnings.warn(f"CUDA graphs are off, sampling goes on without them: {reason}", stacklevel=2)


class GraphedSteps(SetSteps):
    """The steps of a run, replayed where there is a graph."""

    def __init__(self, graphs: SetGraphs, steps: SetSteps):
        super().__init__(steps.model, steps.head, steps.schedule, steps.guidance)
        self._graphs = graphs
        self._recorded: RecordedSteps | None = None

    def begin_frame(self, cond: Tensor, order: TokenOrder) -> FrameTensors:
        if self._graphs.failure is not None:
            return super().begin_frame(cond, order)
        self._recorded = self._graphs.recorded(self, cond, order)
        return self._recorded.begin_frame(self.head, cond, order)

    def run(self, frame: FrameTensors, drawn: SetNoise, numbers: SetNumbers) -> Tensor:
        if self._graphs.failure is not None:
            return super().run(frame, drawn, numbers)
        tokens, failure = self._recorded.run(drawn, numbers)
        if failure is not None:
            self._graphs.give_up(failure)
        return tokens


class RecordedSteps:
    """Graphs of the steps of one kind of run, and the memory that they read.

    Args:
        steps: of the first such run; later ones have the same shapes.
        record: see `SetGraphs`.
    """

    def __init__(
        self,
        steps: SetSteps,
        cond: Tensor,
        order: TokenOrder,
        record: Callable[[Callable[[], Tensor]], Recording],
    ):
        self._steps = SetSteps(steps.model, steps.head, steps.schedule, steps.guidance)
        self._record = record
        rotary = order.rotary
        if rotary is not None:
            rotary = Rotary(rotary.cos.clone(), rotary.sin.clone())
        masked = order.masked.clone()
        self._frame = FrameTensors(cond.clone(), torch.zeros_like(masked), masked, rotary)
        self._recordings: dict[SetNumbers, tuple[SetNoise, Recording]] = {}

    def __len__(self) -> int:
        return len(self._recordings)

    def begin_frame(self, head: PreparedHead, cond: Tensor, order: TokenOrder) -> FrameTensors:
        """Put a frame's tensors where the graphs read them."""
        self._frame.cond.copy_(cond)
        self._frame.masked.copy_(order.masked)
        if order.rotary is not None:
            self._frame.rotary.cos.copy_(order.rotary.cos)
            self._frame.rotary.sin.copy_(order.rotary.sin)
        # What a run prepares anew; weights themselves are where they were (see `_kind`).
        for kept, fresh in zip(_tensors(self._steps.head), _tensors(head), strict=True):
            if kept.data_ptr() != fresh.data_ptr():
                kept.copy_(fresh)
        self._steps.head.weights.renew()
        return self._frame

    def run(self, drawn: SetNoise, numbers: SetNumbers) -> tuple[Tensor, str | None]:
        """The tokens of a step, and why it could not be recorded."""
        if numbers not in self._recordings:
            return self._run_and_record(drawn, numbers)
        kept, recording = self._recordings[numbers]
        fresh = _noise_tensors(drawn)
        for target, source in zip(_noise_tensors(kept), fresh, strict=True):
            target.copy_(source)
        recording.replay()
        return recording.output, None

    def _run_and_record(self, drawn: SetNoise, numbers: SetNumbers) -> tuple[Tensor, str | None]:
        kept = drawn.map(torch.clone)

        def work() -> Tensor:
            return self._steps.run(self._frame, kept, numbers)

        tokens = work()
        try:
            recording = self._record(work)
            recording.replay()
        except RuntimeError as error:  # of CUDA; out of memory too
            return tokens, f"recording failed: {str(error).splitlines()[0]}"
        difference = (recording.output.float() - tokens.float()).abs().max()
        allowed = TOLERANCES[tokens.dtype] * tokens.float().abs().max()
        # NaN counts as different, but for tokens that are NaN without a graph as well.
        if not (difference <= allowed or tokens.isnan().any()):
            return tokens, f"a replay differed from the step by up to {difference:.2e}"
        self._recordings[numbers] = kept, recording
        return tokens, None


def _kind(steps: SetSteps, cond: Tensor, order: TokenOrder) -> Hashable:
    """What must be equal for graphs to serve a run."""
    return (
        cond.shape,
        order.masked.shape,
        order.rotary is None,
        cond.dtype,
        cond.device,
        steps.schedule,
        steps.guidance,
        tuple(module.backend for module in steps.model.modules() if hasattr(module, "backend")),
        tuple(block.attn.attention_library for block in steps.model.image_encoder.blocks),
        tuple(parameter.data_ptr() for parameter in steps.model.parameters()),
    )


def _tensors(head: PreparedHead) -> list[Tensor]:
    return [head.time_embeddings, *head.weights.tensors()]


def _noise_tensors(drawn: SetNoise) -> list[Tensor]:
    tensors = [drawn.x, drawn.noise]
    if drawn.outside is not None:
        tensors += [drawn.outside.tokens, drawn.outside.noise]
    return [tensor for tensor in tensors if tensor is not None]
