"""The gate of fps.py: what a sampler has to agree with for its times to count."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from measure import relative_error, timed
from random_model import RandomModelRun
from torch import Tensor

from nova.devices import free_memory, is_out_of_memory
from nova.plain_sampling import generate_frames_plain

# Outputs of all samplers must agree with plain's to this relative error.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}
# In half precision plain itself is off, and on a GPU it runs this package's kernels, which may be
# wrong. No sampler may be more than so many times as far from float32 as plain torch, or than this.
ALLOWED_TIMES, ALLOWED_IN_FLOAT32 = 2.0, TOLERANCES[torch.float32]
# Sets that plain torch computes to tell: all of a large batch would take a GPU minutes.
PLAIN_TORCH_SETS = 4


@dataclass(frozen=True)
class Agreement:
    """How far a sampler's latents are from what they should be; relative errors.

    Attributes:
        error: against the plain sampler's; infinite for another shape.
        float32_error: against plain torch in float32, in the first sets; None: that was not
            computed.
        refused: why they are wrong; None: they are right.
    """

    error: float
    float32_error: float | None
    refused: str | None


@dataclass(frozen=True)
class PlainTorch:
    """What the first sets reveal by plain torch, without any kernel of this package.

    Attributes:
        tokens: (batch, n, token_dim) in float32, in the order in which they are revealed.
        error: relative error of plain torch in the dtype of the run.
    """

    tokens: Tensor
    error: float


class Gate:
    """Checks latents of one run, all of the same weights and noise.

    Args:
        tolerance: largest relative error against plain.
        compared_sets: only the tokens of so many sets of the first frame count; None: all.
        plain_torch: of `first_sets_by_plain_torch`; None: nothing is held against it. With
            `compared_sets` the error is told, but refuses nothing.
    """

    def __init__(
        self,
        run: RandomModelRun,
        tolerance: float,
        *,
        compared_sets: int | None = None,
        plain_torch: PlainTorch | None = None,
    ):
        self._run, self._tolerance, self._compared_sets = run, tolerance, compared_sets
        self._plain_torch = plain_torch
        self._plain: Tensor | None = None

    def check(self, latents: Tensor) -> Agreement:
        """Hold a sampler's latents against the first ones that were given, which are plain's."""
        if self._plain is not None and latents.shape != self._plain.shape:
            shape, plains = tuple(latents.shape), tuple(self._plain.shape)
            return Agreement(math.inf, None, f"wrong: shape {shape}, plain's {plains}")
        float32_error = None
        if self._plain_torch is not None:
            first = self._run.first_tokens(latents, PLAIN_TORCH_SETS)
            float32_error = relative_error(first, self._plain_torch.tokens)
        if self._plain is None:
            self._plain = latents
        compared = latents, self._plain
        if self._compared_sets is not None:
            compared = [self._run.first_tokens(each, self._compared_sets) for each in compared]
        error = relative_error(*compared)
        return Agreement(error, float32_error, self._refusal(latents, error, float32_error))

    def _refusal(self, latents: Tensor, error: float, float32_error: float | None) -> str | None:
        if not latents.isfinite().all():
            return "wrong: NaN or infinite values"
        if not error <= self._tolerance:
            return f"wrong: differs from plain by {error:.1e}, allowed {self._tolerance:.0e}"
        if self._plain_torch is not None and self._compared_sets is None:
            allowed = max(ALLOWED_TIMES * self._plain_torch.error, ALLOWED_IN_FLOAT32)
            if not float32_error <= allowed:
                return f"wrong: differs from float32 by {float32_error:.1e}, allowed {allowed:.1e}"
        return None


def first_sets_by_plain_torch(
    run: RandomModelRun, device: torch.device, say: Callable[[str], None]
) -> PlainTorch | None:
    """The first sets by the plain sampler and plain torch, in float32 and in the dtype of the run.

    Weights, prompts and noise are those of the run.

    Args:
        say: is told how long it took.

    Returns:
        None where there is not enough memory.
    """

    def tokens(dtype: torch.dtype) -> Tensor:
        plain = run.by_plain_torch(PLAIN_TORCH_SETS, dtype)
        return plain.first_tokens(plain.sample(generate_frames_plain), PLAIN_TORCH_SETS)

    def compute() -> PlainTorch:
        in_float32 = tokens(torch.float32)
        rounded = in_float32 if run.dtype == torch.float32 else tokens(run.dtype)
        return PlainTorch(in_float32, relative_error(rounded, in_float32))

    try:
        result, seconds = timed(compute, device)
        say(f"the first sets by plain torch: {seconds:.3g} s")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        result = None
        say("not enough memory to compare with plain torch")
    # Only here is the error gone, whose traceback refers to the attempt's memory.
    free_memory(device)
    return result
