"""benchmarks/op_times.py, and through it the compilation of every Triton kernel for both cards."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import kernel_cases
import measure
import op_times
import pytest
import torch
from ceilings import Ceilings
from kernel_testing import needs_triton
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nova.config import NAMED_CONFIGS, ModelConfig
from nova.graph_recording import RecordingError
from nova_kernels.dispatch import HAS_TRITON
from nova_kernels.errors import BackendError
from nova_kernels.ops.block_causal_attention import HEAD_DIMS

ROOT = Path(__file__).resolve().parent.parent
# Triton before 3.6 makes the same kernels with more registers.
TRITON = metadata.version("triton").split(".")[:2] if HAS_TRITON else ["0", "0"]
needs_compiler = pytest.mark.skipif(
    tuple(map(int, TRITON)) < (3, 6), reason="Triton 3.6 or newer is not installed"
)


@pytest.fixture
def in_graphs(monkeypatch):
    """Calls "captured in graphs", which take two microseconds there."""
    captured = []

    def graph_microseconds(call, eager_us):
        captured.append(call())
        return 2.0

    monkeypatch.setattr(op_times, "graph_microseconds", graph_microseconds)
    return captured


def run(*arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "op_times.py", *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )


@needs_compiler
def test_every_kernel_compiles_for_both_cards_without_spills_that_cost(tmp_path):
    result = run("--compile-report", "--json", tmp_path / "report.json")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    modules = {path.stem for path in (ROOT / "nova_kernels" / "triton_kernels").glob("[a-z]*.py")}
    ops = {path.stem for path in (ROOT / "nova_kernels" / "ops").glob("[a-z]*.py")}
    assert {row["op"] for row in rows} == ops & modules and len(ops & modules) == 7
    for row in rows:
        assert row["shared_memory"] <= row["limit"] and 0 < row["occupancy"] <= 1, row
        assert row["costly_spills"] == 0 or not row["real"], row
    cards = [{row["case"] for row in rows if row["architecture"] == a} for a in (80, 90)]
    assert cards[0] == cards[1]


FMA = "  /*0180*/  FFMA R4, R2, R3, R4 ;\n"
END = ".L_x_9:\n  /*0900*/  BRA `(.L_x_9);\n  /*0910*/  NOP;\n"
STORE = "  /*0110*/  STL.64 [R1+0x8], R38 ;\n"
LOAD = "  /*0210*/  LDL.LU.64 R16, [R1+0x8] ;\n"


@needs_triton
@pytest.mark.parametrize(
    "listing, costly",
    [
        (STORE + LOAD, 2),  # no loop: every element pays
        (STORE + ".L_x_0:\n" + FMA + "  @!P0 BRA `(.L_x_0) ;\n" + LOAD, 0),
        (STORE + ".L_x_0:\n" + FMA + LOAD + "  @!P0 BRA `(.L_x_0) ;\n" + LOAD, 1),
        (STORE + "  @P1 BRA `(.L_x_3) ;\n" + LOAD + ".L_x_3:\n", 2),  # a jump forwards is no loop
    ],
    ids=["straight", "around a loop", "in a loop", "a branch"],
)
def test_spills_that_cost_are_those_in_loops(listing, costly):
    from nova_kernels.triton_kernels.ahead_of_time import costly_spills

    assert costly_spills(listing + END) == costly


@needs_triton
def test_compiling_with_an_old_triton_is_refused(monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.2.0")
    from nova_kernels.triton_kernels.ahead_of_time import compile_for
    from nova_kernels.triton_kernels.compile_cases import compile_cases

    with pytest.raises(BackendError, match="Triton 3.3 or newer, this is 3.2.0"):
        compile_for(next(iter(compile_cases())).launch, 80)


@needs_triton
def test_widths_of_all_models_are_compiled():
    from nova_kernels.triton_kernels.compile_cases import MIXERS, WIDTHS

    models = [config for name, config in NAMED_CONFIGS.items() if name.startswith("nova-")]
    shapes = ROOT / "nova" / "models" / "shapes" / "transformer" / "config.json"
    models.append(ModelConfig.from_dict(json.loads(shapes.read_text())))
    parts = [(m.image_encoder.embed_dim, m.image_decoder.embed_dim) for m in models]
    assert {width for widths in parts for width in widths} == set(WIDTHS)
    mixers = {(m.image_encoder.embed_dim, m.video_mixer_rank) for m in models}
    assert {(width, rank) for width, rank in mixers if rank is not None} <= set(MIXERS)


@needs_triton
@pytest.mark.parametrize(
    "kernel, table",
    [
        ("attention_forward_kernel", "FORWARD"),
        ("attention_query_gradient_kernel", "QUERY_GRADIENT"),
        ("attention_key_gradient_kernel", "KEY_GRADIENT"),
    ],
)
def test_tiles_of_all_heads_are_compiled(kernel, table):
    from nova_kernels.triton_kernels import block_causal_attention as attention
    from nova_kernels.triton_kernels.compile_cases import compile_cases

    compiled = {
        (
            launch.constants["BLOCK_DIM"],
            attention.TileSetting(
                launch.constants["BLOCK_QUERIES"],
                launch.constants["BLOCK_KEYS"],
                launch.num_warps,
                launch.num_stages,
            ),
        )
        for launch in (case.launch for case in compile_cases())
        if launch.kernel.__name__ == kernel
    }
    used = [*getattr(attention, table).items(), (max(HEAD_DIMS), attention.EXACT)]
    assert compiled == {(1 << (head_dim - 1).bit_length(), tile) for head_dim, tile in used}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is measured instead")
def test_costs_without_a_gpu(tmp_path):
    result = run("--op", "residual_norm", "--json", tmp_path / "costs.json")
    assert result.returncode == 0, result.stderr
    assert "nothing was timed" in result.stdout
    row, *_ = json.loads((tmp_path / "costs.json").read_text())["rows"]
    # Two tensors read and one written, in bfloat16.
    assert row["bytes"] == 3 * 48 * 1800 * 1024 * 2
    assert row["A100_floor_us"] == pytest.approx(row["bytes"] / 2.039e12 * 1e6)


def test_torch_compile_is_timed_as_such(monkeypatch, in_graphs):
    """Every case is compiled for its own shape, forward and backward, which run several times."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return aot_eager(graph, inputs)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: torch_compile(function, backend=backend))
    monkeypatch.setattr(op_times, "BACKENDS", ("reference",))
    monkeypatch.setattr(op_times, "milliseconds", lambda call: len([call(), call()]))
    limits = Ceilings(1e12, 1e12)
    for count, width in enumerate(range(8, 18), start=1):
        case = kernel_cases.residual_norm(6, width)
        rows = op_times.measure(case, torch.device("cpu"), torch.float32, limits)
        timed = [row["direction"] for row in rows if row["implementation"] == "torch.compile"]
        assert timed == ["forward", "backward"]
        assert len(compiled) == 2 * count  # with gradients and without


def test_only_what_is_written_is_tried():
    def names(case):
        return op_times.implementations(case, compiled=False).keys()

    assert names(kernel_cases.residual_norm(6, 8)) == {"reference", "triton", "cuda"}
    assert names(kernel_cases.rope3d(2, 8, 2, 32)) == {"reference", "triton"}
    attention = kernel_cases.attention("one clip", [4, 2], heads=2, head_dim=32, batch=1)
    assert names(attention) >= {"reference", "triton", "SDPA with a mask"}
    added = op_times.implementations(attention).keys() - names(attention)
    assert added == {"torch.compile", "FlexAttention"}


@pytest.mark.parametrize(
    "case",
    [
        kernel_cases.residual_norm(512, 32),
        kernel_cases.scale_shift(12, 32),
        kernel_cases.linear_gelu(12, 32),
        kernel_cases.frame_scale_shift(2, 6, 32, 4),
        kernel_cases.rope3d(2, 6, 2, 32),
        kernel_cases.diffusion_step(2, 6, 4),
        kernel_cases.attention("one clip", [4, 2], heads=2, head_dim=32, batch=2, prefix=3),
    ],
    ids=lambda case: case.op,
)
def test_costs_are_those_of_a_call(case):
    inputs = case.make(torch.device("cpu"), torch.float32)
    # Only as products of matrices is attention counted on a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = case.run("reference", *inputs)
    moved = inputs[: len(inputs) - case.num_tables] + [result]
    # A norm's weights, two rows among thousands, are not counted.
    assert case.elements[0] == pytest.approx(sum(tensor.numel() for tensor in moved), rel=2e-3)
    assert case.operations[0] == counter.get_total_flops()


def test_a_peer_that_fails_is_left_out(monkeypatch):
    def fail(*inputs):
        raise RuntimeError("no kernel image\nis there")

    case, device = kernel_cases.residual_norm(6, 8), torch.device("cpu")
    reference = op_times.implementations(case)["reference"]
    calls = {"reference": reference, "peer": fail, "cuda": fail}
    refused = op_times.gate(case, calls, device, torch.float32)
    assert refused["peer"] == "failed: RuntimeError: no kernel image"
    assert refused["cuda"].startswith("wrong: ")  # of ours everything has to run or say so


def failing_later(call, monkeypatch):
    """A call whose work fails when its results are read, as a GPU's does."""
    relative_error = op_times.relative_error

    def run(*inputs):
        result = call(*inputs)
        run.results.append(result)
        return result

    def read(result, right):
        if any(result is one for one in run.results):
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")
        return relative_error(result, right)

    run.results = []
    monkeypatch.setattr(op_times, "relative_error", read)
    return run


@pytest.mark.parametrize("is_lost", [False, True])
def test_work_that_fails_later_is_refused(monkeypatch, in_graphs, is_lost):
    case, device = kernel_cases.diffusion_step(2, 4, 6), torch.device("cpu")
    reference = op_times.implementations(case)["reference"]
    failing = failing_later(reference, monkeypatch)
    calls = {"reference": reference, "cuda": failing, "peer": reference}
    monkeypatch.setattr(op_times, "implementations", lambda case, compiled: calls)
    monkeypatch.setattr(op_times, "milliseconds", lambda call: 1.0)
    monkeypatch.setattr(op_times, "is_lost", lambda device: is_lost and bool(failing.results))
    rows = op_times.measure(case, device, torch.float32, Ceilings(1e12, 1e12))
    assert rows[0]["implementation"] == "cuda"
    assert rows[0]["refused"].startswith("wrong: RuntimeError: CUDA error: an illegal memory")
    timed = [row["implementation"] for row in rows[1:]]
    assert timed == ([] if is_lost else ["reference", "peer"] * len(op_times.directions(case)))


def test_the_command_ends_with_a_lost_gpu(tmp_path, monkeypatch, capsys):
    """A peer, which alone would be no failure of the command, takes the GPU along."""
    file, measured = tmp_path / "op_times.json", []
    cases = [kernel_cases.residual_norm(6, 8), kernel_cases.scale_shift(6, 8)] * 2

    def measure_case(case, device, dtype, limits, *, compiled):
        measured.append(case.op)
        row = {"op": case.op, "shape": case.shape, "implementation": "peer"}
        return [row | {"refused": "failed: an illegal memory access"}]

    def synchronize(device):
        if len(measured) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(op_times, "machine", lambda device: {"name": "a card", "torch": "2"})
    monkeypatch.setattr(op_times, "measure_ceilings", lambda *to: Ceilings(1e12, 1e12))
    monkeypatch.setattr(op_times, "kernel_cases", lambda: cases)
    monkeypatch.setattr(op_times, "measure", measure_case)
    monkeypatch.setattr(measure, "synchronize", synchronize)
    monkeypatch.setattr(sys, "argv", ["op_times.py", "--json", str(file)])
    assert op_times.main() == 1
    assert [row["op"] for row in json.loads(file.read_text())["rows"]] == measured
    assert len(measured) == 2
    assert "the GPU refuses all work after scale_shift" in capsys.readouterr().err


def test_what_cannot_be_timed_is_left_out(monkeypatch):
    case, device = kernel_cases.residual_norm(6, 8), torch.device("cpu")
    reference = op_times.implementations(case)["reference"]
    monkeypatch.setattr(
        op_times, "implementations", lambda case, compiled: {"reference": reference}
    )

    def fail(call):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(op_times, "milliseconds", fail)
    rows = op_times.measure(case, device, torch.float32, Ceilings(1e12, 1e12))
    assert [row["direction"] for row in rows] == ["forward", "backward"]
    assert all(row["refused"] == "failed: OutOfMemoryError: CUDA out of memory" for row in rows)


def measured(monkeypatch):
    """Rows of plain torch, forward and backward, called in 4 us."""
    case = kernel_cases.residual_norm(100, 50)
    reference = op_times.implementations(case)["reference"]
    monkeypatch.setattr(
        op_times, "implementations", lambda case, compiled: {"reference": reference}
    )
    monkeypatch.setattr(op_times, "milliseconds", lambda call: 4e-3)
    return op_times.measure(case, torch.device("cpu"), torch.float32, Ceilings(1e12, 1e12))


def test_forward_passes_are_timed_in_graphs(monkeypatch, in_graphs, capsys):
    forward, backward = rows = measured(monkeypatch)
    assert len(in_graphs) == 1 and not in_graphs[0].requires_grad
    assert (forward["timed"], backward["timed"]) == ("graph", "eager")
    assert (forward["microseconds"], forward["eager_us"]) == (2.0, 4.0)
    assert (backward["microseconds"], backward["eager_us"]) == (4.0, 4.0)
    # Three tensors of 20 kB, at the time that counts.
    assert forward["GB_per_s"] == pytest.approx(30) and backward["GB_per_s"] == pytest.approx(15)
    assert forward["share_of_ceiling"] == pytest.approx(0.03)
    op_times.print_times(rows, {"name": "a card", "torch": "2"})
    assert "timed" in (text := capsys.readouterr().out) and "eager us" in text
    assert "no graph" not in text


@pytest.mark.parametrize("is_lost", [False, True])
def test_what_cannot_be_captured_has_its_eager_time(monkeypatch, capsys, is_lost):
    failed = []

    def fail(call, eager_us):
        failed.append(call)
        raise RecordingError("recording failed: operation not permitted")

    monkeypatch.setattr(op_times, "graph_microseconds", fail)
    monkeypatch.setattr(op_times, "is_lost", lambda device: is_lost and bool(failed))
    forward, *later = rows = measured(monkeypatch)
    assert (forward["timed"], forward["microseconds"], forward["eager_us"]) == ("eager", 4.0, 4.0)
    assert forward["no_graph"] == "RecordingError: recording failed: operation not permitted"
    assert [row["direction"] for row in later] == ([] if is_lost else ["backward"])
    op_times.print_times(rows, {"name": "a card", "torch": "2"})
    assert "no graph:" in capsys.readouterr().out


@pytest.mark.gpu
def test_rows_have_times_in_graphs_and_eager_ones():
    case, device = kernel_cases.scale_shift(72, 1280), torch.device("cuda")
    limits = Ceilings(1e12, 1e12)
    rows = op_times.measure(case, device, torch.bfloat16, limits, compiled=False)
    timed = [row for row in rows if "refused" not in row]
    assert {row["implementation"] for row in timed} >= {"reference", "triton"}
    for row in timed:
        assert row["timed"] == ("graph" if row["direction"] == "forward" else "eager"), row
        assert row["microseconds"] > 0 and row["eager_us"] > 0


@pytest.mark.gpu
@pytest.mark.slow
def test_all_ops_are_right_and_timed(tmp_path):
    result = run("--json", tmp_path / "times.json")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "times.json").read_text())["rows"]
    timed = [row for row in rows if "refused" not in row]
    assert all(row["microseconds"] > 0 and row["eager_us"] > 0 for row in timed)
    ours = [r for r in timed if r["implementation"] in op_times.BACKENDS]
    assert all(row["timed"] == "graph" for row in ours if row["direction"] == "forward")
