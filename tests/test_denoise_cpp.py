"""The denoise loop in C++ (csrc/cpp), in every instruction set that this CPU has."""

import copy
import dataclasses
import os
import pickle
import subprocess
import sys

import kernel_testing
import pytest
import torch
from kernel_testing import opcheck
from test_denoise import DEPTH, flat, inputs, numbers, run, small_case
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from nova.config import named_config
from nova.model import NOVATransformer
from nova_kernels import BackendError, Outside
from nova_kernels.cpp_kernels import denoise as cpp
from nova_kernels.cpp_kernels import extension
from nova_kernels.head_weights import HeadWeights, with_unit_scale
from nova_kernels.ops import denoise as op
from nova_kernels.ops.denoise import modulate

pytestmark = pytest.mark.skipif(
    extension.obstacle() is not None, reason="the C++ extension is not built"
)
KERNELS = [] if extension.obstacle() else [name for name, _ in extension.extension().kernels()]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Inputs lie where the kernel runs, whatever the machine has."""
    monkeypatch.setattr(kernel_testing, "DEVICE", "cpu")


def double(value):
    """Tensors in float64, in whatever holds them."""
    if isinstance(value, torch.Tensor):
        return value.double()
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return type(value)(**{name: double(field) for name, field in fields.items()})
    return tuple(double(item) for item in value)


def assert_as_exact(case, steps, kernel=0, **options):
    """The error against float64 is at most twice that of the reference, and a little."""
    expected = run(*double(case), steps, **{k: double(v) for k, v in options.items()})
    plain = run(*case, steps, backend="reference", **options)
    x, condition, times, weights = case
    modulations = tuple(with_unit_scale(*linear) for linear in weights.modulations)
    prepared = dataclasses.replace(weights, modulations=modulations)
    with torch.no_grad():
        vectors = modulate(prepared, condition, times)
        result = cpp.run(x, vectors, prepared, steps, options.get("noise"), kernel=kernel)
    norm = expected.norm()
    allowed = 2 * (plain - expected).norm() / norm + 1e-6
    assert (result - expected).norm() / norm <= allowed


@pytest.mark.parametrize("kernel", range(len(KERNELS)), ids=KERNELS)
@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize(
    ("shape", "depth", "width"),
    [((1, 1), 1, 16), ((2, 3), 2, 48), ((1, 7), 3, 100), ((3, 13), 1, 33), ((2, 40), 2, 192)],
)
def test_every_instruction_set_gives_the_references_tokens(kernel, passes, shape, depth, width):
    case = inputs(shape, passes, steps=3, depth=depth, width=width)
    steps = numbers(3, guidance=4.0, image_guidance=1.5, noise=0.1)
    noise = torch.randn(3, *case[0].shape, generator=torch.Generator().manual_seed(5))
    assert_as_exact(case, steps, kernel, noise=noise)


@pytest.mark.parametrize("kernel", range(len(KERNELS)), ids=KERNELS)
@pytest.mark.parametrize("magnitude", [1e-30, 30.0, 1e4])
def test_large_and_small_inputs(kernel, magnitude):
    x, condition, times, weights = inputs((1, 3), passes=2, steps=2)
    assert_as_exact((x, condition * magnitude, times, weights), numbers(2, guidance=2.0), kernel)


@pytest.mark.parametrize("kernel", range(len(KERNELS)), ids=KERNELS)
def test_nan_stays_in_its_token(kernel):
    x, condition, times, weights = inputs((1, 5), passes=2, steps=2)
    steps = numbers(2, guidance=2.0)
    with torch.no_grad():
        vectors = modulate(weights, condition, times)
        clean = cpp.run(x, vectors, weights, steps, kernel=kernel)
        x[0, 2, 0] = float("nan")
        result = cpp.run(x, vectors, weights, steps, kernel=kernel)
    assert result[0, 2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(result[0, others], clean[0, others])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads):
    case = inputs((1, 4), passes=2, steps=3)
    before = torch.get_num_threads()
    expected = run(*case, numbers(3, guidance=3.0), backend="cpp")
    try:
        torch.set_num_threads(threads)
        result = run(*case, numbers(3, guidance=3.0), backend="cpp")
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_threads_of_its_own_where_torch_has_no_openmp(monkeypatch):
    case = inputs((2, 4), passes=2, steps=3)
    expected = run(*case, numbers(3, guidance=3.0), backend="cpp")
    monkeypatch.setattr(cpp, "openmp_parallel", lambda: 0)
    assert torch.equal(run(*case, numbers(3, guidance=3.0), backend="cpp"), expected)


SHORT_OF_MEMORY = """
import resource, sys
import torch
from nova_kernels.cpp_kernels import denoise as cpp
from nova_kernels.ops.denoise import modulate
from test_denoise import inputs, numbers, prepared

if sys.argv[1] == "its own threads":
    cpp.openmp_parallel = lambda: 0
steps = numbers(1, guidance=3.0)
x, condition, times, weights = inputs((1, 60000), 1, 1, torch.float32, depth=1, width=256)
weights = prepared(weights)
cpp.run(x[:, :8], modulate(weights, condition[:, :, :8], times), weights, steps)
vectors = modulate(weights, condition, times)
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 100 * 2**20,) * 2)
cpp.run(x, vectors, weights, steps)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as on Linux")
@pytest.mark.parametrize("threads", ["of torch", "its own threads"])
def test_too_little_memory_is_an_error_of_python(threads):
    """Exceptions of C++ that leave a thread end the process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # inputs would lie on a GPU
    command = [sys.executable, "-c", SHORT_OF_MEMORY, threads]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 1 and process.stderr.splitlines()[-1].startswith("MemoryError")


def test_inputs_of_any_layout_and_steps_without_guidance():
    x, condition, times, weights = inputs((2, 6), passes=2, steps=4)
    steps = numbers(4, guidance=3.0)
    expected = run(x, condition, times, weights, steps, backend="reference", guided_steps=3)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    before = turned.clone()
    result = run(turned, condition, times, weights, steps, backend="cpp", guided_steps=3)
    assert torch.allclose(result, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(turned, before)


def test_it_runs_by_default_on_a_cpu(monkeypatch):
    calls = []
    run_cpp = cpp.run
    monkeypatch.setattr(cpp, "run", lambda *a, **k: calls.append(1) or run_cpp(*a, **k))
    case = inputs((1, 4), passes=2, steps=3)
    run(*case, numbers(3, guidance=3.0))
    assert calls == [1]
    run(*case, numbers(3, guidance=3.0), backend="reference")
    assert calls == [1]


def test_operator_contract():
    given, steps, options = small_case()
    quiet = numbers(2, guidance=3.0, noise=0.3)
    for arguments in (
        flat(given, quiet, "cpp", 1, noise=options["noise"]),
        flat(given, steps, "cpp", 2, **options),  # which the reference runs
    ):
        opcheck(torch.ops.nova_kernels.denoise.default, arguments)
    result = torch.ops.nova_kernels.denoise(*flat(given, quiet, "cpp", 1, noise=options["noise"]))
    expected = op.denoise(
        *given, quiet, guided_steps=1, noise=options["noise"], backend="reference"
    )
    assert torch.allclose(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_torch_compile_sees_one_operator(backend):
    given, steps = inputs((2, 3), passes=2, steps=3), numbers(3, guidance=3.0)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    def call(x):
        return run(x, *given[1:], steps, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend=keep)
    assert torch.equal(compiled(given[0]), call(given[0]))
    (graph,) = graphs
    operators = [str(node.target) for node in graph.graph.nodes]
    assert sum("nova_kernels.denoise" in name for name in operators) == 1
    assert not any("linear" in name for name in operators)


def test_where_a_gradient_is_wanted_torch_compile_has_the_reference():
    x, condition, times, weights = inputs((1, 4), passes=2, steps=2)
    steps = numbers(2, guidance=3.0)

    def gradient(function):
        leaf = condition.clone().requires_grad_()
        return torch.autograd.grad(function(leaf).sum(), leaf)[0]

    def call(condition):
        return op.denoise(x, condition, times, weights, steps)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.allclose(gradient(compiled), gradient(call), rtol=1e-4, atol=1e-5)


def test_under_autocast_the_kernel_reads_what_it_expects(monkeypatch):
    """Without oneDNN, torch makes the products before the loop, in autocast's dtype."""
    given, steps = inputs((2, 3), passes=2, steps=3), numbers(3, guidance=3.0)
    monkeypatch.setattr("nova_kernels.onednn.is_usable", lambda weight: False)
    expected = run(*given, steps, backend="cpp")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(*given, steps, backend="cpp"), expected)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_tokens(shape):
    case = inputs(shape, passes=2, steps=2)
    assert run(*case, numbers(2), backend="cpp").shape == case[0].shape


def test_fake_tensors_and_traces():
    """A mode that looks on sees an operator, and the kernel no memory that is none."""
    x, *others = inputs((2, 3), passes=2, steps=2)
    steps = numbers(2, guidance=3.0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert run(mode.from_tensor(x), *others, steps).shape == x.shape
    traced = make_fx(lambda tokens: run(tokens, *others, steps))(x)
    assert torch.equal(traced(2 * x), run(2 * x, *others, steps))


@pytest.mark.parametrize("name", ["x", "condition", "weights"])
def test_forward_mode_runs_in_the_reference(name):
    x, condition, times, weights = inputs((2, 3), passes=2, steps=2)
    tensors = weights.tensors()
    given = {"x": x, "condition": condition, "weights": tensors[0]}

    def tangent(backend):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
            now = {**given, name: dual}
            mlp = HeadWeights.of_tensors([now["weights"], *tensors[1:]], len(weights.blocks))
            arguments = now["x"], now["condition"], times, mlp, numbers(2, guidance=3.0)
            return forward_ad.unpack_dual(op.denoise(*arguments, backend=backend)).tangent

    expected = tangent("reference")
    assert expected.abs().max() > 0
    for backend in ("auto", "cpp"):
        assert torch.equal(tangent(backend), expected)


def test_copies_are_packed_anew():
    """On another CPU, panels have another width."""
    weights = inputs((2, 3), passes=2, steps=2)[-1]
    assert weights.packed
    for copied in (copy.deepcopy(weights), pickle.loads(pickle.dumps(weights))):
        assert "packed" not in vars(copied)
        assert all(map(torch.equal, copied.tensors(), weights.tensors()))


def test_views_that_negate():
    case = inputs((2, 3), passes=2, steps=2)
    noise = torch.randn(2, *case[0].shape, generator=torch.Generator().manual_seed(5))
    steps = numbers(2, guidance=3.0, noise=0.3)
    expected = run(*case, steps, backend="reference", noise=noise)
    view = torch.complex(noise, -noise).conj().imag
    assert view.is_neg() and torch.equal(view, noise)
    result = run(*case, steps, backend="cpp", noise=view)
    assert torch.allclose(result, expected, rtol=1e-4, atol=1e-5)
    weights = HeadWeights.of_tensors([torch._neg_view(t) for t in case[-1].tensors()], DEPTH)
    expected = run(*case[:-1], weights, steps, backend="reference", noise=noise)
    result = run(*case[:-1], weights, steps, backend="cpp", noise=noise)
    assert torch.allclose(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_less_than_by_the_reference(dtype):
    case = inputs((2, 9), passes=2, steps=4, dtype=dtype)
    steps = numbers(4, guidance=3.0, noise=0.2)
    noise = torch.randn(4, *case[0].shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    exact = run(*double(case), steps, noise=noise.double())
    plain, result, default = (
        run(*case, steps, backend=backend, noise=noise) for backend in ("reference", "cpp", "auto")
    )
    assert result.dtype == dtype and torch.equal(default, result)
    assert (result - exact).norm() < 0.9 * (plain - exact).norm()
    # It is packed in float32, anew where weights were changed.
    weights = case[-1]
    weights.head[1].add_(1)
    weights.renew()
    assert not torch.equal(run(*case, steps, backend="cpp", noise=noise), result)


def test_other_dtypes_run_in_the_reference():
    for case in (
        inputs((1, 4), passes=2, steps=2, dtype=torch.float64),
        # Its sum with the time embeddings has the dtype of x; the kernel wants that of it too.
        tuple(
            tensor.half() if index == 1 else tensor
            for index, tensor in enumerate(inputs((1, 4), passes=2, steps=2))
        ),
    ):
        x, condition, _, weights = case
        assert "got" in cpp.obstacle(x, condition, weights, numbers(2, guidance=3.0), None)
        expected = run(*case, numbers(2, guidance=3.0), backend="reference")
        assert torch.equal(run(*case, numbers(2, guidance=3.0), backend="cpp"), expected)


def test_where_a_gradient_is_wanted_the_reference_runs():
    x, condition, times, weights = inputs((1, 4), passes=2, steps=2)
    condition.requires_grad_()
    result = op.denoise(x, condition, times, weights, numbers(2, guidance=3.0))
    (gradient,) = torch.autograd.grad(result.sum(), condition)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_renormalised_guidance_runs_in_the_reference():
    case = inputs((2, 4), passes=2, steps=2)
    steps = numbers(2, guidance=3.0, renorm=0.5)
    outside = Outside(torch.ones(2, 3, case[0].shape[-1]))
    expected = run(*case, steps, backend="reference", outside=outside)
    assert torch.equal(run(*case, steps, backend="cpp", outside=outside), expected)


def test_without_the_extension_the_reference_runs_and_a_name_raises(monkeypatch):
    monkeypatch.setattr(extension, "obstacle", lambda: "it is not there")
    case = inputs((1, 4), passes=2, steps=2)
    expected = run(*case, numbers(2), backend="reference")
    assert torch.equal(run(*case, numbers(2)), expected)
    with pytest.raises(BackendError, match="denoise: backend 'cpp' cannot run: it is not there"):
        run(*case, numbers(2), backend="cpp")
    assert op.OP.choose("auto", case[0]) == "reference"


def test_a_models_backend():
    model = NOVATransformer(named_config("tiny-video"))
    model.set_backend("cpp")
    head = model.image_decoder
    assert head.backend == "cpp" and head.blocks[0].backend == "reference"
    assert model.image_encoder.blocks[0].backend == "reference"
    # What is no loop runs all the same.
    dim = model.mask_embed.bos_token.shape[-1]
    tokens = torch.randn(1, 2, model.config.token_dim)
    assert head(tokens, torch.tensor(3.0), torch.randn(1, 2, dim)).isfinite().all()
