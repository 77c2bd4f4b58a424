"""Attention whose queries see all keys up to the end of their own block, block after block.

In NOVA (arXiv 2412.14169) a block is a frame, and the first one has the prompt in front. One call
serves training and prefill (blocks), continuation and cached decoding (a prefix of keys and
values). Reference, operator and gradient.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from nova_kernels.block_layout import Block, BlockLayout, Flags, Lengths
from nova_kernels.dispatch import (
    Op,
    define,
    define_gradient,
    define_no_gradient,
    new_rows,
    through_operator,
)
from nova_kernels.ops.rope3d import rotate_heads

OP = Op("block_causal_attention")
HEAD_DIMS = (32, 64, 96, 128)  # of the kernels


def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_lengths: Lengths,
    *,
    bidirectional: Flags = True,
    prefix_kv: tuple[Tensor, Tensor] | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v, every query over the keys that it sees.

    A key or value that is not finite reaches the results of those queries alone that see it, and a
    gradient only by way of a query: its own row, and the keys and values that it sees. Nothing
    crosses to another sequence, or to queries of a block before. Inside a causal block it may
    reach all tokens of the block, also those before it.

    Args:
        q, k, v: (batch, heads, tokens, head_dim), any strides.
        block_lengths: of the blocks of a sequence, which add up to tokens; a list of such lists
            for sequences packed one after the other, which do not see each other. Integers, also
            of numpy or in tensors (those on a GPU are waited for).
        bidirectional: whether the tokens of a block all see each other, or only those before
            them; one flag, or one a block in the form of block_lengths.
        prefix_kv: keys and values (batch, heads, m, head_dim) in front, which every query sees (a
            cache); not for packed sequences.
        rope: cos and sin (batch or 1, tokens, head_dim / 2) that q and k are rotated by (see
            `rope3d`); a prefix has been rotated before. The tables have no gradient.
        scale: None: head_dim ** -0.5.
        return_lse: also the log-sum-exp of the scaled scores (natural logarithm), by which parts
            of an attention can be merged. It has no gradient.
        backend: see `nova_kernels.dispatch`. Other than the reference, head_dim 32, 64, 96, 128.

    Returns:
        (batch, heads, tokens, head_dim) of q's dtype; with `return_lse` also
        (batch, heads, tokens), float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or lengths that do not fit, or an unknown backend.
        BackendError: the backend cannot run on these tensors.
    """
    layout = BlockLayout.of(block_lengths, bidirectional)
    prefix_k, prefix_v = prefix_kv if prefix_kv is not None else (None, None)
    _check(q, k, v, layout, prefix_k, prefix_v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    given = [t for t in (q, k, v, prefix_k, prefix_v) if t is not None]
    if backend == "auto" and q.shape[-1] not in HEAD_DIMS:
        backend = "reference"
    chosen = OP.choose(backend, *given)
    if rope is not None:
        # Kernels have no gradient of the tables, so the reference has none either.
        cos, sin = (table.detach() for table in rope)
        q, k = (rotate_heads(x, cos, sin, backend=chosen) for x in (q, k))
    if chosen == "reference":
        if return_lse:
            return reference_with_lse(q, k, v, layout, prefix_k, prefix_v, scale)
        return reference(q, k, v, layout, prefix_k, prefix_v, scale)
    if through_operator(*given):
        lengths = [length for blocks in layout.lengths for length in blocks]
        flags = [flag for blocks in layout.bidirectional for flag in blocks]
        counts = [len(blocks) for blocks in layout.lengths]
        out, lse = torch.ops.nova_kernels.block_causal_attention(
            q, k, v, prefix_k, prefix_v, lengths, flags, counts, scale, chosen
        )
    else:
        out, lse = OP.module(chosen).forward(q, k, v, prefix_k, prefix_v, layout, scale)
    return (out, lse) if return_lse else out


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    scale: float,
) -> Tensor:
    """The op by torch's own attention, a call for every block, on what the block sees."""
    outputs = [_no_tokens(q)]
    for block in layout.blocks():
        queries = q[:, :, block.start : block.stop]
        keys, values = _visible(block, k, prefix_k), _visible(block, v, prefix_v)
        mask = _causal_mask(block, queries, keys)
        outputs.append(
            F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
        )
    return torch.cat(outputs, dim=2)


def reference_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The definition, block by block in float32 or float64."""
    exact = torch.promote_types(q.dtype, torch.float32)
    outputs = [_no_tokens(q)]
    sums = [q.new_empty(*q.shape[:2], 0, dtype=exact)]
    for block in layout.blocks():
        queries = q[:, :, block.start : block.stop].to(exact)
        keys, values = (_visible(block, *pair).to(exact) for pair in ((k, prefix_k), (v, prefix_v)))
        scores = scale * queries @ keys.transpose(-1, -2)
        mask = _causal_mask(block, queries, keys)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        outputs.append((scores.softmax(-1) @ values).to(q.dtype))
        sums.append(scores.logsumexp(-1).detach())
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


def _no_tokens(q: Tensor) -> Tensor:
    """The start of an output, which has gradients only where nothing comes behind."""
    return q[:, :, :0] if q.shape[2] == 0 else q.new_empty(*q.shape[:2], 0, q.shape[-1])


def _causal_mask(block: Block, queries: Tensor, keys: Tensor) -> Tensor | None:
    """(queries, keys) bool: which keys up to its end a causal block's queries see; else None."""
    if block.bidirectional:
        return None
    rows, columns = queries.shape[2], keys.shape[2]
    mask = torch.ones(rows, columns, dtype=torch.bool, device=queries.device)
    return mask.tril(columns - rows)


def _visible(block: Block, x: Tensor, prefix: Tensor | None) -> Tensor:
    seen = x[:, :, block.sequence_start : block.stop]
    return seen if prefix is None else torch.cat([prefix, seen], dim=2)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"block_causal_attention: {message}")

    require(
        q.dim() == 4 and q.shape == k.shape == v.shape,
        "q, k and v must all be (batch, heads, tokens, head_dim), got "
        f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}",
    )
    require(
        layout.num_tokens == q.shape[2],
        f"block_lengths add up to {layout.num_tokens} tokens, q has {q.shape[2]}",
    )
    dtypes = {t.dtype for t in (q, k, v, prefix_k, prefix_v) if t is not None}
    require(len(dtypes) == 1, f"all tensors must have one dtype, got {sorted(map(str, dtypes))}")
    if prefix_k is None or prefix_v is None:
        return
    require(len(layout.lengths) == 1, "packed sequences take no prefix")
    wanted = (*q.shape[:2], prefix_k.shape[2], q.shape[3]) if prefix_k.dim() == 4 else None
    require(
        prefix_k.shape == prefix_v.shape == wanted,
        f"prefix_kv must be two (batch, heads, m, head_dim), got {tuple(prefix_k.shape)} and "
        f"{tuple(prefix_v.shape)}",
    )


def _layout(lengths: list[int], flags: list[bool], counts: list[int]) -> BlockLayout:
    # Operators take flat lists only.
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    parts = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    return BlockLayout(
        tuple(tuple(lengths[part]) for part in parts), tuple(tuple(flags[part]) for part in parts)
    )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    lengths: list[int],
    flags: list[bool],
    counts: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    layout = _layout(lengths, flags, counts)
    return OP.module(backend).forward(q, k, v, prefix_k, prefix_v, layout, scale)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lengths: list[int],
    flags: list[bool],
    counts: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layout = _layout(lengths, flags, counts)
    module = OP.module(backend)
    return module.backward(grad, q, k, v, prefix_k, prefix_v, out, lse, layout, scale)


def _fake_backward(grad, q, k, v, prefix_k, prefix_v, *_):
    prefixes = (q.new_empty(0) if p is None else new_rows(p) for p in (prefix_k, prefix_v))
    return new_rows(q), new_rows(k), new_rows(v), *prefixes


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v"
_NUMBERS = "int[] lengths, bool[] bidirectional, int[] counts, float scale, str backend"
define(
    f"block_causal_attention({_TENSORS}, {_NUMBERS}) -> (Tensor, Tensor)",
    _forward,
    lambda q, *_: (new_rows(q), q.new_empty(q.shape[:3], dtype=torch.float32)),
)
define(
    f"block_causal_attention_backward(Tensor grad, {_TENSORS}, Tensor out, Tensor lse, {_NUMBERS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _save(ctx, inputs, output) -> None:
    *tensors, lengths, flags, counts, scale, backend = inputs
    ctx.numbers = lengths, flags, counts, scale, backend
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad: Tensor, _):
    backward = torch.ops.nova_kernels.block_causal_attention_backward
    *gradients, prefix_k, prefix_v = backward(grad, *ctx.saved_tensors, *ctx.numbers)
    if ctx.saved_tensors[3] is None:
        prefix_k = prefix_v = None
    return *gradients, prefix_k, prefix_v, None, None, None, None, None


define_gradient("block_causal_attention", _gradients, _save)
define_no_gradient("block_causal_attention_backward")
