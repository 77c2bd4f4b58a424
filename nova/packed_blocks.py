"""Transformer blocks arranged for sampling on a CPU: the same function with packed weights."""

import copy
from typing import TypeVar

from torch import nn

from nova_kernels import onednn
from nova_kernels.dispatch import requested
from nova_kernels.onednn import PackedLinear

from .altered_layers import is_altered, is_plain
from .layers import Attention, Block, Mlp

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def packed_blocks(blocks: nn.ModuleList) -> list[Block]:
    """The image encoder's blocks for a run: packed on a CPU, elsewhere they themselves.

    Weights are copied, so that a change of them is for the next run; all else is shared. Blocks
    stay as they are whose backend is named, or whose layers somebody compiled, replaced or listens
    to.
    """
    first, last = list(blocks[:-1]), blocks[-1]
    packed = [_packed(block) if _can_pack(block) else block for block in first]
    # Of the last block's qkv layer only parts are used, so that stays.
    return [*packed, _packed(last, qkv=False) if _can_pack(last) else last]


def _can_pack(block: Block) -> bool:
    # Others may be wrappers that pass on what is asked of them, and what is set.
    if (type(block), type(block.attn), type(block.mlp)) != (Block, Attention, Mlp):
        return False
    attention, mlp = block.attn, block.mlp
    if {requested(block.backend), requested(mlp.backend)} != {"auto"}:
        return False
    layers = (attention.qkv, attention.proj, mlp.fc1, mlp.fc2)
    if not all(is_plain(layer) and onednn.can_pack(layer.weight) for layer in layers):
        return False
    # What is attached to the MLP goes with it; a copy would forget that it was compiled.
    return not is_altered(mlp) and not any(module._compiled_call_impl for module in block.modules())


def _packed(block: Block, *, qkv: bool = True) -> Block:
    attention, mlp = block.attn, block.mlp
    packed = _copy_without_children(block)
    packed.attn = _copy_without_children(attention)
    if qkv:
        packed.attn.qkv = PackedLinear(attention.qkv.weight, attention.qkv.bias)
    packed.attn.proj = PackedLinear(attention.proj.weight, attention.proj.bias)
    packed.mlp = nn.Sequential(
        PackedLinear(mlp.fc1.weight, mlp.fc1.bias, gelu=True),
        PackedLinear(mlp.fc2.weight, mlp.fc2.bias),
    )
    return packed


def _copy_without_children(module: ModuleT) -> ModuleT:
    """A module with the same tensors, hooks and submodules, which may be replaced in it."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied
