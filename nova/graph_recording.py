"""Work recorded once and replayed: CUDA graphs, and the check that replays do the same."""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor

# How far a replay may be from the computed result, relative to the largest value.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


class Recording(Protocol):
    """Recorded work: `replay` repeats it on the same memory, and fills `output` again."""

    output: Tensor

    def replay(self) -> None: ...


Recorder = Callable[[Callable[[], Tensor]], Recording]

# torch captures one graph at a time in a process.
_CAPTURE = threading.Lock()


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
        device = torch.cuda.current_device()
        # Other threads, such as one that reads data, may go on using the GPU.
        capture = torch.cuda.graph(
            self._graph,
            pool=pool,
            stream=_capture_stream(device),
            capture_error_mode="thread_local",
        )
        with (
            _CAPTURE,
            _no_garbage_collection(),
            _undone_if_failed(device, pool),
            _own_cublas_workspaces(),
            capture,
        ):
            self.output = work()

    def replay(self) -> None:
        self._graph.replay()


class CUDARecorder:
    """Records work on the current GPU into CUDA graphs, which share a pool of memory."""

    def __init__(self) -> None:
        self._pool: tuple[int, int] | None = None
        self._recordings: WeakSet[CUDAGraphRecording] = WeakSet()

    def __call__(self, work: Callable[[], Tensor]) -> Recording:
        if not self._recordings:
            # torch refuses a pool whose graphs are all gone, while it still has memory of it.
            self._pool = torch.cuda.graph_pool_handle()
        recording = CUDAGraphRecording(work, self._pool)
        self._recordings.add(recording)
        return recording


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One a GPU, since torch's own is of a single GPU."""
    return torch.cuda.Stream(device)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Leave cycles where they are until the capture inside has ended.

    A graph that goes meanwhile breaks it off (https://github.com/pytorch/pytorch/pull/161037).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _undone_if_failed(device: int, pool: tuple[int, int]) -> Iterator[None]:
    """Take back what torch leaves of a capture that failed inside, so that work can go on."""
    with torch.cuda.stream(torch.cuda.current_stream()):  # torch leaves the capture's
        try:
            yield
        except BaseException:
            # torch's generator would refuse to draw outside graphs; a copy of its state does not.
            generator = torch.cuda.default_generators[device]
            generator.graphsafe_set_state(generator.clone_state())
            # Until torch 2.12 allocations went on into the pool, and freeing memory failed
            # (https://github.com/pytorch/pytorch/pull/180395). Later ones refuse to end that twice.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(device, pool)
            raise


@contextmanager
def _own_cublas_workspaces() -> Iterator[None]:
    """Give what is captured inside workspaces of its graph's pool.

    torch keeps cuBLAS's workspaces by stream. Graphs captured on one stream would use the same,
    from whichever pool came first; torch 2.13 frees them with the first graph that goes, while the
    others still write there (https://github.com/pytorch/pytorch/issues/193402).
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def record_checked(work: Callable[[], Tensor], expected: Tensor, record: Recorder) -> Recording:
    """Record work, and hold the first replay against what the work gave without it.

    Args:
        work: gives the same whenever it is called.
        expected: what it gave.

    Raises:
        RecordingError: recording failed, or the replay differs from `expected`.
    """
    try:
        with torch.cuda.device_of(expected):  # what is captured is work on the current GPU alone
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
