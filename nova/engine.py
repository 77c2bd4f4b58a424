"""Sampling from CUDA graphs: what costs hundreds of launches becomes one replay.

Recording is checked: work is recorded after it was computed as usual, and the first replay has to
give the same. Where it does not, or where recording fails, a warning says so once, and that part of
sampling is computed as usual from then on.
"""

from collections.abc import Sequence

from .conditioning import Conditioning
from .graph_cache import GraphCache
from .graph_recording import CUDARecorder, Recorder
from .guidance import Guidance
from .model import NOVATransformer
from .set_graphs import GraphedSteps, RecordedSteps
from .set_step import SetSteps
from .video_context import VideoContext
from .video_graphs import RecordedContext, graphed_context


class SamplingGraphs:
    """Graphs of the set loop and of the video encoder. Keep it from run to run.

    The graphs of one kind of run are kept at a time: sizes, numbers of the sampler, dtype, device,
    backends of the ops and the addresses of the weights. Another kind drops them.

    Args:
        record: records work; by default into CUDA graphs of one memory pool.

    Attributes:
        sets, frames: graphs of the steps of the set loop, and of the video encoder's passes.
    """

    def __init__(self, record: Recorder | None = None):
        record = CUDARecorder() if record is None else record
        self.sets: GraphCache[RecordedSteps] = GraphCache("set loop", record)
        self.frames: GraphCache[RecordedContext] = GraphCache("video encoder", record)

    def __len__(self) -> int:
        """Number of graphs."""
        return len(self.sets) + len(self.frames)

    @property
    def failure(self) -> str | None:
        """Why a part is no longer recorded; None as long as all is."""
        failed = [part for part in (self.sets, self.frames) if part.failure is not None]
        reasons = [f"{part.name}: {part.failure}" for part in failed]
        return "; ".join(reasons) or None

    def clear(self) -> None:
        """Drop all graphs and their memory; failures are forgotten too."""
        self.sets.clear()
        self.frames.clear()

    def steps(self, steps: SetSteps, set_sizes: Sequence[int]) -> SetSteps:
        """The steps of a run with these sets, recorded or to be recorded."""
        return GraphedSteps(self.sets, steps, set_sizes)

    def video_context(
        self,
        model: NOVATransformer,
        conditioning: Conditioning,
        guidance: Guidance,
        num_frames: int,
    ) -> VideoContext:
        """The frame loop's state in a run, its passes recorded or to be recorded."""
        return graphed_context(self.frames, model, conditioning, guidance, num_frames)
