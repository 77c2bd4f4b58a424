"""Work recorded once and replayed: CUDA graphs, and the check that replays do the same."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

# How far a replay may be from the computed result, relative to the largest value.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Recording(Protocol):
    """Recorded work: `replay` repeats it on the same memory, and fills `output` again."""

    output: Tensor

    def replay(self) -> None: ...


Recorder = Callable[[Callable[[], Tensor]], Recording]


class RecordingError(RuntimeError):
    """Work that cannot be recorded, or a replay that does something else."""


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


def cuda_recorder() -> Recorder:
    """A function that records work into CUDA graphs of one memory pool."""
    pool = torch.cuda.graph_pool_handle()
    return lambda work: CUDAGraphRecording(work, pool)


def record_checked(work: Callable[[], Tensor], expected: Tensor, record: Recorder) -> Recording:
    """Record work, and hold the first replay against what the work gave without it.

    Args:
        work: gives the same whenever it is called.
        expected: what it gave.

    Raises:
        RecordingError: recording failed, or the replay differs from `expected`.
    """
    try:
        recording = record(work)
        recording.replay()
    except RuntimeError as error:  # of CUDA; out of memory too
        raise RecordingError(f"recording failed: {str(error).splitlines()[0]}") from error
    difference = (recording.output.float() - expected.float()).abs().max()
    allowed = TOLERANCES[expected.dtype] * expected.float().abs().max()
    # NaN counts as different, but for results that are NaN without a graph as well.
    if not (difference <= allowed or expected.isnan().any()):
        raise RecordingError(f"a replay differed from the work by up to {difference:.2e}")
    return recording
