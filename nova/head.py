"""The diffusion MLP: predicts noise or velocity of one token from the encoder's output for it.

`DiffusionMLP` is the layer as trained. `PreparedHead` is the same function arranged for sampling.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from nova_kernels import scale_shift
from nova_kernels.head_weights import BlockWeights, HeadWeights, with_unit_scale
from nova_kernels.ops.denoise import ADA_NORM_EPS

from .altered_layers import is_altered, is_plain
from .errors import InputError
from .layers import PatchEmbed, add_normed
from .positions import timestep_features


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
    """x + gate * norm2(mlp(LN(x) * (1 + scale) + shift)).

    Attributes:
        backend: of the ops, see `nova_kernels.dispatch`.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.backend = "auto"
        self.norm1 = Modulation(dim, num_stats=3)
        self.proj = Projector(dim, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        scale, shift, gate = self.norm1.proj(z).chunk(3, dim=-1)
        h = scale_shift(x, scale, shift, eps=ADA_NORM_EPS, backend=self.backend)
        return add_normed(x, self.proj(h), self.norm2, gate=gate, backend=self.backend)


class DiffusionMLP(nn.Module):
    """Per-token denoiser.

    Args:
        depth, dim: number and width of the blocks.
        cond_dim: width of the image encoder.
        patch_size, image_dim: a token is patch_size^2 * image_dim values in `patchify`'s order.

    Attributes:
        backend: of the ops, see `nova_kernels.dispatch`.
    """

    def __init__(self, depth: int, dim: int, cond_dim: int, patch_size: int, image_dim: int):
        super().__init__()
        self.backend = "auto"
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
        # The C++ backend has only the whole sampling loop, not this op.
        backend = "reference" if self.backend == "cpp" else self.backend
        return self.head(scale_shift(h, scale, shift, eps=ADA_NORM_EPS, backend=backend))


class PreparedHead:
    """A `DiffusionMLP` arranged for the denoise loop of a run (`nova_kernels.denoise`).

    Timestep embeddings are computed once a run, `condition_proj` once a set.

    Args:
        head: the trained layer; its weights are read, not copied, except for small ones.
        timesteps: (D,) diffusion times of the loop.

    Raises:
        InputError: a module was wrapped, replaced or hooked, so that its weights are not all of it.

    Attributes:
        weights: of what is in the loop.
        time_embeddings: (D, dim).
        backend: of the ops, see `nova_kernels.dispatch`.
    """

    def __init__(self, head: DiffusionMLP, timesteps: Tensor):
        for name, module in head.named_modules():
            # `time_cond_embed`'s own modules are run as they are.
            if is_altered(module) and not name.startswith("time_cond_embed."):
                raise _passed_over(module)
        self._embed = head.time_cond_embed
        self.backend = head.backend
        self.time_embeddings = self._embed.embed_timesteps(timesteps)
        self.weights = HeadWeights(
            embed=_token_embedding(head.patch_embed),
            blocks=tuple(
                BlockWeights(
                    _weights(block.proj.fc1),
                    _weights(block.proj.fc2),
                    _weights(block.norm2, nn.LayerNorm),
                )
                for block in head.blocks
            ),
            modulations=tuple(
                with_unit_scale(*_weights(modulation.proj))
                for modulation in (*(block.norm1 for block in head.blocks), head.norm)
            ),
            head=_weights(head.head),
        )

    def condition(self, cond: Tensor) -> Tensor:
        """(..., cond_dim) encoder output -> (..., dim), what the loop takes."""
        return self._embed.condition_proj(cond)


def _weights(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer of torch's `kind`; what else it did would be passed over."""
    if not is_plain(layer, kind):
        raise _passed_over(layer)
    return layer.weight, layer.bias


def _token_embedding(embed: PatchEmbed) -> tuple[Tensor, Tensor]:
    _, bias = _weights(embed.proj, nn.Conv2d)
    return embed.token_weight(), bias


def _passed_over(module: nn.Module) -> InputError:
    return InputError(
        "the denoise loop reads the weights of the diffusion MLP's layers, and one of its modules, "
        f"of type {type(module).__name__}, does more than its weights tell: merge adapters into "
        "the weights, remove hooks, and leave these layers out of quantisation"
    )
