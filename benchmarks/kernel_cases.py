"""The ops at shapes of the released models: inputs, what they cost, and what else computes them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from attention_peers import attention_peers
from torch import Tensor

import nova_kernels
from nova.libraries.linear_gelu import LIBRARIES
from nova.libraries.packages import installed_packages
from nova_kernels.block_layout import BlockLayout
from nova_kernels.head_weights import HeadWeights

Run = Callable[..., Tensor]


@dataclass(frozen=True)
class KernelCase:
    """An op at one shape.

    Attributes:
        op, shape: names.
        make: (device, dtype) -> inputs.
        run: (backend, *inputs) -> result. The reference is plain torch (for attention, SDPA by
            block).
        peers: *inputs -> result, by name: what is neither ours nor torch.compile of the reference.
        forward_peers: such that have no gradient.
        elements: values read and written, forward and backward (None: no gradient).
        operations: multiplications and additions, of matrix products alone, in the same order.
        num_tables: how many of the last inputs never have a gradient.
        is_compiled: whether torch.compile of the reference is a peer.
    """

    op: str
    shape: str
    make: Callable[[torch.device, torch.dtype], list[Any]]
    run: Run
    peers: dict[str, Run] = field(default_factory=dict)
    forward_peers: dict[str, Run] = field(default_factory=dict)
    elements: tuple[int, int | None] = (0, None)
    operations: tuple[int, int] = (0, 0)
    num_tables: int = 0
    is_compiled: bool = True


def kernel_cases() -> list[KernelCase]:
    """All cases."""
    return [
        residual_norm(48 * 1800, 1024),
        residual_norm(2 * 1800, 1024),
        scale_shift(48 * 36, 1280),
        scale_shift(2 * 36, 1280),
        linear_gelu(48 * 1800, 1024),
        linear_gelu(2 * 1800, 1024),
        frame_scale_shift(48, 360, 1024, 24),
        rope3d(2, 1800, 16, 64),
        rope3d(48, 1800, 16, 64),
        diffusion_step(24, 36, 16),
        denoise(1, 22, 16, width=1280, depth=3, steps=25),
        denoise(24, 22, 16, width=1280, depth=3, steps=25),
        attention("image encoder", [1800], heads=16, head_dim=64, batch=2),
        # A sixth of batch 24: the exact result, in float64 with all scores, has to fit too.
        attention("image encoder", [1800], heads=16, head_dim=64, batch=8),
        attention("one clip of 9 frames", [618] + [360] * 8, heads=16, head_dim=64, batch=1),
        attention("4 clips of 9 frames", [618] + [360] * 8, heads=16, head_dim=64, batch=4),
        attention("frame 8, cached", [360], heads=16, head_dim=64, batch=2, prefix=618 + 7 * 360),
        attention("one clip of 9 frames", [618] + [360] * 8, heads=16, head_dim=96, batch=1),
    ]


def randn(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers, the same in every call."""
    # Drawn on the device: large cases would take a CPU seconds each time.
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]


def residual_norm(rows: int, width: int) -> KernelCase:
    n = rows * width
    return KernelCase(
        "residual_norm",
        f"{rows} x {width}",
        lambda *to: randn(*to, (rows, width), (rows, width), (width,), (width,)),
        lambda backend, *t: nova_kernels.residual_norm(*t, backend=backend),
        elements=(3 * n, 3 * n),  # the gradient of x is that of the result
    )


def scale_shift(rows: int, width: int) -> KernelCase:
    n = rows * width
    return KernelCase(
        "scale_shift",
        f"{rows} x {width}",
        lambda *to: randn(*to, *[(rows, width)] * 3),
        lambda backend, *t: nova_kernels.scale_shift(*t, backend=backend),
        elements=(4 * n, 5 * n),
    )


def linear_gelu(rows: int, width: int) -> KernelCase:
    n, weights = rows * width, 4 * width * width + 4 * width
    return KernelCase(
        "linear_gelu",
        f"{rows} x {width}",
        lambda *to: [
            *randn(*to, (rows, width)),
            *(w * 0.05 for w in randn(*to, (4 * width, width), (4 * width,))),
        ],
        lambda backend, *t: nova_kernels.linear_gelu(*t, backend=backend),
        forward_peers={
            name: call for name, call in LIBRARIES.items() if name in installed_packages()
        },
        # The least: an implementation that makes GELU apart reads and writes the product once more.
        # Backward, what GELU was applied to is read as well.
        elements=(5 * n + weights, 10 * n + 2 * weights),
        operations=(8 * n * width, 16 * n * width),
    )


def frame_scale_shift(batch: int, tokens: int, width: int, rank: int) -> KernelCase:
    rows, weights = batch * tokens, 3 * width * rank + 2 * width
    n = rows * width
    features = (batch, tokens, width)
    return KernelCase(
        "frame_scale_shift",
        f"{rows} x {width}, rank {rank}",
        lambda *to: [
            *randn(*to, features, features),
            *(w * 0.05 for w in randn(*to, (rank, width), (2 * width, rank), (2 * width,))),
        ],
        lambda backend, *t: nova_kernels.frame_scale_shift(*t, backend=backend),
        elements=(3 * n + weights, 5 * n + 2 * weights),
        operations=(6 * n * rank, 18 * n * rank),
    )


def rope3d(batch: int, tokens: int, heads: int, head_dim: int) -> KernelCase:
    def make(device, dtype):
        (qkv,) = randn(device, dtype, (batch, tokens, 3 * heads * head_dim))
        (angles,) = randn(device, torch.float32, (1, tokens, head_dim // 2))
        return [qkv, angles.cos(), angles.sin()]

    n = batch * tokens * 3 * heads * head_dim
    return KernelCase(
        "rope3d",
        f"{batch} x {tokens}, {heads} heads of {head_dim}",
        make,
        lambda backend, *t: nova_kernels.rope3d(*t, heads, backend=backend),
        elements=(2 * n, 2 * n),
        num_tables=2,
    )


def diffusion_step(batch: int, tokens: int, token_dim: int) -> KernelCase:
    step = nova_kernels.StepCoefficients(1.0, -0.04, guidance=5.0)
    shape = (batch, tokens, token_dim)
    return KernelCase(
        "diffusion_step",
        f"{batch} x {tokens} x {token_dim}, guidance",
        lambda *to: randn(*to, shape, (2, *shape)),
        lambda backend, *t: nova_kernels.diffusion_step(*t, step, backend=backend)[0],
        elements=(4 * batch * tokens * token_dim, None),
    )


def denoise(
    batch: int, tokens: int, token_dim: int, *, width: int, depth: int, steps: int
) -> KernelCase:
    """All steps of a set, with guidance."""
    passes, values = 2, batch * tokens * token_dim
    numbers = [nova_kernels.StepCoefficients(1.0, -1 / steps, guidance=5.0)] * steps
    # (outputs, inputs) of linear layers, in the order of `HeadWeights.tensors`; a norm has no
    # inputs.
    blocks = [(width, width), (width, width), (width, 0)] * depth
    modulations = [(3 * width, width)] * depth + [(2 * width, width)]
    layers = [(width, token_dim), *blocks, *modulations, (token_dim, width)]
    shapes = [shape for out, into in layers for shape in ((out, into) if into else (out,), (out,))]

    def make(device, dtype):
        x, condition, times, *parameters = randn(
            device,
            dtype,
            (batch, tokens, token_dim),
            (passes, batch, tokens, width),
            (steps, width),
            *shapes,
        )
        scaled = [p / p.shape[1] ** 0.5 if p.dim() == 2 else p for p in parameters]
        return [x, condition, times, *scaled]

    def run(backend, x, condition, times, *parameters):
        weights = HeadWeights.of_tensors(parameters, depth)
        return nova_kernels.denoise(x, condition, times, weights, numbers, backend=backend)

    rows = passes * batch * tokens
    # All passes share the embedding of a token.
    products = rows * sum(out * into for out, into in layers[1:]) + values * width
    return KernelCase(
        "denoise",
        f"{batch} x {tokens} x {token_dim}, width {width}, {depth} blocks, {steps} steps, guidance",
        make,
        run,
        # Weights once, as where they stay on the chip; modulations are made and used inside.
        elements=(
            2 * values + rows * width + steps * width + sum(prod(shape) for shape in shapes),
            None,
        ),
        operations=(2 * steps * products, 0),
        is_compiled=False,  # a loop of so many steps takes minutes
    )


def attention(
    name: str, lengths: list[int], *, heads: int, head_dim: int, batch: int, prefix: int = 0
) -> KernelCase:
    layout = BlockLayout.of(lengths)
    tokens = layout.num_tokens
    pairs = (layout.visible_pairs() + tokens * prefix) * batch * heads

    def make(device, dtype):
        now, before = ((batch, heads, n, head_dim) for n in (tokens, prefix))
        return randn(device, dtype, now, now, now, *([before, before] if prefix else []))

    def run(backend, q, k, v, *prefix_kv):
        return nova_kernels.block_causal_attention(
            q, k, v, lengths, prefix_kv=prefix_kv or None, backend=backend
        )

    in_and_out = 4 * batch * heads * tokens * head_dim + 2 * batch * heads * prefix * head_dim
    return KernelCase(
        "block_causal_attention",
        f"{name}, {heads} heads of {head_dim}, batch {batch}",
        make,
        run,
        attention_peers(layout, prefix),
        elements=(in_and_out, 2 * in_and_out),
        # Two matrix products over the visible pairs, and five in the backward pass.
        operations=(4 * pairs * head_dim, 10 * pairs * head_dim),
    )
