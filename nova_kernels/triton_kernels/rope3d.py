"""Rotary positions in Triton: a program has some pairs of values of one token."""

import triton
import triton.language as tl
from torch import Tensor

from nova_kernels.triton_kernels.launch import Launch, ceil_div

BLOCK = 512  # pairs a program


@triton.jit
def rope3d_kernel(
    heads, cos, sin, out, tokens, num_pairs, pairs_a_head, num_rotated, heads_batch, heads_token,
    heads_head, out_batch, out_token, out_head, table_batch, table_token, BACKWARDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, t = token // tokens, token % tokens
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < num_pairs
    head, entry = (pair // pairs_a_head).to(tl.int64), pair % pairs_a_head
    column = 2 * entry[:, None] + tl.arange(0, 2)[None, :]
    source = heads + b * heads_batch + t * heads_token + head[:, None] * heads_head + column
    values = tl.load(source, inside[:, None], 0.0)
    even, odd = tl.split(values.to(tl.float32))
    rotated = inside & (head < num_rotated)
    at = b * table_batch + t * table_token + entry
    c = tl.load(cos + at, rotated, 0.0).to(tl.float32)
    s = tl.load(sin + at, rotated, 0.0).to(tl.float32)
    if BACKWARDS:
        s = -s
    turned_even = tl.where(rotated, even * c - odd * s, even)
    turned_odd = tl.where(rotated, even * s + odd * c, odd)
    target = out + b * out_batch + t * out_token + head[:, None] * out_head + column
    result = tl.join(turned_even, turned_odd).to(out.dtype.element_ty)
    tl.store(target, result, inside[:, None])


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
    num_pairs = num_heads * head_dim // 2
    arguments = {
        "heads": heads,
        "cos": cos,
        "sin": sin,
        "out": out,
        "tokens": tokens,
        "num_pairs": num_pairs,
        "pairs_a_head": head_dim // 2,
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
    block = min(BLOCK, triton.next_power_of_2(num_pairs))
    constants = {"BACKWARDS": backwards, "BLOCK": block}
    return Launch(rope3d_kernel, (batch * tokens, ceil_div(num_pairs, block)), arguments, constants)
