"""What stands in front of the first frame, for all passes: text or label, and motion tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
        """
        batch = prompts.shape[0]
        if guidance.passes > 1:
            if negative_prompts is None:
                negative_prompts = model.text_embed.pad([prompts[0, :0]]).expand_as(prompts)
            prompts = torch.cat([prompts, negative_prompts])
        tokens = model.text_embed(prompts.to(model.device, model.dtype))
        if guidance.passes == 3:
            tokens = torch.cat([tokens, tokens[batch:]])
        if model.config.is_video:
            flow, rate = _per_sample(motion_flow, batch, model), _per_sample(fps, batch, model)
            motion = model.motion_embed(flow, rate).repeat(guidance.passes, 1, 1)
            tokens = torch.cat([tokens, motion], dim=1)
        return cls(tokens, batch)

    @classmethod
    def from_labels(
        cls,
        model: NOVATransformer,
        labels: Tensor,
        negative_labels: Tensor,
        guidance: Guidance,
    ) -> "Conditioning":
        """From class labels (B,) in 0..1000."""
        if guidance.passes == 3:
            raise InputError("image_guidance_scale is for text-conditioned models")
        ids = torch.cat([labels, negative_labels]) if guidance.passes > 1 else labels
        return cls(model.label_embed(ids.to(model.device)), labels.shape[0])

    def part(self, start: int, stop: int) -> "Conditioning":
        """Of samples start .. stop - 1."""
        by_pass = self.tokens.unflatten(0, (-1, self.batch_size))
        return Conditioning(by_pass[:, start:stop].flatten(0, 1), stop - start)


def _per_sample(value: float | Sequence[float], batch: int, model: NOVATransformer) -> Tensor:
    values = list(value) if isinstance(value, Sequence) else [value] * batch
    if len(values) != batch:
        raise InputError(f"a list of motion_flow or fps needs {batch} values, got {len(values)}")
    if not all(is_finite_number(v) for v in values):
        raise InputError(f"motion_flow and fps must be finite numbers, got {value!r}")
    return torch.tensor(values, dtype=torch.float32, device=model.device)
