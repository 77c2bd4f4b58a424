"""The diffusion MLP: predicts noise or velocity of one token from the encoder's output for it.

`DiffusionMLP` is the layer as trained. `PreparedHead` is the same function arranged for sampling:
what does not change inside the denoise loop is computed before it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import PatchEmbed
from .positions import timestep_features

ADA_NORM_EPS = 1e-6


class Projector(nn.Module):
    """Two layers with SiLU between."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, out_dim)
        self.fc2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


class TimeConditionEmbed(nn.Module):
    """Embeds the diffusion timestep and the encoder's output."""

    def __init__(self, cond_dim: int, dim: int):
        super().__init__()
        self.timestep_proj = Projector(256, dim)
        self.condition_proj = Projector(cond_dim, dim)

    def embed_timesteps(self, timesteps: Tensor) -> Tensor:
        """(...,) timesteps in 0..1000 -> (..., dim)."""
        dtype = self.timestep_proj.fc1.weight.dtype
        return self.timestep_proj(timestep_features(timesteps).to(dtype))


class Modulation(nn.Module):
    """The projection that gives the scale, shift (and gate) vectors of an adaptive LayerNorm."""

    def __init__(self, dim: int, num_stats: int):
        super().__init__()
        self.proj = nn.Linear(dim, num_stats * dim)


class DiffusionBlock(nn.Module):
    """x + gate * norm2(mlp(LN(x) * (1 + scale) + shift))."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm1 = Modulation(dim, num_stats=3)
        self.proj = Projector(dim, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        scale, shift, gate = self.norm1.proj(z).chunk(3, dim=-1)
        return x + gate * self.norm2(self.proj(scale_shift(x, scale, shift)))


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LN(x) * (1 + scale) + shift, the LayerNorm without affine parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=ADA_NORM_EPS) * (1 + scale) + shift


class DiffusionMLP(nn.Module):
    """Per-token denoiser.

    Args:
        depth, dim: number and width of the blocks.
        cond_dim: width of the image encoder.
        patch_size, image_dim: a token is patch_size^2 * image_dim values in `patchify`'s order.
    """

    def __init__(self, depth: int, dim: int, cond_dim: int, patch_size: int, image_dim: int):
        super().__init__()
        self.patch_embed = PatchEmbed(image_dim, dim, patch_size)
        self.time_cond_embed = TimeConditionEmbed(cond_dim, dim)
        self.blocks = nn.ModuleList(DiffusionBlock(dim) for _ in range(depth))
        self.norm = Modulation(dim, num_stats=2)
        self.head = nn.Linear(dim, patch_size**2 * image_dim)

    def forward(self, x: Tensor, timesteps: Tensor, cond: Tensor) -> Tensor:
        """Predict for every token.

        Args:
            x: (..., token_dim) noisy tokens.
            timesteps: diffusion time in 0..1000, broadcast against x's leading axes.
            cond: (..., cond_dim) encoder output.

        Returns:
            (..., token_dim) prediction.
        """
        embed = self.time_cond_embed
        z = F.silu(embed.condition_proj(cond) + embed.embed_timesteps(timesteps))
        h = self.patch_embed.embed_tokens(x)
        for block in self.blocks:
            h = block(h, z)
        return self.predict_tokens(h, z)

    def predict_tokens(self, h: Tensor, z: Tensor) -> Tensor:
        """The last layer: features (..., dim) and silu(condition) z -> (..., token_dim)."""
        scale, shift = self.norm.proj(z).chunk(2, dim=-1)
        return self.head(scale_shift(h, scale, shift))


# Modulation vectors are made for as many denoise steps at once as fit this many bytes.
MODULATION_BUDGET = 256 * 2**20


@dataclass
class StepVectors:
    """Modulation of one denoise step: per block (1 + scale, shift, gate), and the last two."""

    blocks: list[tuple[Tensor, Tensor, Tensor]]
    final: tuple[Tensor, Tensor]


class PreparedHead:
    """A `DiffusionMLP` arranged for the denoise loop of a run.

    Timestep embeddings are computed once a run. `condition_proj` runs once a set, and the vectors
    of the adaptive norms, which depend on condition and timestep alone, come from one GEMM over all
    steps (`modulate`), so that the loop itself (`predict`) holds only the blocks' MLPs.

    Args:
        head: the trained layer; its weights are read, not copied, except for two small ones.
        timesteps: (D,) diffusion times of the loop.
    """

    def __init__(self, head: DiffusionMLP, timesteps: Tensor):
        self._head = head
        self._time_embeddings = head.time_cond_embed.embed_timesteps(timesteps)
        self._patch_weight = head.patch_embed.token_weight()
        self._projections = [
            _with_unit_scale(modulation.proj)
            for modulation in (*(block.norm1 for block in head.blocks), head.norm)
        ]

    def condition(self, cond: Tensor) -> Tensor:
        """(rows, cond_dim) encoder output -> (rows, dim), what `modulate` takes."""
        return self._head.time_cond_embed.condition_proj(cond)

    def steps_per_chunk(self, rows: int) -> int:
        """Denoise steps whose modulation vectors for `rows` rows fit the memory budget."""
        per_step = rows * sum(weight.shape[0] for weight, _ in self._projections)
        item = self._patch_weight.element_size()
        return max(1, MODULATION_BUDGET // (per_step * item))

    def modulate(self, condition: Tensor, start: int, stop: int, passes: int) -> list[StepVectors]:
        """The vectors of denoise steps start..stop-1 for conditions (passes * n, dim).

        Every vector is (passes, n, dim).
        """
        z = F.silu(condition + self._time_embeddings[start:stop, None])
        vectors = [
            F.linear(z, weight, bias).unflatten(1, (passes, -1))
            for weight, bias in self._projections
        ]
        blocks = [v.unflatten(-1, (3, -1)).unbind(-2) for v in vectors[:-1]]
        final = vectors[-1].unflatten(-1, (2, -1)).unbind(-2)
        return [
            StepVectors(
                blocks=[(scale[d], shift[d], gate[d]) for scale, shift, gate in blocks],
                final=(final[0][d], final[1][d]),
            )
            for d in range(stop - start)
        ]

    def predict(self, x: Tensor, vectors: StepVectors) -> Tensor:
        """Predictions of one denoise step.

        Args:
            x: (n, token_dim) noisy tokens, shared by all guidance passes.
            vectors: `modulate`'s result for this step.

        Returns:
            (passes, n, token_dim).
        """
        head = self._head
        # One pass until the first block's vectors, which differ between passes, broadcast it.
        h = F.linear(x, self._patch_weight, head.patch_embed.proj.bias)[None]
        width = h.shape[-1:]
        for block, (scale, shift, gate) in zip(head.blocks, vectors.blocks, strict=True):
            y = torch.addcmul(shift, F.layer_norm(h, width, eps=ADA_NORM_EPS), scale)
            y = block.proj.fc2(F.silu(block.proj.fc1(y)))
            h = torch.addcmul(h, gate, block.norm2(y))
        scale, shift = vectors.final
        h = torch.addcmul(shift, F.layer_norm(h, width, eps=ADA_NORM_EPS), scale)
        return head.head(h)


def _with_unit_scale(proj: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of a modulation whose first output is 1 + scale instead of scale."""
    bias = proj.bias.clone()
    bias[: proj.in_features] += 1
    return proj.weight, bias
