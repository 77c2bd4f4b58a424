"""The video encoder from graphs: reading a frame becomes one replay.

A graph for every place of a frame in the clip, since later frames see more, and one for the pass
over the prompt and the given frames. Keys and values stay where the graphs were recorded.
"""

from collections.abc import Hashable
from dataclasses import replace
from weakref import ref

from torch import Tensor

from .conditioning import Conditioning
from .graph_cache import GraphCache, weights_key
from .graph_recording import Recorder, Recording, RecordingError, record_checked
from .guidance import Guidance
from .model import NOVATransformer
from .video_context import VideoContext


class RecordedContext(VideoContext):
    """A context for one run after the other, whose passes are recorded when they first run.

    Args:
        cache: where it is kept.
    """

    def __init__(
        self,
        cache: "GraphCache[RecordedContext]",
        model: NOVATransformer,
        conditioning: Conditioning,
        guidance: Guidance,
        num_frames: int,
        record: Recorder,
    ):
        kept = replace(conditioning, tokens=conditioning.tokens.clone())
        super().__init__(model, kept, guidance, num_frames)
        self.in_use = False
        # The cache refers to this: in a cycle, graphs and their memory would stay for a while.
        self._cache_ref, self._record = ref(cache), record
        self._weights = weights_key(model)
        self._recordings: dict[tuple[int, int], tuple[Tensor | None, Recording]] = {}

    def __len__(self) -> int:
        return len(self._recordings)

    def renew(self, conditioning: Conditioning) -> None:
        """Begin a run: put what it brings where the graphs read it."""
        self.in_use = True
        self.num_seen = 0
        self._conditioning.tokens.copy_(conditioning.tokens)
        if self._positions is not None:
            # They are computed from weights, which may have changed in place.
            self._positions.copy_(self._model.video_positions(self._num_frames))

    def close(self) -> None:
        """End the run; the next one may have the memory."""
        self.in_use = False

    def _read(self, latents: Tensor | None, start: int, stop: int) -> Tensor:
        cache = self._cache_ref()
        if cache is None or cache.failure is not None or self._changed():
            return super()._read(latents, start, stop)
        if (start, stop) in self._recordings:
            kept, recording = self._recordings[start, stop]
            if kept is not None:
                kept.copy_(latents)
            recording.replay()
            return recording.output
        kept = None if latents is None else latents.clone()

        def work() -> Tensor:
            return VideoContext._read(self, kept, start, stop)

        cond = work().clone()  # of frame 0 it is memory that the replay writes
        try:
            self._recordings[start, stop] = kept, record_checked(work, cond, self._record)
            return cond
        except RecordingError as error:
            cache.give_up(str(error))
        # Only here is the error gone, whose traceback refers to the attempt's memory.
        self._recordings.clear()
        # A wrong replay may have left wrong keys and values.
        return work()

    def _changed(self) -> bool:
        """Whether the model was moved or changed since the run began, as a callback may do."""
        try:
            return weights_key(self._model) != self._weights
        except RecordingError:
            return True  # the next run says why


def graphed_context(
    cache: GraphCache[RecordedContext],
    model: NOVATransformer,
    conditioning: Conditioning,
    guidance: Guidance,
    num_frames: int,
) -> VideoContext:
    """The context of a run, from graphs unless another run has their memory."""
    run = model, conditioning, guidance, num_frames
    if cache.failure is not None:
        return VideoContext(*run)
    try:
        recorded = cache.get(_key(*run), lambda record: RecordedContext(cache, *run, record))
    except RecordingError as error:
        cache.give_up(str(error))
        return VideoContext(*run)
    # Two clips may be streamed in turn; keys and values are one clip's until its end.
    if recorded.in_use:
        return VideoContext(*run)
    recorded.renew(conditioning)
    return recorded


def _key(
    model: NOVATransformer, conditioning: Conditioning, guidance: Guidance, num_frames: int
) -> Hashable:
    """What must be equal for graphs to serve a run."""
    tokens = conditioning.tokens
    return (
        tokens.shape,
        tokens.dtype,
        tokens.device,
        guidance.passes,
        num_frames,
        weights_key(model),
    )
