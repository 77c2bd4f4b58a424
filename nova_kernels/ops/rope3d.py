"""Rotary positions of queries and keys, rotated where they lie in the output of a qkv layer.

RoPE (arXiv 2104.09864) on axes of time, row and column: which axis a pair of values belongs to is
in the table alone. Pairs are interleaved, (2k, 2k + 1). Reference, operator and gradient.
"""

import torch
from torch import Tensor

from nova_kernels.checks import check_writable
from nova_kernels.dispatch import (
    Op,
    define,
    define_gradient,
    new_rows,
    through_operator,
    written,
)

OP = Op("rope3d", verified=frozenset({"triton"}))


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

    Kernels compute in float32.

    Args:
        qkv: (batch, tokens, 3 * num_heads * head_dim), laid out (3, heads, head_dim) in a row.
        cos, sin: (batch or 1, tokens, head_dim / 2) of the angles, any floating dtype; without a
            gradient.
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
    if inplace:
        check_writable("rope3d", "qkv", qkv)
        if torch.is_grad_enabled() and qkv.requires_grad:
            raise ValueError("rope3d: inplace=True overwrites what a gradient is asked of")
    # (batch, tokens, 3 * heads, head_dim): queries and keys are the first two thirds.
    heads = qkv.unflatten(-1, (3 * num_heads, -1))
    if chosen == "reference":
        result = reference(heads, cos, sin, 2 * num_heads).flatten(2)
        return qkv.copy_(result) if inplace else result
    if inplace:
        rotate = torch.ops.nova_kernels.rope3d_ if through_operator() else _rotate_in_place
        rotate(heads[:, :, : 2 * num_heads], cos, sin, chosen)
        return qkv
    rotate = torch.ops.nova_kernels.rope3d if through_operator(qkv) else _rotate
    return rotate(heads, cos, sin, 2 * num_heads, False, chosen).flatten(2)


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> Tensor:
    """Rotate queries or keys that are heads already.

    Args:
        x: (batch, heads, tokens, head_dim).
        cos, sin: (batch or 1, tokens, head_dim / 2), as in `rope3d`.
        backend: see `nova_kernels.dispatch`.

    Returns:
        Of x's shape and dtype.

    Raises:
        As `rope3d`.
    """
    if x.dim() != 4 or x.shape[3] % 2 or not x.is_floating_point():
        raise ValueError(
            f"rope3d: heads must be (batch, heads, tokens, head_dim) with an even head_dim and a "
            f"floating dtype, got {tuple(x.shape)} of {x.dtype}"
        )
    _check_table(cos, sin, (x.shape[0], x.shape[2], x.shape[3] // 2))
    chosen = OP.choose(backend, x, cos, sin)
    heads = x.transpose(1, 2)
    if chosen == "reference":
        return reference(heads, cos, sin, x.shape[1]).transpose(1, 2)
    rotate = torch.ops.nova_kernels.rope3d if through_operator(x) else _rotate
    return rotate(heads, cos, sin, x.shape[1], False, chosen).transpose(1, 2)


def reference(heads: Tensor, cos: Tensor, sin: Tensor, num_rotated: int) -> Tensor:
    """Rotate the first of some heads in plain torch, differentiable.

    Args:
        heads: (batch, tokens, heads, head_dim).
        cos, sin: (batch or 1, tokens, head_dim / 2).
        num_rotated: how many heads turn; the others are copied.
    """
    cos, sin = cos[:, :, None].to(heads.dtype), sin[:, :, None].to(heads.dtype)
    turning, others = heads[:, :, :num_rotated], heads[:, :, num_rotated:]
    even, odd = turning[..., 0::2], turning[..., 1::2]
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return torch.cat([pairs.flatten(-2), others], dim=2)


def _check(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> None:
    fits = qkv.dim() == 3 and num_heads >= 1 and qkv.shape[-1] % (6 * num_heads) == 0
    if not fits or not qkv.is_floating_point():
        raise ValueError(
            f"rope3d: qkv must be (batch, tokens, 3 * heads * head_dim) with an even head_dim, "
            f"{num_heads} heads and a floating dtype, got {tuple(qkv.shape)} of {qkv.dtype}"
        )
    batch, tokens, width = qkv.shape
    _check_table(cos, sin, (batch, tokens, width // (6 * num_heads)))


def _check_table(cos: Tensor, sin: Tensor, wanted: tuple[int, int, int]) -> None:
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("rope3d: the tables cos and sin have no gradient; detach() them")
    batch, tokens, pairs = wanted
    fits = cos.dim() == 3 and cos.shape[1:] == (tokens, pairs) and cos.shape[0] in (1, batch)
    if not fits or cos.shape != sin.shape:
        raise ValueError(
            f"rope3d: cos and sin must be (1 or {batch}, {tokens}, {pairs}), got "
            f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        )


def _rotate(
    heads: Tensor, cos: Tensor, sin: Tensor, num_rotated: int, backwards: bool, backend: str
) -> Tensor:
    out = new_rows(heads)
    OP.module(backend).rotate(heads, cos, sin, out, num_rotated, backwards)
    return out


def _rotate_in_place(heads: Tensor, cos: Tensor, sin: Tensor, backend: str) -> None:
    OP.module(backend).rotate(heads, cos, sin, heads, heads.shape[2], False)
    written(heads)


define(
    "rope3d(Tensor heads, Tensor cos, Tensor sin, int num_rotated, bool backwards, str backend)"
    " -> Tensor",
    _rotate,
    lambda heads, *_: new_rows(heads),
)
define(
    "rope3d_(Tensor(a!) heads, Tensor cos, Tensor sin, str backend) -> ()",
    _rotate_in_place,
    lambda *_: None,
)


def _save(ctx, inputs, output) -> None:
    _, cos, sin, ctx.num_rotated, ctx.backwards, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx, grad: Tensor):
    # The inverse of a rotation is its transpose.
    cos, sin = ctx.saved_tensors
    rotate = torch.ops.nova_kernels.rope3d
    grad = rotate(grad, cos, sin, ctx.num_rotated, not ctx.backwards, ctx.backend)
    return grad, None, None, None, None, None


define_gradient("rope3d", _gradients, _save)
