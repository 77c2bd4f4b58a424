"""What fps.py measures: the samplers, all called like `nova.sampling.generate_frames`."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from reference_package import ReferenceSampler
from shared_weights import share_weights
from torch import Tensor

from nova.conditioning import Conditioning
from nova.engine import SetGraphs
from nova.model import NOVATransformer
from nova.plain_sampling import generate_frames_plain
from nova.sampling import generate_frames

PLAIN, COMPILED, EXACT, GRAPHS = "plain", "plain, compiled", "exact", "graphs"
# Their first run compiles or records; it never counts as a measurement.
STARTING_UP = (COMPILED, GRAPHS)


class CompiledSampler:
    """The plain loops with the blocks of the image encoder and of the diffusion MLP compiled.

    Sequences have another length in every set, so that the compiled code is one for all lengths.
    The video encoder, which runs once a frame, stays as it is.
    """

    def __init__(self) -> None:
        self._model: NOVATransformer | None = None
        self._compiled: NOVATransformer | None = None

    def __call__(
        self, model: NOVATransformer, conditioning: Conditioning, **options: Any
    ) -> Iterator[Tensor]:
        if self._model is not model:
            # What was compiled for another model counts against the limit of variants.
            torch.compiler.reset()
            self._model, self._compiled = model, share_weights(model)
            parts = self._compiled.image_encoder, self._compiled.image_decoder
            for block in (block for part in parts for block in part.blocks):
                block.compile(dynamic=True)
        return generate_frames_plain(self._compiled, conditioning, **options)


def make_samplers(
    device: torch.device, *, compiled: bool = False, against: str | None = None
) -> dict[str, Callable]:
    """Samplers by name; the plain one, which the others are compared with, comes first.

    Args:
        compiled: with `torch.compile`.
        against: "diffnext" adds the reference package, as it is and after `nova.accelerate`.

    Raises:
        ImportError: that package is not there.
    """
    samplers: dict[str, Callable] = {PLAIN: generate_frames_plain}
    if compiled:
        samplers[COMPILED] = CompiledSampler()
    samplers[EXACT] = generate_frames
    if device.type == "cuda":
        samplers[GRAPHS] = partial(generate_frames, graphs=SetGraphs())
    if against is not None:
        samplers[against] = ReferenceSampler()
        samplers[f"{against}, accelerated"] = ReferenceSampler(accelerated=True)
    return samplers
