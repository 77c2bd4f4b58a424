"""Rotary positions in Triton: a program has some heads of one token."""

import triton
import triton.language as tl
from torch import Tensor

from nova_kernels.triton_kernels.launch import Launch, ceil_div

BLOCK = 512  # pairs a program


@triton.jit
def rope3d_kernel(
    heads, cos, sin, out, tokens, num_heads, num_rotated, heads_batch, heads_token, heads_head,
    out_batch, out_token, out_head, table_batch, table_token, BACKWARDS: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, t = token // tokens, token % tokens
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]).to(tl.int64)
    # A head's values are neighbours, and are read and written as such; pairs are made of registers.
    column = tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
    inside = (head < num_heads) & (column < 2 * PAIRS)
    source = heads + b * heads_batch + t * heads_token + head * heads_head + column
    values = tl.load(source, inside, 0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(values, [BLOCK_HEADS, BLOCK_PAIRS, 2]))
    entry = tl.arange(0, BLOCK_PAIRS)[None, :]
    rotated = (head < num_rotated) & (entry < PAIRS)
    # Every head reads the angles where it needs them, which is from the cache.
    at = b * table_batch + t * table_token + entry + tl.zeros_like(head)
    c = tl.load(cos + at, rotated, 1.0).to(tl.float32)
    s = tl.load(sin + at, rotated, 0.0).to(tl.float32)
    if BACKWARDS:
        s = -s
    turned = tl.join(even * c - odd * s, even * s + odd * c)
    turned = tl.reshape(turned, [BLOCK_HEADS, 2 * BLOCK_PAIRS])
    target = out + b * out_batch + t * out_token + head * out_head + column
    tl.store(target, turned.to(out.dtype.element_ty), inside)


def rotate(
    heads: Tensor, cos: Tensor, sin: Tensor, out: Tensor, num_rotated: int, backwards: bool
) -> None:
    """Rotate the first heads of (batch, tokens, heads, head_dim) into out, which may be heads."""
    launch = plan(heads, cos, sin, out, num_rotated, backwards)
    launch.run()
    if launch.arguments["out"] is not out:
        out.copy_(launch.arguments["out"])


def plan(
    heads: Tensor, cos: Tensor, sin: Tensor, out: Tensor, num_rotated: int, backwards: bool
) -> Launch:
    """The launch that rotates heads into out, or into a copy of heads where out has gaps."""
    in_place = out is heads
    if heads.stride(-1) != 1:
        heads = heads.contiguous()
        out = heads if in_place else out
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, tokens, num_heads, head_dim = heads.shape
    pairs = head_dim // 2
    block_pairs = triton.next_power_of_2(pairs)
    block_heads = min(max(BLOCK // block_pairs, 1), triton.next_power_of_2(num_heads))
    arguments = {
        "heads": heads,
        "cos": cos,
        "sin": sin,
        "out": out,
        "tokens": tokens,
        "num_heads": num_heads,
        "num_rotated": num_rotated,
        "heads_batch": heads.stride(0),
        "heads_token": heads.stride(1),
        "heads_head": heads.stride(2),
        "out_batch": out.stride(0),
        "out_token": out.stride(1),
        "out_head": out.stride(2),
        "table_batch": 0 if cos.shape[0] == 1 else cos.stride(0),
        "table_token": cos.stride(1),
    }
    constants = {
        "BACKWARDS": backwards,
        "PAIRS": pairs,
        "BLOCK_HEADS": block_heads,
        "BLOCK_PAIRS": block_pairs,
    }
    grid = batch * tokens, ceil_div(num_heads, block_heads)
    return Launch(rope3d_kernel, grid, arguments, constants)
