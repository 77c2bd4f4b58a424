"""A kernel launch as a value: run on a GPU, or compiled ahead of time for a card that is not here.

Every op plans its launches from tensors alone. Planned from tensors on the meta device, they are
what `ahead_of_time.py` compiles, so that the tests compile exactly what will run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nova_kernels.checks import refuse_negating_views

# Of every launch, beside its own. Products and sums make one instruction, which Triton from 3.10 on
# does only where it is asked to.
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        kernel: the jitted function.
        grid: number of programs along up to three axes.
        arguments: tensors and numbers, by the kernel's parameter names.
        constants: compile-time parameters, by name.
        num_warps, num_stages: of the launch setting.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    def run(self) -> None:
        """Launch on the tensors' device and its current stream. An empty grid does nothing.

        Raises:
            BackendError: see `refuse_negating_views`.
        """
        if 0 in self.grid:
            return
        tensors = [value for value in self.arguments.values() if isinstance(value, Tensor)]
        refuse_negating_views(self.kernel.__name__, *tensors)
        with torch.cuda.device_of(tensors[0]):
            self.kernel[self.grid](
                **self.arguments,
                **self.constants,
                num_warps=self.num_warps,
                num_stages=self.num_stages,
                **OPTIONS,
            )


def ceil_div(a: int, b: int) -> int:
    """How many pieces of size b cover a."""
    return -(-a // b)
