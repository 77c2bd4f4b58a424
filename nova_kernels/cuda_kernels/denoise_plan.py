"""How the persistent denoise kernel is divided among the blocks of a GPU (docs/denoise.md).

A layer's outputs are divided into units of eight, which go to clusters of thread blocks in turn;
the blocks of a cluster divide the layer's inputs. csrc/denoise_layers.cuh does the same arithmetic.
"""

from collections.abc import Mapping
from dataclasses import dataclass

UNIT = 8  # outputs of a unit
CHUNK = 32  # inputs that a warp takes at a time
TILE = 16  # rows of a tile
WARPS = 8
MAX_UNITS = 6  # of a cluster
MAX_WIDTH = 2048
MAX_DEPTH = 8
MAX_ROWS = 128
CLUSTER_SIZES = (4, 2, 1)  # in the order in which they are tried


@dataclass(frozen=True)
class DenoiseShape:
    """Sizes of a call.

    Attributes:
        tokens: of all samples.
        passes: guidance passes, 1 to 3.
        width, depth: of the MLP.
        token_dim: values of a token.
    """

    tokens: int
    passes: int
    width: int
    depth: int
    token_dim: int

    @property
    def rows(self) -> int:
        return self.passes * self.tokens


@dataclass(frozen=True)
class DeviceLimits:
    """What a GPU offers a kernel of one block a multiprocessor.

    Attributes:
        clusters: by cluster size, how many clusters run at the same time.
        shared_bytes: shared memory that a block can have.
    """

    clusters: Mapping[int, int]
    shared_bytes: int


@dataclass(frozen=True)
class DenoisePlan:
    """The division of a call.

    Attributes:
        clusters, cluster_size: the grid is clusters * cluster_size blocks.
        units: most units that a cluster has of a layer.
        weight_slots: slices of layers that a block keeps in shared memory: all 2 * depth, or 2
            through which they are streamed in every step.
        shared_bytes: of a block.
    """

    clusters: int
    cluster_size: int
    units: int
    weight_slots: int
    shared_bytes: int


def obstacle(shape: DenoiseShape) -> str | None:
    """Why the kernel does not take these sizes on any GPU; None if it does."""
    if shape.width % CHUNK or shape.width > MAX_WIDTH:
        return f"width {shape.width}: it takes multiples of {CHUNK} up to {MAX_WIDTH}"
    if shape.token_dim % 4:
        return f"tokens of {shape.token_dim} values: it takes multiples of 4"
    if not 1 <= shape.depth <= MAX_DEPTH:
        return f"{shape.depth} blocks: it takes 1 to {MAX_DEPTH}"
    if not 1 <= shape.rows <= MAX_ROWS:
        return f"{shape.rows} rows: it takes 1 to {MAX_ROWS}; more are for large matrix products"
    return None


def obstacle_of_memory(shape: DenoiseShape, limits: DeviceLimits) -> str | None:
    """Why a GPU's blocks and their shared memory do not hold a call.

    None if they do, or if no blocks run at all.
    """
    most = max(limits.clusters.values(), default=0)
    if most == 0 or plan_denoise(shape, limits) is not None:
        return None
    needed = -(-shape.width // (UNIT * MAX_UNITS))
    if most < needed:
        return (
            f"width {shape.width}: it takes {needed} blocks at the same time, one a "
            f"multiprocessor, and the GPU runs {most}"
        )
    return f"width {shape.width}: {limits.shared_bytes} bytes of shared memory are too few"


def plan_denoise(shape: DenoiseShape, limits: DeviceLimits) -> DenoisePlan | None:
    """The first division that keeps all weights on the chip, else the first that streams them.

    Returns:
        None if clusters are too few, or shared memory is too small for either.
    """
    plans = []
    for cluster_size in CLUSTER_SIZES:
        available = limits.clusters.get(cluster_size, 0)
        if available == 0 or shape.width // CHUNK % cluster_size:
            continue
        clusters = min(available, shape.width // UNIT)
        units = -(-shape.width // UNIT // clusters)
        if units > MAX_UNITS:
            continue
        for weight_slots in (2 * shape.depth, 2):
            size = shared_bytes(shape, clusters, cluster_size, units, weight_slots)
            if size <= limits.shared_bytes:
                plans.append(DenoisePlan(clusters, cluster_size, units, weight_slots, size))
    resident = [plan for plan in plans if plan.weight_slots == 2 * shape.depth]
    return next(iter(resident or plans), None)


def shared_bytes(
    shape: DenoiseShape, clusters: int, cluster_size: int, units: int, weight_slots: int
) -> int:
    """Shared memory of a block, as `DenoiseLayout` in csrc/denoise_layout.cuh divides it."""
    slot = units * UNIT * (shape.width // cluster_size) * 2
    partial_sums = WARPS * TILE * units * UNIT * 4
    head = shape.passes * 2 * (shape.width + 32) * 2 + WARPS * TILE * shape.passes * 4
    owned = -(-shape.tokens // (clusters * cluster_size))
    per_token = shape.passes * shape.width + (1 + shape.passes) * shape.token_dim + 1
    statistics = 2 * shape.passes * WARPS * 4
    biases = 2 * shape.depth * units * UNIT
    kept = owned * per_token + statistics + biases
    return weight_slots * slot + max(partial_sums, head) + kept * 4
