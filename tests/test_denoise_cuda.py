"""The persistent denoise kernel, emulated on the CPU thread by thread."""

import dataclasses
import multiprocessing

import kernel_testing
import pytest
import torch
from cuda_emulation import GuardedMemory, emulated_extension, guarded, needs_compiler
from kernel_testing import assert_as_exact_as_torch
from test_denoise import doubled, inputs, numbers, written_out

from nova_kernels.cuda_kernels import denoise as kernel
from nova_kernels.cuda_kernels.denoise_plan import (
    DenoiseShape,
    DeviceLimits,
    obstacle,
    obstacle_of_memory,
    plan_denoise,
    shared_bytes,
)
from nova_kernels.head_weights import with_unit_scale
from nova_kernels.ops.denoise import MAX_STEPS_PER_LAUNCH, modulate

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Inputs lie where the emulator runs, whatever the machine has."""
    monkeypatch.setattr(kernel_testing, "DEVICE", "cpu")


def plan_for(given, clusters, cluster_size, streamed=False):
    x, condition, _, weights = given
    shape = kernel.shape_of(x, condition, weights)
    plan = plan_denoise(shape, DeviceLimits({cluster_size: clusters}, 10**6))
    if not streamed:
        return plan
    size = shared_bytes(shape, plan.clusters, cluster_size, plan.units, 2)
    return dataclasses.replace(plan, weight_slots=2, shared_bytes=size)


def emulate(given, steps, plan, seed=0, **options):
    x, condition, times, weights = given
    modulations = tuple(with_unit_scale(*linear) for linear in weights.modulations)
    prepared = dataclasses.replace(weights, modulations=modulations)
    module = emulated_extension()
    module.set_seed(seed)
    vectors = modulate(prepared, condition, times)
    return kernel.run(x, vectors, prepared, steps, plan=plan, module=module, **options)


def check(given, steps, result, **options):
    x, condition, times, weights = given
    exact_options = {
        name: (value.double() if name == "noise" else tuple(t.double() for t in value))
        for name, value in options.items()
    }
    doubles = (x.double(), condition.double(), times.double(), doubled(weights))
    exact = written_out(*doubles, steps, **exact_options)
    assert_as_exact_as_torch(result, written_out(*given, steps, **options), exact)


def exit_code(run):
    """Of a process of its own that calls run(); negative where a fault ended it."""
    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    process.join(timeout=60)
    return process.exitcode


@pytest.mark.parametrize("clusters, cluster_size", [(3, 1), (2, 2)])
@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loop_is_as_exact_as_torch(clusters, cluster_size, passes, dtype):
    steps = numbers(2, guidance=3.0, image_guidance=1.5)
    given = inputs((2, 3), passes, 2, dtype, width=64)
    check(given, steps, emulate(given, steps, plan_for(given, clusters, cluster_size)))


def test_both_sides_agree_on_the_steps_of_a_launch():
    assert emulated_extension().MAX_DENOISE_STEPS == MAX_STEPS_PER_LAUNCH


@pytest.mark.parametrize(
    "tokens, width, clusters, cluster_size", [(3, 64, 2, 1), (3, 64, 2, 2), (22, 128, 3, 4)]
)
def test_weights_that_are_streamed(tokens, width, clusters, cluster_size):
    """The last has enough rows for three of a cluster's blocks to add up partial sums."""
    steps = numbers(2, guidance=3.0)
    given = inputs((1, tokens), 2, 2, torch.float16, width=width)
    resident = emulate(given, steps, plan_for(given, clusters, cluster_size))
    check(given, steps, resident)
    streamed = emulate(given, steps, plan_for(given, clusters, cluster_size, streamed=True))
    assert torch.equal(streamed, resident)


@pytest.mark.parametrize("shape, passes", [((1, 2), 1), ((1, 17), 2), ((3, 13), 2), ((1, 42), 3)])
def test_numbers_of_rows(shape, passes):
    """One tile, tiles that are not full, as many tiles as warps, up to 126 rows."""
    steps = numbers(1, guidance=3.0, image_guidance=1.5)
    given = inputs(shape, passes, 1, torch.float16, depth=1, width=32)
    check(given, steps, emulate(given, steps, plan_for(given, 2, 1)))


@pytest.mark.parametrize("width, clusters, cluster_size", [(96, 5, 1), (160, 7, 1), (192, 4, 2)])
def test_widths_that_do_not_divide_evenly(width, clusters, cluster_size):
    steps = numbers(1, guidance=3.0)
    given = inputs((1, 3), 2, 1, torch.float16, depth=2, width=width)
    plan = plan_for(given, clusters, cluster_size)
    assert plan.clusters * plan.units >= width // 8
    check(given, steps, emulate(given, steps, plan))


@pytest.mark.parametrize("streamed", [False, True])
def test_nothing_behind_a_tensor_is_read_or_written(streamed):
    """The last tile of rows is not full, and clusters have different numbers of units."""
    steps = numbers(2, guidance=3.0, renorm=0.2)
    steps = [dataclasses.replace(step, noise=0.3) for step in steps]
    given = inputs((1, 17), 2, 2, torch.float16, depth=2, width=32)
    options = {"noise": torch.ones(2, *given[0].shape).half(), "outside": guarded(torch.ones(1))}
    plan = plan_for(given, 3, 1, streamed)

    def run():
        torch.set_num_threads(1)  # the threads of pools are not in a forked process
        with GuardedMemory():
            emulate(given, steps, plan, **options)

    emulated_extension()  # compiled before the process begins, which could not keep it
    assert exit_code(run) == 0


def test_rows_of_two_vectors_a_thread():
    """Wider than 1024, as those of the 0.6B model."""
    steps = numbers(1, guidance=3.0)
    given = inputs((1, 3), 2, 1, torch.float16, depth=1, width=1056)
    check(given, steps, emulate(given, steps, plan_for(given, 22, 1)))


@pytest.mark.parametrize("passes", [2, 3])
def test_noise_and_renormalisation(passes):
    steps = numbers(2, guidance=4.0, image_guidance=0.5, renorm=0.2)
    steps = [dataclasses.replace(step, noise=0.3 * (d < 1)) for d, step in enumerate(steps)]
    given = inputs((2, 4), passes, 2, torch.float16, depth=1, width=32)
    noise = torch.randn(2, *given[0].shape, generator=torch.Generator().manual_seed(5)).half()
    check(given, steps, emulate(given, steps, plan_for(given, 3, 1), noise=noise), noise=noise)


@pytest.mark.parametrize("token_dim, seed", [(16, 0), (64, 0), (64, 1), (64, 2)])
def test_what_is_outside_counts_in_norms_and_evolves(token_dim, seed):
    """64 values a token, as an embedded model has them, are the work of more than one warp."""
    steps = numbers(2, guidance=4.0, renorm=0.2)
    given = inputs((2, 4), 2, 2, torch.float16, depth=1, width=32, token_dim=token_dim)
    around = torch.randn(2, 9, token_dim, generator=torch.Generator().manual_seed(6))
    noise = torch.zeros(2, *around.shape)
    squares = around.square().sum(dim=(1, 2))
    plan = plan_for(given, 3, 1)
    result = emulate(given, steps, plan, seed, outside=squares)
    check(given, steps, result, outside=(around.half(), noise.half()))
    # A launch ends with what the next one begins with.
    x, condition, times, weights = given
    squares = around.square().sum(dim=(1, 2))
    first = emulate((x, condition, times[:1], weights), steps[:1], plan, seed, outside=squares)
    second = emulate((first, condition, times[1:], weights), steps[1:], plan, seed, outside=squares)
    torch.testing.assert_close(second, result, rtol=1e-2, atol=1e-2)


# The second and the third have more tiles of rows than the first.
@pytest.mark.parametrize(
    "shape, passes, steps, width, cluster_size",
    [((2, 3), 2, 2, 64, 2), ((1, 24), 3, 1, 64, 2), ((1, 42), 3, 1, 32, 1)],
)
def test_the_order_of_threads_changes_nothing(shape, passes, steps, width, cluster_size):
    given = inputs(shape, passes, steps, torch.bfloat16, depth=1, width=width)
    plan = plan_for(given, 2, cluster_size)
    steps = numbers(steps, guidance=3.0, renorm=0.5)
    first, *others = (emulate(given, steps, plan, seed) for seed in range(3))
    check(given, steps, first)
    assert all(torch.equal(result, first) for result in others)


def test_plans_of_known_geometries():
    """The 0.6B model's head on an H200 stays on the chip; on an A100 its weights are streamed."""
    shape = DenoiseShape(tokens=22, passes=2, width=1280, depth=3, token_dim=16)
    h200 = plan_denoise(shape, DeviceLimits({1: 132, 2: 66, 4: 32}, 232_448))
    assert (h200.clusters, h200.cluster_size, h200.units, h200.weight_slots) == (32, 4, 5, 6)
    a100 = plan_denoise(shape, DeviceLimits({1: 108}, 166_912))
    assert (a100.clusters, a100.cluster_size, a100.units, a100.weight_slots) == (108, 1, 2, 2)
    small = dataclasses.replace(shape, width=192, token_dim=64)
    assert plan_denoise(small, DeviceLimits({1: 108}, 166_912)).weight_slots == 6


def test_cards_with_little_shared_memory():
    """They take a sequence of launches; one that runs no cooperative launch is another matter."""
    shape = DenoiseShape(tokens=22, passes=2, width=1280, depth=3, token_dim=16)
    consumer = DeviceLimits({4: 0, 2: 0, 1: 128}, 101_376)  # sm_86 and sm_89
    assert "101376 bytes of shared memory" in obstacle_of_memory(shape, consumer)
    assert obstacle_of_memory(dataclasses.replace(shape, width=1024), consumer) is None
    none = dataclasses.replace(consumer, clusters={4: 0, 2: 0, 1: 0})
    assert plan_denoise(shape, none) is None and obstacle_of_memory(shape, none) is None


@pytest.mark.parametrize("width", [768, 1024, 1280, 1536])
@pytest.mark.parametrize("depth", [1, 3, 8])
def test_every_width_and_depth_has_a_plan(width, depth):
    for tokens, passes in ((1, 1), (36, 2), (42, 3), (128, 1)):
        shape = DenoiseShape(tokens, passes, width, depth, 16)
        assert obstacle(shape) is None
        for limits in (
            DeviceLimits({1: 132, 2: 66, 4: 32}, 232_448),
            DeviceLimits({1: 108}, 166_912),
        ):
            plan = plan_denoise(shape, limits)
            assert plan.shared_bytes <= limits.shared_bytes
            assert plan.clusters * plan.units * 8 >= width


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 40}, "multiples of 32"),
        ({"width": 4096}, "up to 2048"),
        ({"token_dim": 6}, "multiples of 4"),
        ({"depth": 9}, "1 to 8"),
        ({"tokens": 65}, "1 to 128"),
    ],
)
def test_sizes_that_the_kernel_does_not_take(change, message):
    shape = DenoiseShape(tokens=22, passes=2, width=1280, depth=3, token_dim=16)
    assert message in obstacle(dataclasses.replace(shape, **change))
