"""Block-causal attention in Triton, forward and backward, in the manner of FlashAttention-2.

arXiv 2307.08691. A program has a tile of queries (or of keys, for their gradients) and walks over
the tiles that it sees. Intervals (`BlockLayout.intervals`) tell it where these begin and end:
invisible tiles are never touched, and only tiles at the rim of an interval are masked.
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
    64: TileSetting(128, 64, 8, 3),
    96: TileSetting(64, 32, 4, 2),
    128: TileSetting(128, 32, 8, 2),
}
BACKWARD = {
    32: TileSetting(64, 32, 4, 2),
    64: TileSetting(64, 32, 4, 2),
    96: TileSetting(64, 32, 8, 1),
    128: TileSetting(64, 32, 8, 1),
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
def _load(base, row, stride, num_rows, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr,
          BLOCK_DIM: tl.constexpr):  # fmt: skip
    """Rows of a head, (len(row), BLOCK_DIM); zeros beyond num_rows and HEAD_DIM."""
    d = tl.arange(0, BLOCK_DIM)[None, :]
    at = base + row[:, None].to(tl.int64) * stride + d
    if MASKED:
        return tl.load(at, (row[:, None] < num_rows) & (d < HEAD_DIM), 0.0)
    if BLOCK_DIM != HEAD_DIM:
        return tl.load(at, d < HEAD_DIM, 0.0)
    return tl.load(at)


@triton.jit
def _attend(
    acc, top, total, queries, keys, values, first, stop, num_keys, key_stride, value_stride,
    key_first, key_end, scale, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles of keys from first to stop. scale includes log2(e)."""
    for start in range(first, stop, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        k = _load(keys, key, key_stride, num_keys, MASKED, HEAD_DIM, BLOCK_DIM)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        if MASKED:
            seen = (key[None, :] >= key_first[:, None]) & (key[None, :] < key_end[:, None])
            scores = tl.where(seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        # A row that has seen nothing yet has no maximum to subtract.
        pivot = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp2(scores - pivot[:, None])
        decay = tl.exp2(top - pivot)
        total = total * decay + tl.sum(weights, axis=1)
        v = _load(values, key, value_stride, num_keys, MASKED, HEAD_DIM, BLOCK_DIM)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def _query_intervals(intervals, query, tokens):
    """Intervals of a tile of queries, and their extremes over the queries that exist."""
    exists = query < tokens
    first = tl.load(intervals + query, exists, 0)
    end = tl.load(intervals + tokens + query, exists, 0)
    return (
        first, end, tl.min(tl.where(exists, first, tokens)), tl.max(first),
        tl.min(tl.where(exists, end, tokens)), tl.max(end),
    )  # fmt: skip


@triton.jit
def attention_forward_kernel(
    q, k, v, prefix_k, prefix_v, intervals, out, lse, heads, tokens, prefix, q_batch, q_head,
    q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, pk_batch, pk_head, pk_token,
    pv_batch, pv_head, pv_token, scale, HAS_PREFIX: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    head_index = tl.program_id(1).to(tl.int64)
    b, h = head_index // heads, head_index % heads
    query = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    queries = _load(q + b * q_batch + h * q_head, query, q_token, tokens, True, HEAD_DIM, BLOCK_DIM)
    acc = tl.zeros([BLOCK_QUERIES, BLOCK_DIM], tl.float32)
    top = tl.full([BLOCK_QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    key_first, key_end, first, last, end_first, end_last = _query_intervals(
        intervals, query, tokens
    )
    if HAS_PREFIX:
        keys = prefix_k + b * pk_batch + h * pk_head
        values = prefix_v + b * pv_batch + h * pv_head
        whole = prefix // BLOCK_KEYS * BLOCK_KEYS
        acc, top, total = _attend(
            acc, top, total, queries, keys, values, 0, whole, prefix, pk_token, pv_token,
            key_first, key_end, scale, False, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS,
        )  # fmt: skip
        none = tl.zeros_like(key_first)
        acc, top, total = _attend(
            acc, top, total, queries, keys, values, whole, prefix, prefix, pk_token, pv_token,
            none, none + prefix, scale, True, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS,
        )  # fmt: skip
    keys = k + b * k_batch + h * k_head
    values = v + b * v_batch + h * v_head
    begin, middle, whole_end, tail = _whole_tiles(first, last, end_first, end_last, BLOCK_KEYS)
    acc, top, total = _attend(
        acc, top, total, queries, keys, values, begin, middle, tokens, k_token, v_token,
        key_first, key_end, scale, True, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, queries, keys, values, middle, whole_end, tokens, k_token, v_token,
        key_first, key_end, scale, False, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, queries, keys, values, tail, end_last, tokens, k_token, v_token,
        key_first, key_end, scale, True, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS,
    )  # fmt: skip
    row = head_index * tokens + query
    d = tl.arange(0, BLOCK_DIM)[None, :]
    inside = (query[:, None] < tokens) & (d < HEAD_DIM)
    total = tl.where(query < tokens, total, 1.0)  # rows beyond the last query may have seen nothing
    result = acc / total[:, None]
    tl.store(out + row[:, None] * HEAD_DIM + d, result.to(out.dtype.element_ty), inside)
    tl.store(lse + row, (top + tl.log2(total)) / 1.4426950408889634, query < tokens)


@triton.jit
def attention_delta_kernel(
    out, grad, delta, heads, tokens, grad_batch, grad_head, grad_token, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
):  # fmt: skip
    """delta = sum(out * grad), what the softmax's gradient subtracts."""
    head_index = tl.program_id(1).to(tl.int64)
    b, h = head_index // heads, head_index % heads
    query = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    o = _load(
        out + head_index * tokens * HEAD_DIM, query, HEAD_DIM, tokens, True, HEAD_DIM, BLOCK_DIM
    )
    g = _load(
        grad + b * grad_batch + h * grad_head, query, grad_token, tokens, True, HEAD_DIM, BLOCK_DIM
    )
    value = tl.sum(o.to(tl.float32) * g.to(tl.float32), axis=1)
    tl.store(delta + head_index * tokens + query, value, query < tokens)


@triton.jit
def _query_gradient(
    acc, queries, g, lse, delta, keys, values, first, stop, num_keys, key_stride, value_stride,
    key_first, key_end, scale, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Adds what the tiles of keys from first to stop give to the gradient of queries / scale."""
    for start in range(first, stop, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        k = _load(keys, key, key_stride, num_keys, MASKED, HEAD_DIM, BLOCK_DIM)
        v = _load(values, key, value_stride, num_keys, MASKED, HEAD_DIM, BLOCK_DIM)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        weights = tl.exp2(scores - lse[:, None])
        if MASKED:
            seen = (key[None, :] >= key_first[:, None]) & (key[None, :] < key_end[:, None])
            weights = tl.where(seen, weights, 0.0)
        grad_weights = tl.dot(g, tl.trans(v), input_precision="ieee")
        grad_scores = weights * (grad_weights - delta[:, None])
        acc = tl.dot(grad_scores.to(k.dtype), k, acc, input_precision="ieee")
    return acc


@triton.jit
def attention_query_gradient_kernel(
    q, k, v, prefix_k, prefix_v, grad, intervals, lse, delta, grad_q, heads, tokens, prefix,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, pk_batch,
    pk_head, pk_token, pv_batch, pv_head, pv_token, grad_batch, grad_head, grad_token, scale,
    scale_log2, HAS_PREFIX: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    head_index = tl.program_id(1).to(tl.int64)
    b, h = head_index // heads, head_index % heads
    query = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    queries = _load(q + b * q_batch + h * q_head, query, q_token, tokens, True, HEAD_DIM, BLOCK_DIM)
    g = _load(
        grad + b * grad_batch + h * grad_head, query, grad_token, tokens, True, HEAD_DIM, BLOCK_DIM
    )
    row = head_index * tokens + query
    row_lse = tl.load(lse + row, query < tokens, 0.0) * 1.4426950408889634
    row_delta = tl.load(delta + row, query < tokens, 0.0)
    acc = tl.zeros([BLOCK_QUERIES, BLOCK_DIM], tl.float32)
    key_first, key_end, first, last, end_first, end_last = _query_intervals(
        intervals, query, tokens
    )
    if HAS_PREFIX:
        keys = prefix_k + b * pk_batch + h * pk_head
        values = prefix_v + b * pv_batch + h * pv_head
        whole = prefix // BLOCK_KEYS * BLOCK_KEYS
        acc = _query_gradient(
            acc, queries, g, row_lse, row_delta, keys, values, 0, whole, prefix, pk_token,
            pv_token, key_first, key_end, scale_log2, False, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS,
        )  # fmt: skip
        none = tl.zeros_like(key_first)
        acc = _query_gradient(
            acc, queries, g, row_lse, row_delta, keys, values, whole, prefix, prefix, pk_token,
            pv_token, none, none + prefix, scale_log2, True, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS,
        )  # fmt: skip
    keys = k + b * k_batch + h * k_head
    values = v + b * v_batch + h * v_head
    begin, middle, whole_end, tail = _whole_tiles(first, last, end_first, end_last, BLOCK_KEYS)
    acc = _query_gradient(
        acc, queries, g, row_lse, row_delta, keys, values, begin, middle, tokens, k_token, v_token,
        key_first, key_end, scale_log2, True, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS,
    )  # fmt: skip
    acc = _query_gradient(
        acc, queries, g, row_lse, row_delta, keys, values, middle, whole_end, tokens, k_token,
        v_token, key_first, key_end, scale_log2, False, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS,
    )  # fmt: skip
    acc = _query_gradient(
        acc, queries, g, row_lse, row_delta, keys, values, tail, end_last, tokens, k_token,
        v_token, key_first, key_end, scale_log2, True, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_DIM)[None, :]
    inside = (query[:, None] < tokens) & (d < HEAD_DIM)
    target = grad_q + row[:, None] * HEAD_DIM + d
    tl.store(target, (acc * scale).to(grad_q.dtype.element_ty), inside)


@triton.jit
def _key_gradient(
    acc_k, acc_v, keys, values, queries, grad, lse, delta, first, stop, tokens, query_stride,
    grad_stride, query_first, query_end, scale, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
):  # fmt: skip
    """Adds what the tiles of queries from first to stop give to the gradients of keys, values."""
    for start in range(first, stop, BLOCK_QUERIES):
        query = start + tl.arange(0, BLOCK_QUERIES)
        q = _load(queries, query, query_stride, tokens, MASKED, HEAD_DIM, BLOCK_DIM)
        g = _load(grad, query, grad_stride, tokens, MASKED, HEAD_DIM, BLOCK_DIM)
        row_lse = tl.load(lse + query, query < tokens, 0.0) * 1.4426950408889634
        row_delta = tl.load(delta + query, query < tokens, 0.0)
        # Transposed: (keys, queries).
        scores = tl.dot(keys, tl.trans(q), input_precision="ieee") * scale
        weights = tl.exp2(scores - row_lse[None, :])
        if MASKED:
            seeing = (query[None, :] >= query_first[:, None]) & (
                query[None, :] < query_end[:, None]
            )
            weights = tl.where(seeing, weights, 0.0)
        acc_v = tl.dot(weights.to(g.dtype), g, acc_v, input_precision="ieee")
        grad_weights = tl.dot(values, tl.trans(g), input_precision="ieee")
        grad_scores = weights * (grad_weights - row_delta[None, :])
        acc_k = tl.dot(grad_scores.to(q.dtype), q, acc_k, input_precision="ieee")
    return acc_k, acc_v


@triton.jit
def attention_key_gradient_kernel(
    q, k, v, grad, intervals, lse, delta, grad_k, grad_v, heads, tokens, num_keys, q_batch, q_head,
    q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, grad_batch, grad_head, grad_token,
    scale, scale_log2, IS_PREFIX: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    head_index = tl.program_id(1).to(tl.int64)
    b, h = head_index // heads, head_index % heads
    key = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    exists = key < num_keys
    keys = _load(k + b * k_batch + h * k_head, key, k_token, num_keys, True, HEAD_DIM, BLOCK_DIM)
    values = _load(v + b * v_batch + h * v_head, key, v_token, num_keys, True, HEAD_DIM, BLOCK_DIM)
    if IS_PREFIX:
        query_first = tl.zeros_like(key)
        query_end = tl.where(exists, tokens, 0)
    else:
        query_first = tl.load(intervals + 2 * tokens + key, exists, 0)
        query_end = tl.load(intervals + 3 * tokens + key, exists, 0)
    begin, middle, whole_end, tail = _whole_tiles(
        tl.min(tl.where(exists, query_first, tokens)), tl.max(query_first),
        tl.min(tl.where(exists, query_end, tokens)), tl.max(query_end), BLOCK_QUERIES,
    )  # fmt: skip
    queries = q + b * q_batch + h * q_head
    grads = grad + b * grad_batch + h * grad_head
    row_lse, row_delta = lse + head_index * tokens, delta + head_index * tokens
    acc_k = tl.zeros([BLOCK_KEYS, BLOCK_DIM], tl.float32)
    acc_v = tl.zeros([BLOCK_KEYS, BLOCK_DIM], tl.float32)
    acc_k, acc_v = _key_gradient(
        acc_k, acc_v, keys, values, queries, grads, row_lse, row_delta, begin, middle, tokens,
        q_token, grad_token, query_first, query_end, scale_log2, True, HEAD_DIM, BLOCK_DIM,
        BLOCK_QUERIES,
    )  # fmt: skip
    acc_k, acc_v = _key_gradient(
        acc_k, acc_v, keys, values, queries, grads, row_lse, row_delta, middle, whole_end, tokens,
        q_token, grad_token, query_first, query_end, scale_log2, False, HEAD_DIM, BLOCK_DIM,
        BLOCK_QUERIES,
    )  # fmt: skip
    acc_k, acc_v = _key_gradient(
        acc_k, acc_v, keys, values, queries, grads, row_lse, row_delta, tail, tl.max(query_end),
        tokens, q_token, grad_token, query_first, query_end, scale_log2, True, HEAD_DIM, BLOCK_DIM,
        BLOCK_QUERIES,
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
    arguments = {
        **_heads(q=q, k=k, v=v),
        **_prefix(k, v, prefix_k, prefix_v),
        "intervals": layout.intervals(q.device),
        "out": new_rows(q),
        "lse": torch.empty(q.shape[:3], dtype=torch.float32, device=q.device),
        "heads": q.shape[1],
        "tokens": q.shape[2],
        "scale": scale * LOG2_E,
    }
    constants = {
        "HAS_PREFIX": arguments["prefix"] > 0,
        "BLOCK_KEYS": setting.block_keys,
    }
    return _launch(attention_forward_kernel, setting, setting.block_queries, arguments, constants)


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
    setting = _setting(q, BACKWARD)
    sizes = {"heads": q.shape[1], "tokens": q.shape[2]}
    delta = torch.empty_like(lse)
    of_delta = {**_heads(grad=grad), "out": out.contiguous(), "delta": delta, **sizes}
    common = {
        **_heads(q=q, grad=grad),
        **sizes,
        "intervals": layout.intervals(q.device),
        "lse": lse,
        "delta": delta,
        "scale": scale,
        "scale_log2": scale * LOG2_E,
    }
    prefix = _prefix(k, v, prefix_k, prefix_v)
    of_queries = {**common, **_heads(k=k, v=v), **prefix, "grad_q": new_rows(q)}
    by_keys = {"BLOCK_KEYS": setting.block_keys}
    launches = [
        _launch(attention_delta_kernel, setting, setting.block_queries, of_delta, {}),
        _launch(
            attention_query_gradient_kernel,
            setting,
            setting.block_queries,
            of_queries,
            {"HAS_PREFIX": prefix["prefix"] > 0, **by_keys},
        ),
    ]
    pairs = [(k, v)]
    if prefix["prefix"]:
        pairs.append((prefix_k, prefix_v))
    for is_prefix, (keys, values) in enumerate(pairs):
        of_keys = {
            **common,
            **_heads(k=keys, v=values),
            "num_keys": keys.shape[2],
            "grad_k": new_rows(keys),
            "grad_v": new_rows(keys),
        }
        constants = {"IS_PREFIX": bool(is_prefix), **by_keys}
        launches.append(
            _launch(attention_key_gradient_kernel, setting, setting.block_keys, of_keys, constants)
        )
    return launches


def _launch(kernel, setting: TileSetting, tile: int, arguments: dict, constants: dict) -> Launch:
    """A program for every tile of every head; tiles are of keys where there are `num_keys`."""
    tensor = arguments["grad"] if "grad" in arguments else arguments["q"]
    batch, heads, tokens, head_dim = tensor.shape
    constants = {
        **constants,
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": triton.next_power_of_2(head_dim),
        "BLOCK_QUERIES": setting.block_queries,
    }
    grid = (ceil_div(arguments.get("num_keys", tokens), tile), batch * heads)
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
