"""The time of a call in a CUDA graph. Without a GPU, a stand-in keeps a GPU's clock."""

import pytest
import torch
from graph_times import LEAST_US, MOST_CALLS, REPLAYS, graph_microseconds

from nova.graph_recording import CUDARecorder, RecordingError


class StandInGPU:
    """A host and a GPU that works behind it; times in microseconds.

    Args:
        kernel: a call takes on the GPU.
        launch: a replay takes on the host.
    """

    def __init__(self, monkeypatch, kernel, launch):
        self.kernel, self.launch = kernel, launch
        self.host = self.gpu = 0.0  # what either has reached
        self.calls = 0
        self.graphs = []  # calls of each
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                # The host has reached it, and the GPU all that was launched before.
                self.at = gpu.gpu = max(gpu.gpu, gpu.host)

            def synchronize(self):
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)

    def call(self):
        self.calls += 1
        return torch.ones(2)

    def record(self, work):
        before = self.calls
        recording = StandInRecording(self, work)
        recording.calls = self.calls - before
        self.graphs.append(recording.calls)
        return recording


class StandInRecording:
    def __init__(self, gpu, work):
        self.gpu, self.output, self.replays = gpu, work(), 0

    def replay(self):
        self.replays += 1
        self.gpu.host += self.gpu.launch
        self.gpu.gpu = max(self.gpu.gpu, self.gpu.host) + self.calls * self.gpu.kernel


@pytest.mark.parametrize("launch", [5.0, 60.0])
@pytest.mark.parametrize("eager", [3.0, 170.0])
def test_launches_do_not_count(monkeypatch, launch, eager):
    gpu = StandInGPU(monkeypatch, kernel=2.0, launch=launch)
    assert graph_microseconds(gpu.call, eager, gpu.record) == pytest.approx(2.0)
    assert gpu.graphs[-1] * 2.0 >= LEAST_US and len(gpu.graphs) <= 4


def test_a_long_call_is_captured_once(monkeypatch):
    gpu = StandInGPU(monkeypatch, kernel=3000.0, launch=5.0)
    assert graph_microseconds(gpu.call, 3100.0, gpu.record) == pytest.approx(3000)
    assert gpu.graphs == [1]
    # The check of the first replay, and two for each that is timed.
    assert gpu.gpu <= (1 + 2 * REPLAYS) * 3100


def test_graphs_do_not_grow_without_end(monkeypatch):
    gpu = StandInGPU(monkeypatch, kernel=1e-6, launch=0.0)
    assert graph_microseconds(gpu.call, 1e-3, gpu.record) == pytest.approx(1e-6)
    assert gpu.graphs == [MOST_CALLS]


def test_a_replay_that_gives_something_else_is_refused(monkeypatch):
    gpu = StandInGPU(monkeypatch, kernel=2.0, launch=5.0)

    def record(work):
        recording = gpu.record(work)
        recording.output += 1
        return recording

    with pytest.raises(RecordingError, match="differed"):
        graph_microseconds(gpu.call, 3.0, record)


@pytest.mark.gpu
def test_calls_on_a_gpu():
    a = torch.ones(72, 1280, device="cuda")
    with torch.no_grad():
        assert 0 < graph_microseconds(lambda: a + 1, 30.0)
        with pytest.raises(RecordingError, match="recording failed"):
            graph_microseconds(lambda: a * a.sum().item(), 30.0)  # which waits
        assert 0 < graph_microseconds(lambda: a + 1, 30.0, CUDARecorder())
