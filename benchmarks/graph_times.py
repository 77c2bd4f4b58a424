"""The time of a call in a CUDA graph, from which the sampler runs all ops, by the GPU's clock.

Called from Python, a small op takes as long as the host takes to launch it, whatever its kernel
does.
"""

import statistics
from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor

from nova.graph_recording import CUDARecorder, Recorder, Recording, record_checked

# A graph takes at least so many microseconds, so that starting it does not count, or has so many
# calls.
LEAST_US, MOST_CALLS = 200.0, 1000
REPLAYS = 5


def graph_microseconds(
    call: Callable[[], Tensor], eager_us: float, record: Recorder | None = None
) -> float:
    """A call's share of a graph of many: its kernels, and the gaps between them.

    Caches are not flushed: tensors that fit the L2 cache stay there from call to call.

    Args:
        call: launches on the current stream, gives the same whenever it is called, and was called
            before, so that nothing is compiled any more.
        eager_us: about what it takes outside of a graph, to begin with.
        record: None: into graphs of the current GPU.

    Raises:
        RecordingError: it cannot be captured, or a replay gives something else.
    """
    record = CUDARecorder() if record is None else record
    expected = call()
    calls = min(ceil(LEAST_US / eager_us), MOST_CALLS)
    while True:
        recording = record_checked(_repeated(call, calls), expected, record)
        time = replay_microseconds(recording)
        if time >= LEAST_US or calls == MOST_CALLS:
            return time / calls
        # Twice as many as seem to do, since starting a short graph is part of its time.
        calls = min(calls * ceil(2 * LEAST_US / time), MOST_CALLS)


def replay_microseconds(recording: Recording) -> float:
    """Median time of a replay."""
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Keeps the GPU busy while the host launches what is timed, which would count otherwise.
        recording.replay()
        begin.record()
        recording.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times)


def _repeated(call: Callable[[], Tensor], calls: int) -> Callable[[], Tensor]:
    def run() -> Tensor:
        for _ in range(calls - 1):
            call()  # and its result is let go, so that all use the same memory
        return call()

    return run
