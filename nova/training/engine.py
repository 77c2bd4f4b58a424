"""One optimiser step, whatever is trained: accelerate, gradients, optimisers, averaged weights."""

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import InputError, dependency_error
from .divergence import LossWatch
from .ema import EMA
from .options import RunOptions
from .parameters import make_optimizers
from .schedule import learning_rate

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(options: RunOptions) -> "Accelerator":
    """This process's accelerator: one device, or its share of what `accelerate launch` started.

    Raises:
        DependencyError: accelerate is not installed.
        InputError: accelerate refuses, as where the calling script has made an accelerator of
            another precision before.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
    except ImportError as error:
        raise dependency_error(
            "training needs accelerate", "accelerate", "pip install 'nova-kernels[train]'", error
        ) from error
    # The model has no buffers that change.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    # False is accelerate's "whatever there is", and would undo `accelerate launch --cpu`.
    cpu = {"cpu": True} if options.device == "cpu" else {}
    try:
        # `Engine` does both itself. Left out, they come from the settings of `accelerate launch`.
        return Accelerator(
            mixed_precision="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[ddp],
            **cpu,
        )
    except ValueError as error:
        raise InputError(f"accelerate cannot be set up for training: {error}") from error


class Engine:
    """What a training run holds: the module, its optimisers, its average, and a watch on the loss.

    Args:
        accelerator: of this process.
        objective: its forward pass takes a batch as keywords, and returns scalar losses of which
            "loss" is optimised. Parameters that need no gradient stay as they are.

    Attributes:
        module: the objective, as accelerate has wrapped it.
    """

    def __init__(self, accelerator: "Accelerator", objective: nn.Module, options: RunOptions):
        self.accelerator, self.options = accelerator, options
        optimizers = make_optimizers(objective, options)
        self.module, *self.optimizers = accelerator.prepare(objective, *optimizers)
        self.ema = EMA(self.module, options.ema_decay)
        self.watch = LossWatch(options.warmup_steps)

    def step(self, step: int, micro_batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """One optimiser step.

        Args:
            step: its number, from 0.
            micro_batches: this process's, of equal size.

        Returns:
            Losses, averaged over all samples of the step; learning_rate and grad_norm.

        Raises:
            DivergenceError: before the weights are touched.
        """
        batches = list(micro_batches)
        names, total = [], 0.0
        for number, batch in enumerate(batches, start=1):
            # Processes exchange gradients once a step.
            quiet = contextlib.nullcontext()
            if number < len(batches):
                quiet = self.accelerator.no_sync(self.module)
            with quiet, self._attention():
                losses = self._forward(batch)
                self.accelerator.backward(losses["loss"] / len(batches))
            names = list(losses)
            total = total + torch.stack([loss.detach().float() for loss in losses.values()])
        means = self.accelerator.reduce(total / len(batches), reduction="mean").tolist()
        grad_norm = self.accelerator.clip_grad_norm_(
            self.module.parameters(), self.options.max_grad_norm
        )
        result = dict(zip(names, means, strict=True))
        result["learning_rate"] = learning_rate(step, self.options)
        result["grad_norm"] = float(grad_norm)
        self.watch.check(step, result["loss"], result["grad_norm"])
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = result["learning_rate"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.update(step)
        return result

    def _attention(self) -> contextlib.AbstractContextManager:
        """What attention is computed by, backward passes included."""
        # PyTorch's fused attention for CPUs is slower than plain matrix products when it runs
        # backwards in bfloat16, by far for short sequences.
        plain = self.accelerator.device.type == "cpu" and self.options.precision == "bfloat16"
        return sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()

    def _forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        device = self.accelerator.device
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        half = self.options.precision == "bfloat16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            return self.module(**batch)
