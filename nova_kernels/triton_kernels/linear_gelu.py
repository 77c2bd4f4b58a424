"""GELU(x @ weight.T + bias): torch's matrix product, then GELU in Triton, in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from nova_kernels.errors import BackendError
from nova_kernels.triton_kernels.launch import Launch, ceil_div

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Values a program: a thread reads and writes 16 bytes twice in half precision. Where the number of
# values is no multiple of 16, accesses are value by value, since the mask may end anywhere.
BLOCK = 2048


@triton.jit
def _normal_tail(a):
    """P(N > a) of a standard normal N, for a >= 0 (float32), by one power of two and no division.

    exp2 of a polynomial of degree 9 in a, fitted for this kernel: of those that are -1 at 0 the one
    whose largest error from log2 of the tail is least over 0 <= a <= 13 (least squares by Chebyshev
    polynomials, weights iterated after Lawson, the tail from mpmath). That is a relative error of
    1.8e-5 of the tail; with float32's roundings it is 2e-5 up to 6 and 5e-5 up to 12.9, where the
    tail leaves the normal numbers of float32 and becomes 0. Half a unit in the last place is 2.4e-4
    or more in float16. Past 13 the polynomial falls on, to -infinity.
    """
    power = -2.0270954894657006e-09 * a + 1.4621179499363707e-07
    power = power * a - 4.6418932714979785e-06
    power = power * a + 8.588946605351334e-05
    power = power * a - 0.001037549617122806
    power = power * a + 0.008740241557754162
    power = power * a - 0.05414340636246969
    power = power * a - 0.45853780113919836
    power = power * a - 1.1511372965015916
    power = power * a - 1.0
    return tl.exp2(power)


@triton.jit
def gelu_kernel(x, out, count, BLOCK: tl.constexpr):
    """A block of values a program. `out` may be `x`."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    value = tl.arange(0, BLOCK)
    inside = value < count - first
    stored = tl.load(x + first + value, inside, 0.0)
    v = stored.to(tl.float32)
    if x.dtype.element_ty == tl.float32:
        below = 0.5 * (1.0 + tl.math.erf(v * 0.7071067811865476))
    else:
        # By erf the arithmetic takes longer than reading and writing.
        tail = _normal_tail(tl.abs(v))
        below = tl.where(v < 0.0, tail, 1.0 - tail)
    tl.store(out + first + value, (v * below).to(out.dtype.element_ty), inside)


def forward(x: Tensor, weight: Tensor, bias: Tensor, keep_hidden: bool) -> tuple[Tensor, Tensor]:
    """See `nova_kernels.ops.linear_gelu`; also what GELU was applied to, or an empty tensor."""
    if not x.dtype == weight.dtype == bias.dtype or x.dtype not in DTYPES:
        raise BackendError(
            "linear_gelu: the kernel takes one dtype, float16, bfloat16 or float32, got "
            f"{x.dtype}, {weight.dtype} and {bias.dtype}; use backend='reference'"
        )
    hidden = F.linear(x, weight, bias).contiguous()  # the kernel takes values as they lie
    out = torch.empty_like(hidden) if keep_hidden else hidden
    plan(hidden, out).run()
    return out, hidden if keep_hidden else out.new_empty(0)


def plan(x: Tensor, out: Tensor) -> Launch:
    """The launch that fills `out`, which may be `x`, with GELU(x); both contiguous."""
    count = x.numel()
    arguments = {"x": x, "out": out, "count": count}
    return Launch(gelu_kernel, (ceil_div(count, BLOCK),), arguments, {"BLOCK": BLOCK})
