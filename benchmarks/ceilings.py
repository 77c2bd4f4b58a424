"""How fast a machine can be: measured on the one at hand, and from data sheets for two cards."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from measure import timed
from torch.nn import functional as F
from work_counts import Work, total

from nova_kernels import onednn

# Side of the square matrices, and bytes that are copied. Large enough to be as fast as it gets.
MATRIX_SIDE = {"cuda": 8192, "cpu": 2048}
COPIED_BYTES = 2**28
# Calls that are timed together, so that starting them does not count, and how often.
CALLS = {"cuda": 10, "cpu": 1}
REPEATS = 5


@dataclass(frozen=True)
class Ceilings:
    """What limits any program.

    Attributes:
        rate: operations a second of a matrix product.
        bandwidth: bytes a second, read and written together.
    """

    rate: float
    bandwidth: float

    def facts(self) -> dict[str, float]:
        """For a results file."""
        return {"copy_GB_per_s": self.bandwidth / 1e9, "matmul_TFLOP_per_s": self.rate / 1e12}

    def floor_seconds(self, work: Iterable[Work]) -> float:
        """The floor: all operations at the full rate, and nothing else."""
        return total(work).operations / self.rate

    def roofline_seconds(self, work: Iterable[Work]) -> float:
        """Stage after stage, arithmetic or reading, whichever takes longer."""
        return sum(max(w.operations / self.rate, w.bytes / self.bandwidth) for w in work)


@dataclass(frozen=True)
class MeasuredCard:
    """A card that is not at hand.

    Attributes:
        ceilings: in bfloat16. The bandwidth is the data sheet's. The rate is what the best matrix
            products of libraries reach, as others have measured it.
        source: of the rate.
    """

    name: str
    ceilings: Ceilings
    source: str


_TABLE = 'table "Maximum Achievable Matmul FLOPS" of github.com/stas00/ml-engineering'
# The A100 of 40 GB, on which the model's authors measured; the one of 80 GB has 2.039 TB/s.
CARDS = (
    MeasuredCard("A100 40 GB", Ceilings(271e12, 1.555e12), f"{_TABLE}, A100 SXM"),
    MeasuredCard("H200", Ceilings(790e12, 4.8e12), f"{_TABLE}, H100 SXM, which has the same chip"),
)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The fastest of some matrix products and copies on this machine."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    side = MATRIX_SIDE[device.type]
    a = torch.randn(side, side, device=device).to(dtype)
    copy = _fastest(lambda: target.copy_(source), device)
    # As layers multiply: torch's `a @ a` in float16 is far slower on a CPU.
    products: list[Callable[[], Any]] = [lambda: F.linear(a, a)]
    if onednn.can_pack(a):
        layer = onednn.PackedLinear(a, a.new_zeros(side))
        products.append(lambda: layer(a))
    product = min(_fastest(call, device) for call in products)
    return Ceilings(2 * side**3 / product, 2 * COPIED_BYTES / copy)


def _fastest(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call; the first round warms up."""
    calls = CALLS[device.type]

    def some_calls() -> None:
        for _ in range(calls):
            call()

    times = [timed(some_calls, device)[1] for _ in range(REPEATS + 1)]
    return min(times[1:]) / calls
