"""The weights of NOVA's diffusion MLP, as `nova_kernels.denoise` takes them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from nova_kernels.checks import require_shape

Linear = tuple[Tensor, Tensor]  # weight (out, in), bias (out,)
Affine = tuple[Tensor, Tensor]  # weight, bias, each (width,)


@dataclass(frozen=True)
class BlockWeights:
    """A block of the MLP.

    Attributes:
        fc1, fc2: (width, width), one after the other.
        norm: of what they make, (width,).
    """

    fc1: Linear
    fc2: Linear
    norm: Affine


@dataclass(frozen=True)
class HeadWeights:
    """The diffusion MLP as the loop reads it.

    Attributes:
        embed: (width, token_dim).
        blocks: one after the other.
        modulations: (3 * width, width) for each block: scale, shift, gate; then (2 * width, width):
            scale, shift. Their scales hold 1 + scale: see `with_unit_scale`.
        head: (token_dim, width).

    Raises:
        ValueError: shapes that do not fit. Kernels, which get addresses alone, rely on them.
    """

    embed: Linear
    blocks: tuple[BlockWeights, ...]
    modulations: tuple[Linear, ...]
    head: Linear

    def __post_init__(self):
        embed = tuple(self.embed[0].shape)
        if len(embed) != 2 or 0 in embed:
            raise ValueError(f"denoise: embed.weight must be (width, token_dim), got {embed}")
        if len(self.modulations) != len(self.blocks) + 1:
            raise ValueError("denoise: every block needs a modulation, and the head another one")
        for name, linear, shape in self._layers():
            weight, bias = linear
            require_shape("denoise", f"{name}.weight", weight, *shape)
            require_shape("denoise", f"{name}.bias", bias, shape[0])

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor], depth: int) -> "HeadWeights":
        """The MLP of `depth` blocks whose `tensors()` these are.

        Raises:
            ValueError: another number of tensors, or shapes that do not fit.
        """
        # Embedding and head; two layers and a norm a block; a modulation a block and for the head.
        count = 2 * (2 + 3 * depth + depth + 1)
        if depth < 0 or len(tensors) != count:
            raise ValueError(f"denoise: {depth} blocks need {count} tensors, got {len(tensors)}")
        embed, *middle, head = zip(tensors[::2], tensors[1::2], strict=True)
        blocks = (BlockWeights(*middle[3 * i : 3 * i + 3]) for i in range(depth))
        return cls(embed, tuple(blocks), tuple(middle[3 * depth :]), head)

    @property
    def width(self) -> int:
        """Features of a token in the blocks."""
        return self.embed[0].shape[0]

    @property
    def token_dim(self) -> int:
        """Values in a token."""
        return self.embed[0].shape[1]

    @cached_property
    def packed(self) -> dict[str, Any]:
        """The weights as the C++ kernel reads them, made at its first call (`renew` forgets it)."""
        from nova_kernels.cpp_kernels.denoise import pack

        return pack(self)

    def renew(self) -> None:
        """To be called where weights were changed in place."""
        self.__dict__.pop("packed", None)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: another CPU may need other panels than `packed` has."""
        return {name: value for name, value in vars(self).items() if name != "packed"}

    def tensors(self) -> list[Tensor]:
        """All weights and biases, weight before bias, always in one order.

        The embedding; fc1, fc2 and norm of every block; modulations of every block and of the head;
        the head.
        """
        blocks = [linear for b in self.blocks for linear in (b.fc1, b.fc2, b.norm)]
        linears = [self.embed, *blocks, *self.modulations, self.head]
        return [tensor for linear in linears for tensor in linear]

    def _layers(self) -> Iterator[tuple[str, Linear | Affine, tuple[int, ...]]]:
        """Name, tensors, and the shape that the weight must have, of every layer."""
        width, token_dim = self.width, self.token_dim
        yield "embed", self.embed, (width, token_dim)
        for i, block in enumerate(self.blocks):
            yield f"blocks[{i}].fc1", block.fc1, (width, width)
            yield f"blocks[{i}].fc2", block.fc2, (width, width)
            yield f"blocks[{i}].norm", block.norm, (width,)
            yield f"modulations[{i}]", self.modulations[i], (3 * width, width)
        yield f"modulations[{len(self.blocks)}]", self.modulations[-1], (2 * width, width)
        yield "head", self.head, (token_dim, width)


def with_unit_scale(weight: Tensor, bias: Tensor) -> Linear:
    """A modulation whose first output is 1 + scale instead of scale; the weight is not copied."""
    bias = bias.clone()
    bias[: weight.shape[1]] += 1
    return weight, bias
