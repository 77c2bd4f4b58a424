"""Block-causal attention in Triton, forward and backward, in the manner of FlashAttention-2.

arXiv 2307.08691. A program has a tile of queries (or of keys, for their gradients) and walks over
the tiles that it sees. Intervals (`BlockLayout.intervals`) tell it where these begin and end:
invisible tiles are never touched, and only tiles at the rim of an interval are masked.

A program's own tile lies inside one block (`BlockLayout.tiles`). So all of its queries see the same
first key, and all of its keys are seen by the same last query. At the rim, rows that none of them
sees are not loaded: a mask on the scores alone would let NaN and infinity through, by 0 * NaN in
the products.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nova_kernels.block_layout import BlockLayout
from nova_kernels.dispatch import new_rows
from nova_kernels.errors import BackendError
from nova_kernels.ops.block_causal_attention import HEAD_DIMS
from nova_kernels.triton_kernels.launch import Launch, ceil_div

LOG2_E = math.log2(math.e)
LEAST_SCALE = 1e-30


@dataclass(frozen=True)
class TileSetting:
    """Queries and keys a tile, warps and pipeline stages."""

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int


# By head_dim, for half precision. Chosen by what compiles without spills on both architectures;
# to be tuned on GPUs.
FORWARD = {
    32: TileSetting(128, 64, 4, 3),
    64: TileSetting(128, 128, 8, 2),
    96: TileSetting(128, 64, 8, 2),
    128: TileSetting(128, 64, 8, 2),
}
# Gradients have larger tiles of what a program keeps than of what it walks over.
QUERY_GRADIENT = {
    32: TileSetting(64, 32, 4, 2),
    64: TileSetting(64, 32, 4, 2),
    96: TileSetting(64, 32, 8, 1),
    128: TileSetting(64, 32, 8, 1),
}
KEY_GRADIENT = {
    32: TileSetting(32, 64, 4, 2),
    64: TileSetting(32, 64, 4, 2),
    96: TileSetting(32, 64, 8, 1),
    128: TileSetting(32, 64, 8, 1),
}
# Tensor cores do not keep the precision of float32; without them only small tiles fit registers.
EXACT = TileSetting(16, 16, 4, 1)


@triton.jit
def _whole_tiles(first, last, end_first, end_last, BLOCK: tl.constexpr):
    """Where masked and whole tiles lie, of intervals from first..last to end_first..end_last.

    Returns (begin, middle, whole end, tail): masked tiles in [begin, middle) and from tail on,
    whole ones in [middle, whole end).
    """
    begin = first // BLOCK * BLOCK
    whole_begin = (last + BLOCK - 1) // BLOCK * BLOCK
    whole_end = end_first // BLOCK * BLOCK
    middle = tl.where(whole_begin < whole_end, whole_begin, end_last)
    return begin, middle, whole_end, tl.maximum(middle, whole_end)


@triton.jit
def _program(num_tiles, heads):
    """Tile, index among the heads of all batches, batch and head of this program."""
    program = tl.program_id(0)
    head_index = (program // num_tiles).to(tl.int64)
    return program % num_tiles, head_index, head_index // heads, head_index % heads


@triton.jit
def _load(base, row, stride, start, stop, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr,
          BLOCK_DIM: tl.constexpr):  # fmt: skip
    """Rows of a head, (len(row), BLOCK_DIM); zeros beyond HEAD_DIM.

    Where MASKED, also zeros for rows out of start..stop - 1, which are not read.
    """
    d = tl.arange(0, BLOCK_DIM)[None, :]
    at = base + row[:, None].to(tl.int64) * stride + d
    if MASKED:
        inside = (row[:, None] >= start) & (row[:, None] < stop)
        return tl.load(at, inside & (d < HEAD_DIM), 0.0)
    if BLOCK_DIM != HEAD_DIM:
        return tl.load(at, d < HEAD_DIM, 0.0)
    return tl.load(at)


@triton.jit
def _attend(
    acc, top, total, queries, keys, values, begin, end, first, last, key_stride, value_stride,
    key_end, scale, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles of keys from begin to end. scale is positive, with log2(e).

    Where MASKED, a query sees keys first..key_end - 1; key_end is at most last.
    """
    for start in range(begin, end, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        k = _load(keys, key, key_stride, first, last, MASKED, HEAD_DIM, BLOCK_DIM)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
        if MASKED:
            seen = (key[None, :] >= first) & (key[None, :] < key_end[:, None])
            scores = tl.where(seen, scores, -float("inf"))
        # Scaled here and in the exponent, where it costs nothing, as part of a multiply-add.
        new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
        # A row that has seen nothing yet has no maximum to subtract.
        pivot = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp2(scores * scale - pivot[:, None])
        decay = tl.exp2(top - pivot)
        total = total * decay + tl.sum(weights, axis=1)
        v = _load(values, key, value_stride, first, last, MASKED, HEAD_DIM, BLOCK_DIM)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def _visible_keys(intervals, query, start, stop, tokens):
    """What the tile of queries start..stop - 1 sees.

    Returns the end of each query's keys, and of all of them the first key, the least and the
    greatest end: those of the first and of the last query, since ends only grow inside a block.
    """
    ends = intervals + tokens
    return (
        tl.load(ends + query, query < stop, 0), tl.load(intervals + start), tl.load(ends + start),
        tl.load(ends + stop - 1),
    )  # fmt: skip


@triton.jit
def attention_forward_kernel(
    q, k, v, prefix_k, prefix_v, intervals, tiles, out, lse, num_tiles, heads, tokens, prefix,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, pk_batch,
    pk_head, pk_token, pv_batch, pv_head, pv_token, scale, HAS_PREFIX: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    tile, head_index, b, h = _program(num_tiles, heads)
    start, stop = tl.load(tiles + tile), tl.load(tiles + num_tiles + tile)
    query = start + tl.arange(0, BLOCK_QUERIES)
    queries = _load(
        q + b * q_batch + h * q_head, query, q_token, start, stop, True, HEAD_DIM, BLOCK_DIM
    )
    acc = tl.zeros([BLOCK_QUERIES, BLOCK_DIM], tl.float32)
    top = tl.full([BLOCK_QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    key_end, first, end_first, end_last = _visible_keys(intervals, query, start, stop, tokens)
    if HAS_PREFIX:
        keys = prefix_k + b * pk_batch + h * pk_head
        values = prefix_v + b * pv_batch + h * pv_head
        whole = prefix // BLOCK_KEYS * BLOCK_KEYS
        acc, top, total = _attend(
            acc, top, total, queries, keys, values, 0, whole, 0, prefix, pk_token, pv_token,
            key_end, scale, False, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS,
        )  # fmt: skip
        acc, top, total = _attend(
            acc, top, total, queries, keys, values, whole, prefix, 0, prefix, pk_token, pv_token,
            tl.zeros_like(key_end) + prefix, scale, True, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS,
        )  # fmt: skip
    keys = k + b * k_batch + h * k_head
    values = v + b * v_batch + h * v_head
    begin, middle, whole_end, tail = _whole_tiles(first, first, end_first, end_last, BLOCK_KEYS)
    acc, top, total = _attend(
        acc, top, total, queries, keys, values, begin, middle, first, end_last, k_token, v_token,
        key_end, scale, True, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, queries, keys, values, middle, whole_end, first, end_last, k_token,
        v_token, key_end, scale, False, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, queries, keys, values, tail, end_last, first, end_last, k_token, v_token,
        key_end, scale, True, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS,
    )  # fmt: skip
    row = head_index * tokens + query
    d = tl.arange(0, BLOCK_DIM)[None, :]
    inside = (query[:, None] < stop) & (d < HEAD_DIM)
    total = tl.where(query < stop, total, 1.0)  # rows beyond the last query may have seen nothing
    result = acc / total[:, None]
    tl.store(out + row[:, None] * HEAD_DIM + d, result.to(out.dtype.element_ty), inside)
    tl.store(lse + row, (top + tl.log2(total)) / 1.4426950408889634, query < stop)


@triton.jit
def attention_delta_kernel(
    out, grad, delta, num_tiles, heads, tokens, grad_batch, grad_head, grad_token,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
):  # fmt: skip
    """delta = sum(out * grad), what the softmax's gradient subtracts."""
    tile, head_index, b, h = _program(num_tiles, heads)
    query = tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    o = _load(
        out + head_index * tokens * HEAD_DIM, query, HEAD_DIM, 0, tokens, True, HEAD_DIM, BLOCK_DIM
    )
    g = _load(
        grad + b * grad_batch + h * grad_head, query, grad_token, 0, tokens, True, HEAD_DIM,
        BLOCK_DIM,
    )  # fmt: skip
    value = tl.sum(o.to(tl.float32) * g.to(tl.float32), axis=1)
    tl.store(delta + head_index * tokens + query, value, query < tokens)


@triton.jit
def _query_gradient(
    acc, queries, g, lse, delta, keys, values, begin, end, first, last, key_stride, value_stride,
    key_end, scale, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Adds what the tiles of keys from begin to end give to the gradient of queries / scale.

    Where MASKED, a query sees keys first..key_end - 1; key_end is at most last.
    """
    for start in range(begin, end, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        k = _load(keys, key, key_stride, first, last, MASKED, HEAD_DIM, BLOCK_DIM)
        v = _load(values, key, value_stride, first, last, MASKED, HEAD_DIM, BLOCK_DIM)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        weights = tl.exp2(scores - lse[:, None])
        if MASKED:
            seen = (key[None, :] >= first) & (key[None, :] < key_end[:, None])
            weights = tl.where(seen, weights, 0.0)
        grad_weights = tl.dot(g, tl.trans(v), input_precision="ieee")
        grad_scores = weights * (grad_weights - delta[:, None])
        acc = tl.dot(grad_scores.to(k.dtype), k, acc, input_precision="ieee")
    return acc


@triton.jit
def attention_query_gradient_kernel(
    q, k, v, prefix_k, prefix_v, grad, intervals, tiles, lse, delta, grad_q, num_tiles, heads,
    tokens, prefix, q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    pk_batch, pk_head, pk_token, pv_batch, pv_head, pv_token, grad_batch, grad_head, grad_token,
    scale, scale_log2, HAS_PREFIX: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    tile, head_index, b, h = _program(num_tiles, heads)
    start, stop = tl.load(tiles + tile), tl.load(tiles + num_tiles + tile)
    query = start + tl.arange(0, BLOCK_QUERIES)
    queries = _load(
        q + b * q_batch + h * q_head, query, q_token, start, stop, True, HEAD_DIM, BLOCK_DIM
    )
    g = _load(
        grad + b * grad_batch + h * grad_head, query, grad_token, start, stop, True, HEAD_DIM,
        BLOCK_DIM,
    )  # fmt: skip
    row = head_index * tokens + query
    row_lse = tl.load(lse + row, query < stop, 0.0) * 1.4426950408889634
    row_delta = tl.load(delta + row, query < stop, 0.0)
    acc = tl.zeros([BLOCK_QUERIES, BLOCK_DIM], tl.float32)
    key_end, first, end_first, end_last = _visible_keys(intervals, query, start, stop, tokens)
    if HAS_PREFIX:
        keys = prefix_k + b * pk_batch + h * pk_head
        values = prefix_v + b * pv_batch + h * pv_head
        whole = prefix // BLOCK_KEYS * BLOCK_KEYS
        acc = _query_gradient(
            acc, queries, g, row_lse, row_delta, keys, values, 0, whole, 0, prefix, pk_token,
            pv_token, key_end, scale_log2, False, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS,
        )  # fmt: skip
        acc = _query_gradient(
            acc, queries, g, row_lse, row_delta, keys, values, whole, prefix, 0, prefix, pk_token,
            pv_token, tl.zeros_like(key_end) + prefix, scale_log2, True, HEAD_DIM, BLOCK_DIM,
            BLOCK_KEYS,
        )  # fmt: skip
    keys = k + b * k_batch + h * k_head
    values = v + b * v_batch + h * v_head
    begin, middle, whole_end, tail = _whole_tiles(first, first, end_first, end_last, BLOCK_KEYS)
    acc = _query_gradient(
        acc, queries, g, row_lse, row_delta, keys, values, begin, middle, first, end_last, k_token,
        v_token, key_end, scale_log2, True, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS,
    )  # fmt: skip
    acc = _query_gradient(
        acc, queries, g, row_lse, row_delta, keys, values, middle, whole_end, first, end_last,
        k_token, v_token, key_end, scale_log2, False, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS,
    )  # fmt: skip
    acc = _query_gradient(
        acc, queries, g, row_lse, row_delta, keys, values, tail, end_last, first, end_last, k_token,
        v_token, key_end, scale_log2, True, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_DIM)[None, :]
    inside = (query[:, None] < stop) & (d < HEAD_DIM)
    target = grad_q + row[:, None] * HEAD_DIM + d
    tl.store(target, (acc * scale).to(grad_q.dtype.element_ty), inside)


@triton.jit
def _key_gradient(
    acc_k, acc_v, keys, values, queries, grad, lse, delta, begin, end, first, last, query_stride,
    grad_stride, query_first, scale, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
):  # fmt: skip
    """Adds what the tiles of queries from begin to end give to the gradients of keys, values.

    Where MASKED, a key is seen by queries query_first..last - 1; query_first is at least first.
    """
    for start in range(begin, end, BLOCK_QUERIES):
        query = start + tl.arange(0, BLOCK_QUERIES)
        q = _load(queries, query, query_stride, first, last, MASKED, HEAD_DIM, BLOCK_DIM)
        g = _load(grad, query, grad_stride, first, last, MASKED, HEAD_DIM, BLOCK_DIM)
        if MASKED:
            inside = (query >= first) & (query < last)
            row_lse = tl.load(lse + query, inside, 0.0) * 1.4426950408889634
            row_delta = tl.load(delta + query, inside, 0.0)
        else:
            row_lse = tl.load(lse + query) * 1.4426950408889634
            row_delta = tl.load(delta + query)
        # Transposed: (keys, queries).
        scores = tl.dot(keys, tl.trans(q), input_precision="ieee") * scale
        weights = tl.exp2(scores - row_lse[None, :])
        if MASKED:
            seeing = (query[None, :] >= query_first[:, None]) & (query[None, :] < last)
            weights = tl.where(seeing, weights, 0.0)
        acc_v = tl.dot(weights.to(g.dtype), g, acc_v, input_precision="ieee")
        grad_weights = tl.dot(values, tl.trans(g), input_precision="ieee")
        grad_scores = weights * (grad_weights - row_delta[None, :])
        acc_k = tl.dot(grad_scores.to(q.dtype), q, acc_k, input_precision="ieee")
    return acc_k, acc_v


@triton.jit
def attention_key_gradient_kernel(
    q, k, v, grad, intervals, tiles, lse, delta, grad_k, grad_v, num_tiles, heads, tokens, num_keys,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, grad_batch,
    grad_head, grad_token, scale, scale_log2, IS_PREFIX: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    tile, head_index, b, h = _program(num_tiles, heads)
    if IS_PREFIX:
        start, stop = tile * BLOCK_KEYS, num_keys
    else:
        start, stop = tl.load(tiles + tile), tl.load(tiles + num_tiles + tile)
    key = start + tl.arange(0, BLOCK_KEYS)
    exists = key < stop
    keys = _load(k + b * k_batch + h * k_head, key, k_token, start, stop, True, HEAD_DIM, BLOCK_DIM)
    values = _load(
        v + b * v_batch + h * v_head, key, v_token, start, stop, True, HEAD_DIM, BLOCK_DIM
    )
    if IS_PREFIX:
        query_first = tl.zeros_like(key)
        first, first_last, end = 0, 0, tokens
    else:
        # Firsts only grow inside a block.
        firsts = intervals + 2 * tokens
        query_first = tl.load(firsts + key, exists, 0)
        first, first_last = tl.load(firsts + start), tl.load(firsts + stop - 1)
        end = tl.load(intervals + 3 * tokens + start)
    begin, middle, whole_end, tail = _whole_tiles(first, first_last, end, end, BLOCK_QUERIES)
    queries = q + b * q_batch + h * q_head
    grads = grad + b * grad_batch + h * grad_head
    row_lse, row_delta = lse + head_index * tokens, delta + head_index * tokens
    acc_k = tl.zeros([BLOCK_KEYS, BLOCK_DIM], tl.float32)
    acc_v = tl.zeros([BLOCK_KEYS, BLOCK_DIM], tl.float32)
    acc_k, acc_v = _key_gradient(
        acc_k, acc_v, keys, values, queries, grads, row_lse, row_delta, begin, middle, first,
        end, q_token, grad_token, query_first, scale_log2, True, HEAD_DIM,
        BLOCK_DIM, BLOCK_QUERIES,
    )  # fmt: skip
    acc_k, acc_v = _key_gradient(
        acc_k, acc_v, keys, values, queries, grads, row_lse, row_delta, middle, whole_end, first,
        end, q_token, grad_token, query_first, scale_log2, False, HEAD_DIM,
        BLOCK_DIM, BLOCK_QUERIES,
    )  # fmt: skip
    acc_k, acc_v = _key_gradient(
        acc_k, acc_v, keys, values, queries, grads, row_lse, row_delta, tail, end, first,
        end, q_token, grad_token, query_first, scale_log2, True, HEAD_DIM,
        BLOCK_DIM, BLOCK_QUERIES,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_DIM)[None, :]
    at = (head_index * num_keys + key[:, None]) * HEAD_DIM + d
    inside = exists[:, None] & (d < HEAD_DIM)
    tl.store(grad_k + at, (acc_k * scale).to(grad_k.dtype.element_ty), inside)
    tl.store(grad_v + at, acc_v.to(grad_v.dtype.element_ty), inside)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    layout: BlockLayout,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `nova_kernels.ops.block_causal_attention`."""
    launch = plan_forward(q, k, v, prefix_k, prefix_v, layout, scale)
    launch.run()
    return launch.arguments["out"], launch.arguments["lse"]


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    layout: BlockLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the prefix, empty where there is none."""
    launches = plan_backward(grad, q, k, v, prefix_k, prefix_v, out, lse, layout, scale)
    for launch in launches:
        launch.run()
    _, of_queries, of_keys, *of_prefix = (launch.arguments for launch in launches)
    prefix = [q.new_empty(0), q.new_empty(0)]
    if prefix_k is not None:
        prefix = [torch.zeros_like(prefix_k), torch.zeros_like(prefix_k)]
    if of_prefix:
        prefix = [of_prefix[0]["grad_k"], of_prefix[0]["grad_v"]]
    return of_queries["grad_q"], of_keys["grad_k"], of_keys["grad_v"], prefix[0], prefix[1]


def plan_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    layout: BlockLayout,
    scale: float,
) -> Launch:
    """The launch of the forward pass; it fills its arguments out and lse."""
    setting = _setting(q, FORWARD)
    # The kernel takes the greatest scores before it scales them.
    q, scale = (-q, -scale) if scale < 0 else (q, scale)
    arguments = {
        **_heads(q=q, k=k, v=v),
        **_prefix(k, v, prefix_k, prefix_v),
        **_layout_tables(layout, setting.block_queries, q.device),
        "out": new_rows(q),
        "lse": torch.empty(q.shape[:3], dtype=torch.float32, device=q.device),
        "heads": q.shape[1],
        "tokens": q.shape[2],
        # Not 0, which makes NaN of the infinite scores of what is not seen.
        "scale": max(scale * LOG2_E, LEAST_SCALE),
    }
    constants = {
        "HAS_PREFIX": arguments["prefix"] > 0,
        "BLOCK_KEYS": setting.block_keys,
    }
    return _launch(attention_forward_kernel, setting, arguments, constants)


def plan_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    layout: BlockLayout,
    scale: float,
) -> list[Launch]:
    """Launches of the backward pass: delta; gradients of queries, of keys, of a prefix's keys."""
    of_query, of_key = _setting(q, QUERY_GRADIENT), _setting(q, KEY_GRADIENT)
    sizes = {"heads": q.shape[1], "tokens": q.shape[2]}
    delta = torch.empty_like(lse)
    of_delta = {
        **_heads(grad=grad),
        **sizes,
        "out": out.contiguous(),
        "delta": delta,
        "num_tiles": ceil_div(q.shape[2], of_query.block_queries),
    }
    common = {
        **_heads(q=q, grad=grad),
        **sizes,
        "lse": lse,
        "delta": delta,
        "scale": scale,
        "scale_log2": scale * LOG2_E,
    }
    prefix = _prefix(k, v, prefix_k, prefix_v)
    of_queries = {
        **common,
        **_heads(k=k, v=v),
        **prefix,
        **_layout_tables(layout, of_query.block_queries, q.device),
        "grad_q": new_rows(q),
    }
    launches = [
        _launch(attention_delta_kernel, of_query, of_delta, {}),
        _launch(
            attention_query_gradient_kernel,
            of_query,
            of_queries,
            {"HAS_PREFIX": prefix["prefix"] > 0, "BLOCK_KEYS": of_query.block_keys},
        ),
    ]
    pairs = [(k, v)]
    if prefix["prefix"]:
        pairs.append((prefix_k, prefix_v))
    for is_prefix, (keys, values) in enumerate(pairs):
        of_keys = {
            **common,
            **_heads(k=keys, v=values),
            **_layout_tables(layout, of_key.block_keys, q.device),
            "num_keys": keys.shape[2],
            "grad_k": new_rows(keys),
            "grad_v": new_rows(keys),
        }
        if is_prefix:
            of_keys["num_tiles"] = ceil_div(keys.shape[2], of_key.block_keys)
        constants = {"IS_PREFIX": bool(is_prefix), "BLOCK_KEYS": of_key.block_keys}
        launches.append(_launch(attention_key_gradient_kernel, of_key, of_keys, constants))
    return launches


def _launch(kernel, setting: TileSetting, arguments: dict, constants: dict) -> Launch:
    """A program for each of `num_tiles` tiles of every head."""
    tensor = arguments["grad"] if "grad" in arguments else arguments["q"]
    batch, heads, _, head_dim = tensor.shape
    constants = {
        **constants,
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": triton.next_power_of_2(head_dim),
        "BLOCK_QUERIES": setting.block_queries,
    }
    # All on the first axis, since the others take 65,535 at most. Tiles of a head are neighbours,
    # so that its keys and values stay in the cache.
    grid = (arguments["num_tiles"] * batch * heads,)
    names = set(kernel.arg_names)
    used = {name: value for name, value in arguments.items() if name in names}
    return Launch(kernel, grid, used, constants, setting.num_warps, setting.num_stages)


def _setting(q: Tensor, settings: dict[int, TileSetting]) -> TileSetting:
    head_dim = q.shape[-1]
    if head_dim not in HEAD_DIMS:
        raise BackendError(
            f"block_causal_attention: the Triton kernel takes head_dim {list(HEAD_DIMS)}, got "
            f"{head_dim}; use backend='reference'"
        )
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise BackendError(
            f"block_causal_attention: the Triton kernel takes half precision and float32, got "
            f"{q.dtype}; use backend='reference'"
        )
    return EXACT if q.dtype == torch.float32 else settings[head_dim]


def _layout_tables(layout: BlockLayout, tile: int, device: torch.device) -> dict[str, Tensor | int]:
    """Who sees whom, and tiles of up to `tile` tokens, as kernels name them."""
    tiles = layout.tiles(tile, device)
    return {
        "intervals": layout.intervals(device),
        "tiles": tiles,
        "num_tiles": tiles.shape[1],
    }


def _heads(**tensors: Tensor) -> dict[str, Tensor | int]:
    """Tensors (batch, heads, tokens, head_dim) with their strides as kernels name them."""
    result: dict[str, Tensor | int] = {}
    for name, tensor in tensors.items():
        tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
        result[name] = tensor
        for axis, axis_name in enumerate(("batch", "head", "token")):
            result[f"{name}_{axis_name}"] = tensor.stride(axis)
    return result


def _prefix(
    k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None
) -> dict[str, Tensor | int]:
    # Without a prefix its pointers are not read: any tensors take their place.
    length = 0 if prefix_k is None else prefix_k.shape[2]
    named = _heads(pk=k if prefix_k is None else prefix_k, pv=v if prefix_v is None else prefix_v)
    return {**named, "prefix_k": named["pk"], "prefix_v": named["pv"], "prefix": length}
