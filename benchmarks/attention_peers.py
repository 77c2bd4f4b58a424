"""What else computes block-causal attention, to be timed beside the op.

A peer takes q, k and v, (batch, heads, tokens, head_dim) each, and maybe keys and values in front
of them, and returns a tensor like q. It serves one sequence of bidirectional blocks.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from nova.libraries.attention import LIBRARIES
from nova.libraries.packages import installed_packages
from nova_kernels.block_layout import BlockLayout

Attend = Callable[..., Tensor]


def attention_peers(layout: BlockLayout, prefix: int) -> dict[str, Attend]:
    """All peers for `layout`, behind `prefix` keys and values, by name."""
    peers = {
        "SDPA with a mask": with_mask(layout, prefix),
        "SDPA by block, flash": by_block(layout, LIBRARIES["flash"]),
        "SDPA by block, cuDNN": by_block(layout, LIBRARIES["cudnn"]),
    }
    if not prefix:
        peers["FlexAttention"] = flex_attention(layout)
    packages = [name for name in installed_packages() if name in LIBRARIES]
    return peers | {f"{name} by block": by_block(layout, LIBRARIES[name]) for name in packages}


def with_mask(layout: BlockLayout, prefix: int) -> Attend:
    """One call, all scores, those that are not seen thrown away."""
    masks = {}  # by device, made before the calls that are timed

    def run(q, k, v, *prefix_kv):
        if q.device not in masks:
            masks[q.device] = F.pad(layout.mask(q.device), (prefix, 0), value=True)
        k, v = _behind(prefix_kv, k, v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=masks[q.device])

    return run


def by_block(layout: BlockLayout, attend: Attend) -> Attend:
    """One call a block, on the keys of all blocks up to it: no mask, exactly the visible pairs.

    The op's reference does the same with the kernel that torch chooses. The backward pass also
    adds up the gradients that keys and values get from each call.
    """

    def run(q, k, v, *prefix_kv):
        k, v = _behind(prefix_kv, k, v)
        before = k.shape[2] - q.shape[2]
        outputs = []
        for block in layout.blocks():
            queries = q[:, :, block.start : block.stop]
            end = before + block.stop
            outputs.append(attend(queries, k[:, :, :end], v[:, :, :end]))
        return torch.cat(outputs, dim=2)

    return run


def flex_attention(layout: BlockLayout) -> Attend:
    """torch's compiled attention with a block mask; without a prefix."""
    compiled, masks = None, {}

    def run(q, k, v):
        nonlocal compiled
        # Here, not above: it imports torch's compiler, which takes seconds.
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = compiled or torch.compile(flex_attention)
        if q.device not in masks:
            first, end = layout.intervals(q.device)[:2]
            size = layout.num_tokens

            def seen(batch, head, query, key):
                return (key >= first[query]) & (key < end[query])

            masks[q.device] = create_block_mask(seen, None, None, size, size, q.device)
        return compiled(q, k, v, block_mask=masks[q.device])

    return run


def _behind(prefix_kv: tuple[Tensor, ...], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with those of the prefix, if there is one, in front."""
    if not prefix_kv:
        return k, v
    return torch.cat([prefix_kv[0], k], dim=2), torch.cat([prefix_kv[1], v], dim=2)
