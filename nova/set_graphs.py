"""The set loop from graphs: a step of hundreds of launches becomes one replay.

The shapes of a step depend on its place in the frame alone, so that one graph a set serves all
frames, and all runs of the same sizes.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .denoising import SetNoise
from .graph_cache import GraphCache, weights_key
from .graph_recording import Recorder, Recording, RecordingError, record_checked
from .head import PreparedHead
from .layers import Rotary
from .set_step import FrameTensors, SetNumbers, SetSteps
from .token_order import TokenOrder


class GraphedSteps(SetSteps):
    """The steps of a run, replayed where there is a graph.

    Args:
        set_sizes: of the run; others would need other graphs.
    """

    def __init__(
        self, cache: "GraphCache[RecordedSteps]", steps: SetSteps, set_sizes: Sequence[int]
    ):
        super().__init__(steps.model, steps.head, steps.schedule, steps.guidance, steps.blocks)
        self._cache = cache
        self._set_sizes = tuple(set_sizes)
        self._recorded: RecordedSteps | None = None

    @contextmanager
    def frame(self, cond: Tensor, order: TokenOrder) -> Iterator[FrameTensors]:
        recorded = self._recorded_steps(cond, order)
        # A callback may sample another clip inside a frame, whose tensors are in use.
        if recorded is None or recorded.in_use:
            with super().frame(cond, order) as tensors:
                yield tensors
            return
        recorded.in_use, self._recorded = True, recorded
        del recorded  # so that it is freed where recording fails
        try:
            yield self._recorded.begin_frame(self, cond, order)
        finally:
            if self._recorded is not None:
                self._recorded.in_use, self._recorded = False, None

    def _recorded_steps(self, cond: Tensor, order: TokenOrder) -> "RecordedSteps | None":
        if self._cache.failure is not None:
            return None
        try:
            return self._cache.get(
                self._key(cond, order), lambda record: RecordedSteps(self, cond, order, record)
            )
        except RecordingError as error:
            self._cache.give_up(str(error))
            return None

    def run(self, frame: FrameTensors, drawn: SetNoise, numbers: SetNumbers) -> Tensor:
        # Failures are forgotten when graphs are dropped, as a callback may do inside a frame.
        if self._recorded is None or self._cache.failure is not None:
            return super().run(frame, drawn, numbers)
        try:
            return self._recorded.run(drawn, numbers)
        except RecordingError as error:
            self._cache.give_up(str(error))
        # Only here is the error gone, whose traceback refers to the attempt's memory.
        self._recorded = None
        return super().run(frame, drawn, numbers)

    def _key(self, cond: Tensor, order: TokenOrder) -> Hashable:
        """What must be equal for graphs to serve a run."""
        return (
            cond.shape,
            order.masked.shape,
            order.rotary is None,
            cond.dtype,
            cond.device,
            self._set_sizes,
            self.schedule,
            self.guidance,
            weights_key(self.model),
        )


class RecordedSteps:
    """Graphs of the steps of one kind of run, and the memory that they read.

    Args:
        steps: of the first such run; later ones have the same shapes.

    Attributes:
        in_use: whether a frame is being made in that memory.
    """

    def __init__(self, steps: SetSteps, cond: Tensor, order: TokenOrder, record: Recorder):
        self._steps = SetSteps(
            steps.model, steps.head, steps.schedule, steps.guidance, steps.blocks
        )
        self._record = record
        self.in_use = False
        rotary = order.rotary
        if rotary is not None:
            rotary = Rotary(rotary.cos.clone(), rotary.sin.clone())
        masked = order.masked.clone()
        self._frame = FrameTensors(cond.clone(), torch.zeros_like(masked), masked, rotary)
        self._recordings: dict[SetNumbers, tuple[SetNoise, Recording]] = {}

    def __len__(self) -> int:
        return len(self._recordings)

    def begin_frame(self, steps: SetSteps, cond: Tensor, order: TokenOrder) -> FrameTensors:
        """Put a frame's tensors, and what its run prepared, where the graphs read them."""
        self._frame.cond.copy_(cond)
        self._frame.masked.copy_(order.masked)
        if order.rotary is not None:
            self._frame.rotary.cos.copy_(order.rotary.cos)
            self._frame.rotary.sin.copy_(order.rotary.sin)
        # Weights themselves are where they were (see `weights_key`).
        for kept, fresh in zip(_tensors(self._steps.head), _tensors(steps.head), strict=True):
            if kept.data_ptr() != fresh.data_ptr():
                kept.copy_(fresh)
        self._steps.blocks = steps.blocks
        self._steps.head.weights.renew()
        return self._frame

    def run(self, drawn: SetNoise, numbers: SetNumbers) -> Tensor:
        """The tokens of a step, which is recorded when it first runs.

        Raises:
            RecordingError: it could not be.
        """
        if numbers not in self._recordings:
            return self._run_and_record(drawn, numbers)
        kept, recording = self._recordings[numbers]
        fresh = _noise_tensors(drawn)
        for target, source in zip(_noise_tensors(kept), fresh, strict=True):
            target.copy_(source)
        recording.replay()
        return recording.output

    def _run_and_record(self, drawn: SetNoise, numbers: SetNumbers) -> Tensor:
        kept = drawn.map(torch.clone)

        def work() -> Tensor:
            return self._steps.run(self._frame, kept, numbers)

        tokens = work()
        self._recordings[numbers] = kept, record_checked(work, tokens, self._record)
        return tokens


def _tensors(head: PreparedHead) -> list[Tensor]:
    return [head.time_embeddings, *head.weights.tensors()]


def _noise_tensors(drawn: SetNoise) -> list[Tensor]:
    tensors = [drawn.x, drawn.noise]
    if drawn.outside is not None:
        tensors += [drawn.outside.tokens, drawn.outside.noise]
    return [tensor for tensor in tensors if tensor is not None]
