"""Building blocks of both encoders: attention with a cache, the post-norm block, patches."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nova_kernels import block_causal_attention, linear_gelu, residual_norm, rotate_heads
from nova_kernels.dispatch import through_operator
from nova_kernels.ops.linear_gelu import OP as LINEAR_GELU

from .altered_layers import is_plain
from .libraries import TORCH
from .libraries import linear_gelu as gelu_libraries
from .libraries.attention import attend


@dataclass
class Rotary:
    """Rotary table: cos and sin of shape (batch or 1, tokens, head_dim / 2)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def from_angles(cls, angles: Tensor, dtype: torch.dtype) -> "Rotary":
        """From angles (tokens, head_dim / 2) or (batch, tokens, head_dim / 2)."""
        angles = angles if angles.dim() == 3 else angles[None]
        return cls(angles.cos().to(dtype), angles.sin().to(dtype))

    def slice(self, start: int, stop: int) -> "Rotary":
        """The table of tokens start..stop-1."""
        return Rotary(self.cos[:, start:stop], self.sin[:, start:stop])


class KeyValueCache:
    """Keys and values of one attention layer, in buffers allocated once for a whole run.

    Args:
        max_length: tokens that will be appended in all.
    """

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add (batch, heads, n, head_dim) keys and values; returns all of them so far."""
        if self._keys is None or self._values is None:
            batch, heads, _, head_dim = keys.shape
            self._keys = keys.new_empty(batch, heads, self.max_length, head_dim)
            self._values = torch.empty_like(self._keys)
        start, self.length = self.length, self.length + keys.shape[2]
        self._keys[:, :, start : self.length] = keys
        self._values[:, :, start : self.length] = values
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; the buffers stay."""
        self.length = length


class Attention(nn.Module):
    """Multi-head attention; qkv output is laid out (3, heads, head_dim).

    Attributes:
        backend: of the ops, see `nova_kernels.dispatch`.
        kernel_library: of attention without a mask, see `libraries.attention`.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.backend, self.kernel_library = "auto", TORCH
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        *,
        rotary: Rotary | None = None,
        cache: KeyValueCache | None = None,
        block_lengths: list[int] | None = None,
        queries: Tensor | None = None,
        query_rotary: Rotary | None = None,
    ) -> Tensor:
        """Attend from x (batch, tokens, dim) to itself and to what the cache holds.

        Args:
            block_lengths: attend block-causally, after what the cache held; None: everything.
            queries, query_rotary: those tokens (batch, n, dim) that ask and are returned, if not
                all, and their table; all tokens still are keys and values.

        Returns:
            (batch, tokens or n, dim).

        Raises:
            ValueError: queries without their table, or with one where keys have none.
        """
        if queries is not None and (rotary is None) != (query_rotary is None):
            raise ValueError("attention: give rotary and query_rotary, or neither")
        if queries is None:
            q, k, v = self._heads(self.qkv(x), 3)
            query_rotary = rotary
        elif not is_plain(self.qkv):
            (q, _, _), (_, k, v) = (self._heads(self.qkv(tokens), 3) for tokens in (queries, x))
        else:
            dim = x.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            (q,) = self._heads(F.linear(queries, weight[:dim], bias[:dim]), 1)
            k, v = self._heads(F.linear(x, weight[dim:], bias[dim:]), 2)
        if rotary is not None and query_rotary is not None:
            q = rotate_heads(q, query_rotary.cos, query_rotary.sin, backend=self.backend)
            k = rotate_heads(k, rotary.cos, rotary.sin, backend=self.backend)
        earlier = 0 if cache is None else cache.length
        if cache is not None:
            k, v = cache.append(k, v)
        if block_lengths is None or len(block_lengths) == 1:
            out = attend(q, k, v, self.kernel_library)
        else:
            prefix = (k[:, :, :earlier], v[:, :, :earlier]) if earlier else None
            k, v = k[:, :, earlier:], v[:, :, earlier:]
            out = block_causal_attention(
                q, k, v, block_lengths, prefix_kv=prefix, backend=self.backend
            )
        return self.proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(batch, tokens, parts * dim) -> parts of (batch, heads, tokens, head_dim)."""
        return x.unflatten(-1, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class Mlp(nn.Module):
    """Two layers with the exact (erf) GELU between.

    Attributes:
        backend: of the first layer with its activation, see `nova_kernels.dispatch`.
        kernel_library: in place of that op, see `libraries.linear_gelu`. Not where gradients are
            wanted, nor under torch.compile.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.backend, self.kernel_library = "auto", TORCH
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        fc1 = self.fc1
        if not is_plain(fc1):
            return self.fc2(F.gelu(fc1(x)))
        tensors = x, fc1.weight, fc1.bias
        is_sampling = not through_operator(*tensors)
        if is_sampling and self.kernel_library != TORCH:
            return self.fc2(gelu_libraries.linear_gelu(*tensors, self.kernel_library))
        if LINEAR_GELU.choose(self.backend, x) == "reference":
            hidden = F.linear(*tensors)
            # In place: on a CPU a tensor of this size costs as much as its arithmetic.
            return self.fc2(torch.ops.aten.gelu_(hidden) if is_sampling else F.gelu(hidden))
        return self.fc2(linear_gelu(*tensors, backend=self.backend))


def add_normed(
    x: Tensor, branch: Tensor, norm: nn.LayerNorm, *, gate: Tensor | None = None, backend: str
) -> Tensor:
    """x + gate * norm(branch), by the op unless the layer does more than its weights tell."""
    if is_plain(norm, nn.LayerNorm):
        affine = norm.weight, norm.bias
        return residual_norm(x, branch, *affine, gate=gate, backend=backend)
    normed = norm(branch)
    return x + (normed if gate is None else gate * normed)


class Block(nn.Module):
    """Transformer block with the residual added after the norm: x + norm(f(x)).

    Attributes:
        backend: of the ops, see `nova_kernels.dispatch`.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.backend = "auto"
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(
        self,
        x: Tensor,
        *,
        rotary: Rotary | None = None,
        cache: KeyValueCache | None = None,
        block_lengths: list[int] | None = None,
        queries: Tensor | None = None,
        query_rotary: Rotary | None = None,
    ) -> Tensor:
        """x (batch, tokens, dim) -> the same, or only its `queries`. See `Attention.forward`."""
        attended = self.attn(
            x,
            rotary=rotary,
            cache=cache,
            block_lengths=block_lengths,
            queries=queries,
            query_rotary=query_rotary,
        )
        x = self._add_normed(x if queries is None else queries, attended, self.norm1)
        return self._add_normed(x, self.mlp(x), self.norm2)

    def _add_normed(self, x: Tensor, branch: Tensor, norm: nn.LayerNorm) -> Tensor:
        return add_normed(x, branch, norm, backend=self.backend)


class PatchEmbed(nn.Module):
    """Linear embedding of square patches; the weight has the layout of a convolution."""

    def __init__(self, image_dim: int, embed_dim: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(image_dim, embed_dim, patch_size, patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        """(batch, channels, h, w) -> (batch, tokens, embed_dim)."""
        return self.proj(latents).flatten(2).transpose(1, 2)

    def token_weight(self) -> Tensor:
        """(embed_dim, token_dim): the weight for tokens as `patchify` lays them out."""
        return self.proj.weight.permute(0, 2, 3, 1).flatten(1)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """(..., token_dim) tokens of `patchify` -> (..., embed_dim)."""
        if not is_plain(self.proj, nn.Conv2d):
            side = self.patch_size
            patches = unpatchify(tokens.reshape(-1, 1, tokens.shape[-1]), side, (side, side))
            return self.proj(patches).reshape(*tokens.shape[:-1], -1)
        return F.linear(tokens, self.token_weight(), self.proj.bias)


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """(batch, channels, h, w) -> (batch, tokens, patch * patch * channels), tokens row-major.

    Inside a token: row in the patch, column in the patch, channel.
    """
    batch, channels, height, width = latents.shape
    p = patch_size
    x = latents.reshape(batch, channels, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, p * p * channels)


def unpatchify(tokens: Tensor, patch_size: int, latent_size: tuple[int, int]) -> Tensor:
    """The inverse of `patchify` for latents of `latent_size` (h, w)."""
    height, width = latent_size
    p = patch_size
    x = tokens.reshape(tokens.shape[0], height // p, width // p, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], -1, height, width)
