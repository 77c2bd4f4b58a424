"""Rotary positions of queries and keys, rotated where they lie in the output of a qkv layer.

RoPE (arXiv 2104.09864) on axes of time, row and column: which axis a pair of values belongs to is
in the table alone. Pairs are interleaved, (2k, 2k + 1). Reference, operator and gradient.
"""

import torch
from torch import Tensor

from nova_kernels.dispatch import Op, define, through_operator

OP = Op("rope3d")


def rope3d(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    *,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Rotate the queries and keys of a packed qkv tensor.

    Rotation is computed in float32, or float64 for float64.

    Args:
        qkv: (batch, tokens, 3 * num_heads * head_dim), laid out (3, heads, head_dim) in a row.
        cos, sin: (batch or 1, tokens, head_dim / 2) of the angles, any floating dtype.
        num_heads: of the attention layer.
        inplace: write into qkv (where no gradient is needed).
        backend: see `nova_kernels.dispatch`.

    Returns:
        Of qkv's shape and dtype; values are copied. qkv itself if `inplace`.

    Raises:
        ValueError: shapes that do not fit, `inplace` where gradients are needed, or an unknown
            backend.
        BackendError: the backend cannot run on these tensors.
    """
    _check(qkv, cos, sin, num_heads)
    chosen = OP.choose(backend, qkv, cos, sin)
    if inplace and torch.is_grad_enabled() and qkv.requires_grad:
        raise ValueError("rope3d: inplace=True overwrites what a gradient is asked of")
    if chosen == "reference":
        result = reference(qkv, cos, sin, num_heads)
        return qkv.copy_(result) if inplace else result
    if inplace:
        rotate = torch.ops.nova_kernels.rope3d_ if through_operator(qkv) else _rotate_in_place
        rotate(qkv, cos, sin, num_heads, chosen)
        return qkv
    rotate = torch.ops.nova_kernels.rope3d if through_operator(qkv) else _rotate
    return rotate(qkv, cos, sin, num_heads, False, chosen)


def reference(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """The op in plain torch, differentiable; arguments as those of `rope3d`."""
    exact = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    cos, sin = cos.to(exact)[:, :, None], sin.to(exact)[:, :, None]

    def rotated(x: Tensor) -> Tensor:
        even, odd = x[..., 0::2].to(exact), x[..., 1::2].to(exact)
        pairs = even * cos - odd * sin, even * sin + odd * cos
        return torch.stack(pairs, dim=-1).flatten(-2).to(x.dtype)

    return torch.stack([rotated(q), rotated(k), v], dim=2).flatten(2)


def _check(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> None:
    if qkv.dim() != 3 or num_heads < 1 or qkv.shape[-1] % (6 * num_heads):
        raise ValueError(
            f"rope3d: qkv must be (batch, tokens, 3 * heads * head_dim) with an even head_dim and "
            f"{num_heads} heads, got {tuple(qkv.shape)}"
        )
    batch, tokens, width = qkv.shape
    wanted = (tokens, width // (6 * num_heads))
    if cos.shape != sin.shape or cos.shape[1:] != wanted or cos.shape[0] not in (1, batch):
        raise ValueError(
            f"rope3d: cos and sin must be (1 or {batch}, {wanted[0]}, {wanted[1]}), got "
            f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        )


def _rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, backwards: bool, backend: str
) -> Tensor:
    out = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    OP.module(backend).rotate(qkv, cos, sin, num_heads, out, backwards)
    return out


def _rotate_in_place(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, backend: str) -> None:
    OP.module(backend).rotate(qkv, cos, sin, num_heads, qkv, False)


define(
    "rope3d(Tensor qkv, Tensor cos, Tensor sin, int num_heads, bool backwards, str backend)"
    " -> Tensor",
    _rotate,
    lambda qkv, *_: torch.empty_like(qkv, memory_format=torch.contiguous_format),
)
define(
    "rope3d_(Tensor(a!) qkv, Tensor cos, Tensor sin, int num_heads, str backend) -> ()",
    _rotate_in_place,
    lambda *_: None,
)


def _save(ctx, inputs, output) -> None:
    _, cos, sin, ctx.num_heads, ctx.backwards, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx, grad: Tensor):
    # The inverse of a rotation is its transpose.
    cos, sin = ctx.saved_tensors
    rotate = torch.ops.nova_kernels.rope3d
    grad = rotate(grad, cos, sin, ctx.num_heads, not ctx.backwards, ctx.backend)
    return grad, None, None, None, None, None


torch.library.register_autograd("nova_kernels::rope3d", _gradients, setup_context=_save)
