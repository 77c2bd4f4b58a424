"""What a denoise step of the persistent kernel moves and waits for, and what it should take.

Counted from the kernel's own plan (nova_kernels/cuda_kernels/denoise_plan.py). Times follow from
the assumptions of `Card`, which are not measurements of this package; docs/denoise.md shows them.
"""

from dataclasses import dataclass

from nova_kernels.cuda_kernels.denoise_plan import (
    DenoisePlan,
    DenoiseShape,
    DeviceLimits,
    plan_denoise,
)

HALF = 2  # bytes


@dataclass(frozen=True)
class Card:
    """A card as its data sheet has it, and what is assumed where that says nothing.

    Attributes:
        limits: clusters that run at once, shared memory.
        bandwidth: of its memory, bytes a second.
        rate: operations a second of half-precision matrix products.
        l2_bandwidth: assumed, bytes a second that all multiprocessors read from L2.
        barrier: assumed, seconds of a barrier of the whole grid.
        row_phase: assumed, seconds of a residual, two norms and a modulation: one read from L2,
            four sums over a block, one write.
        layer_latency: assumed, seconds of a layer beside its bytes and operations: reads from L2
            that wait for each other (one where clusters of four divide the inputs, two without
            clusters), products that wait for the last one's sums, the sum of the partial sums, one
            write.
    """

    name: str
    limits: DeviceLimits
    bandwidth: float
    rate: float
    l2_bandwidth: float
    barrier: float
    row_phase: float
    layer_latency: float


DATA_SHEET_CARDS = (
    Card("A100", DeviceLimits({1: 108}, 166_912), 1.555e12, 312e12, 4e12, 1.3e-6, 1.3e-6, 1.5e-6),
    Card(
        "H200",
        DeviceLimits({1: 132, 2: 66, 4: 32}, 232_448),
        4.8e12,
        989e12,
        5.5e12,
        1e-6,
        1e-6,
        1e-6,
    ),
)


@dataclass(frozen=True)
class StepCost:
    """A denoise step on a card.

    Attributes:
        plan: how it is divided.
        barriers: of the whole grid.
        weight_bytes: of the layers, read from L2 in every step; 0 where they stay on the chip.
        activation_bytes: rows that blocks read and write for each other.
        modulation_bytes: scale, shift and gate vectors.
        operations: of matrix products.
        seconds: expected.
        floor: seconds if nothing but operations and modulation vectors took time.
    """

    plan: DenoisePlan
    barriers: int
    weight_bytes: int
    activation_bytes: int
    modulation_bytes: int
    operations: int
    seconds: float
    floor: float


def step_cost(shape: DenoiseShape, card: Card) -> StepCost:
    """Costs of one step without renormalisation."""
    plan = plan_denoise(shape, card.limits)
    layers, rows, width = 2 * shape.depth, shape.rows, shape.width
    is_resident = plan.weight_slots >= layers
    weights = 0 if is_resident else layers * width * width * HALF
    # Every cluster reads all rows once a layer, its blocks a part of each.
    read = layers * plan.clusters * rows * width * HALF
    written = layers * rows * width * 3 + shape.depth * rows * width * (4 + HALF)
    modulation = rows * width * (3 * shape.depth + 2) * HALF
    operations = 2 * rows * (layers * width * width + 2 * width * shape.token_dim)
    floor = operations / card.rate + modulation / card.bandwidth
    seconds = (
        floor
        + (read + written + weights) / card.l2_bandwidth
        + layers * card.layer_latency
        + 3 * shape.depth * card.barrier
        # The last one predicts, updates and embeds as well.
        + (shape.depth + 1) * card.row_phase
    )
    return StepCost(
        plan, 3 * shape.depth, weights, read + written, modulation, operations, seconds, floor
    )
