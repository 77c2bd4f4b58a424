"""Captures of CUDA graphs. Without a GPU, a stand-in does what torch.cuda does around them."""

import contextlib
import gc
import threading
import time
from collections import Counter

import pytest
import torch

from nova import graph_recording
from nova.devices import PeakMemory, idle_graph_bytes
from nova.graph_recording import CUDARecorder


class StandInCUDA:
    """What recording needs of torch.cuda: memory pools, current streams, cuBLAS's workspaces."""

    def __init__(self, monkeypatch):
        self.stream, self.pools = "default", 0
        self.graphs_of_pool = Counter()
        self.captures_underway = set()  # pools
        self.generator = StandInGenerator()
        self.pool_of_workspace = {}  # by stream
        self.workspaces_used = []  # (pool of the graph, pool of the workspace)
        cuda = self

        class Graph:
            pool = None

            def __del__(self):
                if self.pool is not None:
                    cuda.graphs_of_pool[self.pool] -= 1

        self.make_graph = Graph
        graph_recording._capture_stream.cache_clear()
        monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
        monkeypatch.setattr("torch.cuda.graph", self.graph)
        monkeypatch.setattr("torch.cuda.graph_pool_handle", self.new_pool)
        monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
        monkeypatch.setattr("torch.cuda.current_stream", lambda: self.stream)
        monkeypatch.setattr("torch.cuda.stream", self.on_stream)
        monkeypatch.setattr("torch.cuda.Stream", lambda device: f"capture on {device}")
        monkeypatch.setattr("torch.cuda.default_generators", [self.generator])
        monkeypatch.setattr("torch._C._cuda_endAllocateToPool", self.end_allocation, raising=False)
        monkeypatch.setattr(
            "torch._C._cuda_clearCublasWorkspaces", self.pool_of_workspace.clear, raising=False
        )

    def new_pool(self):
        self.pools += 1
        return (0, self.pools)

    @contextlib.contextmanager
    def on_stream(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def end_allocation(self, device, pool):
        if pool not in self.captures_underway:
            raise RuntimeError("INTERNAL ASSERT FAILED")
        self.captures_underway.remove(pool)

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        before, self.stream = self.stream, stream
        # A pool is known from its first graph on, here for good: its memory is not given back.
        if pool in self.graphs_of_pool and self.graphs_of_pool[pool] == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.graphs_of_pool[pool] += 1
        graph.pool = pool
        self.captures_underway.add(pool)
        self.generator.is_capturing = True
        yield
        self.workspaces_used.append((pool, self.pool_of_workspace.setdefault(stream, pool)))
        # None of this where the work fails: ending the capture fails then.
        self.end_allocation(0, pool)
        self.generator.is_capturing = False
        self.stream = before


class StandInGenerator:
    """torch's generator of a GPU, which draws for graphs alone while one is captured."""

    is_capturing = False

    def clone_state(self):
        return StandInGenerator()

    def graphsafe_set_state(self, other):
        self.is_capturing = other.is_capturing


@pytest.fixture
def cuda(monkeypatch):
    yield StandInCUDA(monkeypatch)
    graph_recording._capture_stream.cache_clear()


def test_graphs_share_a_pool_while_there_are_any(cuda):
    record = CUDARecorder()
    first = record(lambda: torch.ones(1))
    second = record(lambda: torch.ones(1))
    assert cuda.pools == 1 and cuda.graphs_of_pool[0, 1] == 2
    del first
    third = record(lambda: torch.ones(1))
    assert cuda.pools == 1
    del second, third
    record(lambda: torch.ones(1))
    assert cuda.pools == 2


class Cycle:
    """A graph, say, that refers to itself, so that the garbage collector alone frees it."""

    def __init__(self, freed):
        self.itself, self.freed = self, freed

    def __del__(self):
        self.freed.append(self)


@pytest.mark.parametrize("fails", [False, True])
def test_no_graph_is_freed_inside_a_capture(cuda, fails):
    freed, freed_inside = [], []

    def work():
        for _ in range(3 * sum(gc.get_threshold())):
            Cycle(freed)
        freed_inside.extend(freed)
        if fails:
            raise RuntimeError("operation not permitted")
        return torch.ones(1)

    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        CUDARecorder()(work)
    assert not freed_inside and gc.isenabled()
    gc.collect()
    assert freed


def test_graphs_use_workspaces_of_their_own_pool(cuda):
    cuda.pool_of_workspace["capture on 0"] = "of work on that stream"
    recorders = CUDARecorder(), CUDARecorder()
    graphs = [record(lambda: torch.ones(1)) for record in recorders * 2]
    assert len(graphs) == 4 and not cuda.pool_of_workspace
    assert [used for _, used in cuda.workspaces_used] == [(0, 1), (0, 2)] * 2
    assert all(pool == used for pool, used in cuda.workspaces_used)


@pytest.mark.parametrize("torch_ends_allocation", [False, True])
def test_a_failed_capture_leaves_no_trace(cuda, torch_ends_allocation):
    def fail():
        assert cuda.stream == "capture on 0" and cuda.generator.is_capturing
        cuda.pool_of_workspace[cuda.stream] = "of the failed graph's pool"
        if torch_ends_allocation:
            cuda.captures_underway.clear()
        raise RuntimeError("operation not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):
        CUDARecorder()(fail)
    assert cuda.stream == "default" and not cuda.pool_of_workspace
    assert not cuda.captures_underway and not cuda.generator.is_capturing


def test_one_graph_is_captured_at_a_time(cuda):
    def capture(index):
        captured.append(CUDARecorder()(lambda: torch.ones(1) + waited(index)))

    def waited(index):
        underway.append(len(cuda.captures_underway))
        started.set()
        time.sleep(0.05 if index == 0 else 0)
        return index

    captured, underway, started = [], [], threading.Event()
    threads = [threading.Thread(target=capture, args=(index,)) for index in range(2)]
    threads[0].start()
    assert started.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join(10)
    assert len(captured) == 2 and underway == [1, 1]


@pytest.mark.gpu
def test_work_goes_on_after_a_failed_capture():
    a = torch.randn(64, 64, device="cuda")
    with pytest.raises(RuntimeError):
        CUDARecorder()(lambda: a * a.sum().item())  # which waits
    torch.randn(4, device="cuda")
    torch.cuda.empty_cache()
    recording = CUDARecorder()(lambda: a + 1)
    recording.replay()
    assert torch.equal(recording.output, a + 1)


@pytest.mark.gpu
def test_graphs_outlive_those_of_another_recorder():
    a = torch.randn(2048, 64, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        # Few results of long sums are computed by parts, which lie in a workspace.
        first = CUDARecorder()(lambda: a.T @ a)
        second = CUDARecorder()(lambda: a.T @ a)
        second.replay()
        expected = second.output.clone()
        del first
        torch.cuda.empty_cache()
        others = torch.zeros(1 << 28, dtype=torch.uint8, device="cuda")
        second.replay()
        assert torch.equal(second.output, expected) and not others.any()


@pytest.mark.gpu
def test_memory_of_graphs_counts():
    device = torch.device("cuda")
    # Graphs of earlier tests may lie there until their memory is needed.
    gc.collect()
    torch.cuda.empty_cache()
    before = idle_graph_bytes(device)
    recording = CUDARecorder()(lambda: torch.ones(1 << 24, device=device).sum())  # 64 MiB
    assert idle_graph_bytes(device) - before >= 1 << 26
    assert PeakMemory(device).read() - torch.cuda.memory_allocated(device) >= 1 << 26
    del recording
    torch.cuda.empty_cache()
    assert idle_graph_bytes(device) <= before


@pytest.mark.gpu
def test_a_recorder_whose_graphs_are_gone():
    record, a = CUDARecorder(), torch.randn(64, 64, device="cuda")
    with torch.inference_mode():
        for _ in range(2):
            expected = a @ a
            recording = record(lambda: a @ a)
            recording.replay()
            assert torch.equal(recording.output, expected)
            del recording
