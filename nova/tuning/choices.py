"""What there is to choose for a model: libraries, layouts of weights, implementations of ops."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
from torch import nn

from nova_kernels import onednn
from nova_kernels.dispatch import Op, requested
from nova_kernels.ops.block_causal_attention import OP as BLOCK_CAUSAL_ATTENTION
from nova_kernels.ops.denoise import OP as DENOISE
from nova_kernels.ops.linear_gelu import OP as LINEAR_GELU
from nova_kernels.ops.residual_norm import OP as RESIDUAL_NORM
from nova_kernels.ops.rope3d import OP as ROPE

from ..libraries import TORCH, attention, linear_gelu
from ..libraries.packages import installed_packages
from ..model import NOVATransformer

AUTO = "auto"
# How a linear layer's weight (out, in) lies in memory.
ROWS, COLUMNS = "rows", "columns"
# Whether what was chosen is used at all.
DEFAULT, TUNED = "default", "tuned"
LINEAR_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


class Stage(Enum):
    """The part of a step that a choice changes."""

    IMAGE_ENCODER = "image encoder"
    DENOISE = "denoise loop"


@dataclass(frozen=True)
class Choice:
    """Ways to compute the same.

    Attributes:
        name: of what is chosen.
        stage: the part of a step that it changes.
        candidates: the first is what runs without a choice.
        unproven: candidates that nobody verified on a GPU, packages of others among them.
        set: makes a model run with a candidate.
        undo: makes it run as before.
    """

    name: str
    stage: Stage
    candidates: tuple[str, ...]
    set: Callable[[str], None]
    undo: Callable[[], None]
    unproven: frozenset[str] = frozenset()


def together(choices: Sequence[Choice], chosen: Sequence[str]) -> Choice:
    """The choice between a stage as tuned, every choice at its chosen candidate, and by default."""

    def set_all(name: str) -> None:
        for choice, candidate in zip(choices, chosen, strict=True):
            choice.set(candidate if name == TUNED else choice.candidates[0])

    def undo() -> None:
        for choice in choices:
            choice.undo()

    stage = choices[0].stage
    return Choice(stage.value, stage, (DEFAULT, TUNED), set_all, undo)


def choices_of(
    model: NOVATransformer, device: torch.device, *, layouts: bool = True
) -> list[Choice]:
    """All choices with more than one candidate; ops that run by a named backend are none.

    Of the image encoder and the denoise loop alone: the video encoder runs once a frame.

    Args:
        device: where the model will run.
        layouts: whether parameters may be replaced by copies in another layout. On a CPU there is
            nothing to choose where sampling packs the weights (`packed_blocks`).
    """
    blocks = list(model.image_encoder.blocks)
    attentions, mlps = [block.attn for block in blocks], [block.mlp for block in blocks]
    libraries = attention.installed_libraries(device)
    own = frozenset({"triton"}) - BLOCK_CAUSAL_ATTENTION.verified_on(device)
    choices = [_library_choice("attention", attentions, libraries, own)]
    layouts = layouts and not onednn.can_pack(attentions[0].qkv.weight)
    for name in LINEAR_LAYERS if layouts else ():
        lay_out = partial(_lay_out, [block.get_submodule(name) for block in blocks])
        choices.append(
            Choice(
                f"weights of {name}",
                Stage.IMAGE_ENCODER,
                (ROWS, COLUMNS),
                lay_out,
                partial(lay_out, ROWS),
            )
        )
    choices.append(_backend_choice(RESIDUAL_NORM, Stage.IMAGE_ENCODER, blocks, device))
    choices.append(_backend_choice(LINEAR_GELU, Stage.IMAGE_ENCODER, mlps, device))
    if requested(mlps[0].backend) == AUTO:
        libraries = linear_gelu.installed_libraries(device)
        choices.append(_library_choice("library of linear_gelu", mlps, libraries))
    if model.config.rotary_pos_embed:
        choices.append(_backend_choice(ROPE, Stage.IMAGE_ENCODER, attentions, device))
    choices.append(_backend_choice(DENOISE, Stage.DENOISE, [model.image_decoder], device))
    return [choice for choice in choices if len(choice.candidates) > 1]


def _library_choice(
    name: str,
    modules: list[nn.Module],
    libraries: tuple[str, ...],
    unproven: frozenset[str] = frozenset(),
) -> Choice:
    """The choice of the library of modules in the image encoder.

    Args:
        unproven: libraries, beside the packages of others.
    """
    unproven |= frozenset(installed_packages())
    choose = partial(_set_attribute, modules, "kernel_library")
    return Choice(
        name,
        Stage.IMAGE_ENCODER,
        libraries,
        choose,
        partial(choose, TORCH),
        unproven & frozenset(libraries),
    )


def _backend_choice(op: Op, stage: Stage, modules: list[nn.Module], device: torch.device) -> Choice:
    sample = torch.empty(0, device=device)
    is_free = requested(modules[0].backend) == AUTO
    # On a GPU what runs without a choice depends on the size of a set, and may be none by name.
    varies = device.type == "cuda" and op.verified_on(device)
    default = AUTO if is_free and varies else op.choose(AUTO, sample)
    candidates = [default]
    if is_free:
        candidates += [
            name
            for name in ("reference", *op.implementations)
            if name != default and _competes(op, name, sample)
        ]
    choose = partial(_set_attribute, modules, "backend")
    unproven = frozenset(candidates) - {AUTO, "reference"} - op.verified_on(device)
    return Choice(op.name, stage, tuple(candidates), choose, partial(choose, AUTO), unproven)


def _competes(op: Op, name: str, sample: torch.Tensor) -> bool:
    if name == "reference":
        return True
    interpreted = name == "triton" and sample.device.type != "cuda"
    return not interpreted and op.obstacle(name, sample) is None


def _set_attribute(modules: Iterable[nn.Module], attribute: str, value: str) -> None:
    for module in modules:
        setattr(module, attribute, value)


def _lay_out(layers: Iterable[nn.Linear], layout: str) -> None:
    """Give layers new weight parameters with the same values, laid out so."""
    for layer in layers:
        weight = layer.weight.detach()
        laid_out = weight.contiguous() if layout == ROWS else weight.t().contiguous().t()
        if laid_out.stride() != weight.stride():
            layer.weight = nn.Parameter(laid_out, requires_grad=layer.weight.requires_grad)
