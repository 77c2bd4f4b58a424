"""Rotary positions in Triton: a program rotates the queries or the keys of one token."""

import triton
import triton.language as tl
from torch import Tensor

from nova_kernels.triton_kernels.launch import Launch


@triton.jit
def rope3d_kernel(
    qkv, cos, sin, out, tokens, width, pairs_a_head, qkv_batch, qkv_token, out_batch, out_token,
    table_batch, table_token, BACKWARDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)  # queries, keys; values, where they are copied
    b, t = token // tokens, token % tokens
    pair = tl.arange(0, BLOCK)
    inside = pair < width // 2
    column = part * width + 2 * pair[:, None] + tl.arange(0, 2)[None, :]
    values = tl.load(qkv + b * qkv_batch + t * qkv_token + column, inside[:, None], 0.0)
    target = out + b * out_batch + t * out_token + column
    if part == 2:
        tl.store(target, values, inside[:, None])
    else:
        entry = b * table_batch + t * table_token + pair % pairs_a_head
        c = tl.load(cos + entry, inside, 0.0).to(tl.float32)
        s = tl.load(sin + entry, inside, 0.0).to(tl.float32)
        if BACKWARDS:
            s = -s
        even, odd = tl.split(values.to(tl.float32))
        rotated = tl.join(even * c - odd * s, even * s + odd * c)
        tl.store(target, rotated.to(out.dtype.element_ty), inside[:, None])


def rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, out: Tensor, backwards: bool
) -> None:
    """See `nova_kernels.ops.rope3d`; the result goes into out, which may be qkv."""
    launch = plan(qkv, cos, sin, num_heads, out, backwards)
    launch.run()
    if launch.arguments["out"] is not out:
        out.copy_(launch.arguments["out"])


def plan(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, out: Tensor, backwards: bool
) -> Launch:
    """The launch that rotates qkv into out."""
    in_place = out is qkv
    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()
        out = qkv if in_place else out
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, tokens, packed = qkv.shape
    width = packed // 3
    arguments = {
        "qkv": qkv,
        "cos": cos,
        "sin": sin,
        "out": out,
        "tokens": tokens,
        "width": width,
        "pairs_a_head": width // (2 * num_heads),
        "qkv_batch": qkv.stride(0),
        "qkv_token": qkv.stride(1),
        "out_batch": out.stride(0),
        "out_token": out.stride(1),
        "table_batch": 0 if cos.shape[0] == 1 else cos.stride(0),
        "table_token": cos.stride(1),
    }
    return Launch(
        rope3d_kernel,
        (batch * tokens, 2 if in_place else 3),
        arguments,
        {"BACKWARDS": backwards, "BLOCK": triton.next_power_of_2(width // 2)},
    )
