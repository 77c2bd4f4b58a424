"""A NOVA model with its training objective, as a module whose forward pass gives the losses."""

import torch
from torch import Tensor, nn

from ..model import NOVATransformer
from ..objective import TrainingDraws, training_losses
from ..schedule import SchedulerConfig


class NOVAObjective(nn.Module):
    """Wraps a model, so that accelerate can (data parallel wrappers act on `forward`)."""

    def __init__(self, model: NOVATransformer, scheduler: SchedulerConfig):
        super().__init__()
        self.model = model
        self.scheduler = scheduler

    def forward(
        self,
        latents: Tensor,
        visible: Tensor,
        noise: Tensor,
        timestep_index: Tensor,
        motion_flow: Tensor,
        fps: Tensor,
        prompt: Tensor | None = None,
        prompt_length: Tensor | None = None,
        label: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch of B clips.

        Args:
            latents: (B, C, T, h, w), scaled.
            visible, noise, timestep_index: see `TrainingDraws`.
            motion_flow, fps: (B,).
            prompt: (B, text_token_len, text_token_dim) of which the first prompt_length (B,) rows
                count; the null prompt takes the others. Of class-conditional models, label (B,).

        Returns:
            Scalars: "loss" is what is optimised; for clips also its parts loss_t2i, loss_i2i.
        """
        if label is None:
            prefix = self._embed_prompts(prompt, prompt_length)
        else:
            prefix = self.model.label_embed(label)
        if self.model.config.is_video:
            prefix = torch.cat([prefix, self.model.motion_embed(motion_flow, fps)], dim=1)
        draws = TrainingDraws(visible, noise, timestep_index)
        losses = training_losses(self.model, latents, prefix, draws, self.scheduler)
        return {"loss": sum(losses.values()), **losses}

    def _embed_prompts(self, prompt: Tensor, length: Tensor) -> Tensor:
        text_embed = self.model.text_embed
        row = torch.arange(prompt.shape[1], device=prompt.device)
        is_text = (row < length[:, None])[..., None]
        null = text_embed.weight[: prompt.shape[1]].to(prompt.dtype)
        return text_embed(torch.where(is_text, prompt, null))
