"""Packages that need a GPU, made of torch: modules of their names and with their functions."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from torch import Tensor
from torch.nn import functional as F

from nova.libraries import packages

# Package -> the module of its function.
FLASH_MODULES = {
    packages.FLASH_ATTN: "flash_attn",
    packages.FLASH_ATTN_3: "flash_attn_interface",
    packages.FLASH_ATTN_4: "flash_attn.cute",
}


def stand_in(monkeypatch: pytest.MonkeyPatch, package: str) -> list[tuple]:
    """The package is installed, and no other; what its function was called with is in the list.

    For FlashAttention (queries, keys), else (rows, whether the product was kept).
    """
    calls = []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, None]:
        """(batch, tokens, heads, head_dim) each, as FlashAttention's own."""
        calls.append((q.shape[1], k.shape[1]))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return (out, None) if package == packages.FLASH_ATTN_4 else out

    def gemm_act(
        A: Tensor,
        B: Tensor,
        *,
        bias: Tensor,
        activation: str,
        store_preact: bool,
        tuned: bool,
    ) -> tuple[None, Tensor]:
        """(rows, inputs) @ (inputs, outputs), as quack's own."""
        calls.append((A.shape[0], store_preact))
        assert activation == "gelu_erf" and not tuned
        return None, F.gelu((A @ B).float() + bias.float()).to(A.dtype)

    if package == packages.QUACK:
        _install(monkeypatch, "quack.gemm_interface", "gemm_act", gemm_act)
    else:
        _install(monkeypatch, FLASH_MODULES[package], "flash_attn_func", attention)
    monkeypatch.setattr(packages, "version_of", lambda name: "1.0" if name == package else None)
    return calls


def _install(monkeypatch: pytest.MonkeyPatch, name: str, function: str, value: object) -> None:
    module = ModuleType(name)
    setattr(module, function, value)
    parents = [name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)]
    for parent in parents:
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    module.__spec__ = ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
