"""What stands in front of the first frame, for all passes: text or label, and motion tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nova_kernels.autocast import without_autocast

from .errors import InputError
from .guidance import Guidance
from .model import DEFAULT_FPS, DEFAULT_MOTION_FLOW, NOVATransformer
from .numeric import is_finite_number


@dataclass(frozen=True)
class Conditioning:
    """Tokens in front of frame 0: text or label, then motion.

    Attributes:
        tokens: (passes * B, P, E), pass-major: all conditional rows, then all unconditional...
        batch_size: B.
    """

    tokens: Tensor
    batch_size: int

    @classmethod
    def from_text(
        cls,
        model: NOVATransformer,
        prompts: Tensor,
        negative_prompts: Tensor | None,
        guidance: Guidance,
        *,
        motion_flow: float | Sequence[float] = DEFAULT_MOTION_FLOW,
        fps: float | Sequence[float] = DEFAULT_FPS,
    ) -> "Conditioning":
        """From padded prompt embeddings (B, text_token_len, text_token_dim).

        Args:
            negative_prompts: same shape; None: the null prompt. Used where guidance is on.
            motion_flow, fps: a number, or one a sample; used by video models only.

        Raises:
            InputError: a motion_flow or fps that is not finite, an fps of 0 or below, or a list of
                another length than the batch.
        """
        batch = prompts.shape[0]
        if guidance.passes > 1:
            if negative_prompts is None:
                negative_prompts = model.text_embed.pad([prompts[0, :0]]).expand_as(prompts)
            prompts = torch.cat([prompts, negative_prompts])
        with without_autocast(model.device):
            tokens = model.text_embed(prompts.to(model.device, model.dtype))
            if guidance.passes == 3:
                tokens = torch.cat([tokens, tokens[batch:]])
            return cls(_with_motion(model, tokens, motion_flow, fps, batch), batch)

    @classmethod
    def from_labels(
        cls,
        model: NOVATransformer,
        labels: Tensor,
        negative_labels: Tensor,
        guidance: Guidance,
        *,
        motion_flow: float | Sequence[float] = DEFAULT_MOTION_FLOW,
        fps: float | Sequence[float] = DEFAULT_FPS,
    ) -> "Conditioning":
        """From class labels (B,) in 0..1000; motion_flow and fps as for text.

        Raises:
            InputError: as for text, or image guidance, which models of classes do not have.
        """
        if guidance.passes == 3:
            raise InputError("image_guidance_scale is for text-conditioned models")
        batch = labels.shape[0]
        ids = torch.cat([labels, negative_labels]) if guidance.passes > 1 else labels
        with without_autocast(model.device):
            tokens = model.label_embed(ids.to(model.device))
            return cls(_with_motion(model, tokens, motion_flow, fps, batch), batch)

    def part(self, start: int, stop: int) -> "Conditioning":
        """Of samples start .. stop - 1."""
        by_pass = self.tokens.unflatten(0, (-1, self.batch_size))
        return Conditioning(by_pass[:, start:stop].flatten(0, 1), stop - start)


def _with_motion(
    model: NOVATransformer,
    tokens: Tensor,
    motion_flow: float | Sequence[float],
    fps: float | Sequence[float],
    batch: int,
) -> Tensor:
    """Tokens (passes * batch, P, E) with those of motion behind, which video models have."""
    if not model.config.is_video:
        return tokens
    flow, rate = (
        torch.tensor(numbers, dtype=torch.float32, device=model.device)
        for numbers in _motion_of_samples(motion_flow, fps, batch)
    )
    motion = model.motion_embed(flow, rate).repeat(tokens.shape[0] // batch, 1, 1)
    return torch.cat([tokens, motion], dim=1)


def _motion_of_samples(
    motion_flow: float | Sequence[float], fps: float | Sequence[float], batch: int
) -> tuple[list[float], list[float]]:
    """One of both for every sample."""
    flows, rates = (
        list(value) if isinstance(value, Sequence) else [value] * batch
        for value in (motion_flow, fps)
    )
    for name, values in (("motion_flow", flows), ("fps", rates)):
        if len(values) != batch:
            raise InputError(f"a list of {name} needs {batch} values, got {len(values)}")
        for value in values:
            if not is_finite_number(value):
                raise InputError(f"{name} must be a finite number, got {value!r}")
    if min(rates) <= 0:
        raise InputError(f"fps must be above 0, got {min(rates)}")
    return flows, rates
