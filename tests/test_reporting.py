import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from kernel_testing import DEVICE, DTYPES, needs_triton

import nova_kernels
from nova_kernels import reporting
from nova_kernels.cpp_kernels import extension as cpp_extension
from nova_kernels.cuda_kernels import extension as cuda_extension
from nova_kernels.dispatch import VARIABLE, VERIFIED_CAPABILITIES, Op
from nova_kernels.ops import scale_shift
from nova_kernels.self_check import self_checks


@pytest.fixture
def no_bfloat16(monkeypatch):
    monkeypatch.setattr(reporting, "DTYPES", DTYPES)


@needs_triton
def test_report_finds_all_ops_right(no_bfloat16):
    entries = nova_kernels.report(DEVICE)
    assert {entry.backend for entry in entries} == {"reference", "triton", "cuda", "cpp"}
    assert len({entry.op for entry in entries}) == 8
    for entry in entries:
        assert entry.obstacle is None or entry.backend in ("cuda", "cpp"), entry
        assert entry.is_right and bool(entry.errors) == (entry.obstacle is None), entry
        assert entry.verified or not entry.default, entry


def test_report_finds_a_wrong_op(monkeypatch):
    right = scale_shift.reference

    def wrong_in_float32(x, *others):
        return right(x, *others) * (1.001 if x.dtype == torch.float32 else 1)

    monkeypatch.setattr(scale_shift, "reference", wrong_in_float32)
    monkeypatch.setattr(reporting, "self_checks", lambda: itertools.islice(self_checks(), 1))
    entry = nova_kernels.report("cpu")[0]
    assert not entry.is_right and "float32: error" in entry.failure


def test_checks_in_another_process(monkeypatch):
    """As on a GPU."""
    meant = [("scale_shift", "reference"), ("scale_shift", "none such"), ("rope3d", "reference")]
    entries = [
        reporting.ImplementationReport(*names, None, False, False, errors={}) for names in meant
    ]
    monkeypatch.setattr(reporting, "TIMEOUT_S", 60.0)
    monkeypatch.setattr(reporting, "_is_gpu", lambda device: True)
    right, unknown, other = reporting._checks(entries, "cpu")
    for errors, failure in (right, other):
        assert failure is None and errors.keys() == {"float32", "float16", "bfloat16"}
    assert "none such" in unknown[1]
    monkeypatch.setattr(reporting, "PROGRAM", [sys.executable, "-c", "raise OSError('no card')"])
    (checked,) = reporting._checks(entries[:1], "cpu")
    assert checked == ({}, "its process ended with code 1: OSError: no card")


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on a GPU")
def test_command_on_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, "-m", "nova_kernels"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "* scale_shift" in result.stdout and "it needs tensors on a GPU" in result.stdout


def test_command_with_a_backend_that_there_is_not(monkeypatch):
    monkeypatch.setenv(VARIABLE, "fast")
    command = [sys.executable, "-m", "nova_kernels"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and not result.stderr
    assert f"{VARIABLE} is 'fast'" in result.stdout


def test_automatic_choice(monkeypatch):
    """Only what is verified and can run is chosen by itself; a name runs or raises."""
    on_cpu = torch.empty(0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    unverified, verified = Op("scale_shift"), Op("scale_shift", verified=frozenset({"triton"}))
    assert unverified.choose("auto", on_cpu) == "reference"
    monkeypatch.setenv(VARIABLE, "reference")
    assert verified.choose("auto", on_cpu) == "reference"
    monkeypatch.setenv(VARIABLE, "nonsense")
    with pytest.raises(nova_kernels.BackendError, match=f"{VARIABLE} is 'nonsense'"):
        verified.choose("auto", on_cpu)
    monkeypatch.setenv(VARIABLE, "")  # as if it were not set
    assert verified.choose("auto", on_cpu) == unverified.choose("auto", on_cpu) == "reference"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert verified.choose("auto", on_cpu) == "reference"
    with pytest.raises(nova_kernels.BackendError, match="Triton|GPU"):
        verified.choose("triton", on_cpu)


@needs_triton
def test_the_variable_speaks_of_all_ops(monkeypatch):
    """What a backend does not have runs by another; asked for by name it is refused."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    in_triton, in_cpp = Op("rope3d"), Op("denoise", ("triton", "cpp"))
    x = torch.empty(0)
    monkeypatch.setenv(VARIABLE, "cuda")
    assert in_triton.choose("auto", x) == "triton"
    monkeypatch.setenv(VARIABLE, "cpp")
    assert in_triton.choose("auto", x) == "reference"
    with pytest.raises(nova_kernels.BackendError, match="not written for this op"):
        in_triton.choose("cuda", x)
    if cpp_extension.obstacle() is None:
        assert in_cpp.choose("auto", x) == "cpp"


@pytest.mark.parametrize(
    "capability, verified", [((9, 0), {"triton", "cuda"}), ((8, 0), set()), ((12, 0), set())]
)
def test_kernels_are_verified_on_the_cards_that_tests_ran_on(monkeypatch, capability, verified):
    card = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    op = Op("scale_shift", verified=frozenset({"triton", "cuda", "cpp"}))
    assert op.verified_on(torch.device("cuda", 0)) == verified
    assert op.verified_on(torch.device("cpu")) == {"cpp"}


def test_where_launches_pay():
    """For enough values, unless a gradient is wanted or torch.compile looks on."""
    op, always = Op("scale_shift", least_values=16), Op("rope3d")
    small, large = torch.empty(15), torch.empty(16)
    wanting = torch.empty(16, requires_grad=True)
    assert op._pays(small, large) and not op._pays(small) and not op._pays(small, wanting)
    assert always._pays(small) and always._pays(wanting)
    with torch.no_grad():
        assert op._pays(wanting)

    def run(x):
        return x + op._pays(x)

    assert torch.equal(
        torch.compile(run, fullgraph=True, backend="eager")(torch.ones(16)), torch.ones(16)
    )


@needs_triton
def test_the_interpreter_is_not_chosen_automatically(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    op = Op("scale_shift", verified=frozenset({"triton"}))
    assert op.choose("auto", torch.empty(0)) == "reference"


@pytest.mark.gpu
def test_small_tensors_are_left_to_torch():
    if torch.cuda.get_device_capability() not in VERIFIED_CAPABILITIES:
        pytest.skip("nothing is verified on this card")
    op = Op("scale_shift", verified=frozenset({"triton"}), least_values=16)
    small, large = torch.empty(15, device="cuda"), torch.empty(16, device="cuda")
    assert op.choose("auto", small) == "reference"
    assert op.choose("auto", small, large) == "triton"
    assert op.choose("triton", small) == "triton"


def test_torch_compile_can_trace_what_says_whether_an_extension_is_there():
    def run(x):
        obstacles = cuda_extension.obstacle(), cpp_extension.obstacle()
        return x + sum(obstacle is None for obstacle in obstacles)

    x = torch.zeros(2)
    assert torch.equal(torch.compile(run, fullgraph=True, backend="eager")(x), run(x))


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'scale_shfit'"):
        _ = nova_kernels.scale_shfit
    assert "scale_shift" in dir(nova_kernels)
