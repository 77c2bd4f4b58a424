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
# In half precision plain itself is off. Others, which round elsewhere, may be so many times as far
# from float32 as plain is.
ALLOWED_TIMES = 2.0
# Sets that are computed in float32 to tell: all of a large batch would take a GPU minutes.
FLOAT32_SETS = 4


@dataclass(frozen=True)
class Agreement:
    """How far a sampler's latents are from what they should be; relative errors.

    Attributes:
        error: against the plain sampler's; infinite for another shape.
        float32_error: against float32, in the first sets; None: float32 was not computed.
        refused: why they are wrong; None: they are right.
    """

    error: float
    float32_error: float | None
    refused: str | None


class Gate:
    """Checks latents of one run, all of the same weights and noise.

    Args:
        tolerance: largest relative error against plain.
        compared_sets: only the tokens of so many sets of the first frame count; None: all.
        float32_tokens: of `first_tokens_in_float32`; None: nothing is held against float32. With
            `compared_sets` the error is told, but refuses nothing.
    """

    def __init__(
        self,
        run: RandomModelRun,
        tolerance: float,
        *,
        compared_sets: int | None = None,
        float32_tokens: Tensor | None = None,
    ):
        self._run, self._tolerance, self._compared_sets = run, tolerance, compared_sets
        self._float32_tokens = float32_tokens
        self._plain: Tensor | None = None
        self._allowed_float32_error: float | None = None

    def check(self, latents: Tensor) -> Agreement:
        """Hold a sampler's latents against the first ones that were given, which are plain's."""
        if self._plain is not None and latents.shape != self._plain.shape:
            shape, plains = tuple(latents.shape), tuple(self._plain.shape)
            return Agreement(math.inf, None, f"wrong: shape {shape}, plain's {plains}")
        float32_error = None
        if self._float32_tokens is not None:
            first = self._run.first_tokens(latents, FLOAT32_SETS)
            float32_error = relative_error(first, self._float32_tokens)
        if self._plain is None:
            self._plain = latents
            if float32_error is not None and self._compared_sets is None:
                self._allowed_float32_error = ALLOWED_TIMES * float32_error
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
        allowed = self._allowed_float32_error
        if allowed is not None and not float32_error <= allowed:
            return f"wrong: differs from float32 by {float32_error:.1e}, allowed {allowed:.1e}"
        return None


def first_tokens_in_float32(
    run: RandomModelRun, device: torch.device, say: Callable[[str], None]
) -> Tensor | None:
    """What the first sets reveal, by the plain sampler in float32.

    Weights, prompts and noise are those of the run.

    Args:
        say: is told how long it took.

    Returns:
        (batch, n, token_dim), in the order in which they are revealed; None where there is not
        enough memory.
    """

    def compute() -> Tensor:
        in_float32 = run.in_float32(FLOAT32_SETS)
        return in_float32.first_tokens(in_float32.sample(generate_frames_plain), FLOAT32_SETS)

    try:
        tokens, seconds = timed(compute, device)
        say(f"the first sets in float32: {seconds:.3g} s")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        tokens = None
        say("not enough memory to compare with float32")
    # Only here is the error gone, whose traceback refers to the attempt's memory.
    free_memory(device)
    return tokens
