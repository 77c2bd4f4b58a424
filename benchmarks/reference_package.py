"""The reference package (diffnext, github.com/baaivision/NOVA) as a peer, where it can be imported.

It is run as its authors wrote it, with the weights of our model, on the same conditioning tokens
and noise. For a checkout that is not installed: PYTHONPATH=third_party/NOVA. Of what it needs this
package's dependencies lack only scipy, and for whole pipelines einops.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import nova
from nova.conditioning import Conditioning
from nova.config import ModelConfig
from nova.graph_recording import RecordingError
from nova.guidance import Guidance
from nova.model import NOVATransformer
from nova.schedule import DiffusionSchedule, FlowMatchConfig

# The name of its package, and of its row.
DIFFNEXT = "diffnext"


class ReferenceSampler:
    """Samples by the reference's `generate_video`, called like `nova.sampling.generate_frames`.

    Args:
        seed: of its noise, drawn on the model's device.
        accelerated: after `nova.accelerate`, as its users would.
        options: of `nova.accelerate`.

    Raises:
        ImportError: the package, or something that it needs, is not there.
        RecordingError: of a call: `nova.accelerate` did not do what it was asked for.
    """

    def __init__(self, seed: int = 0, *, accelerated: bool = False, **options: Any):
        import_reference()
        self._seed, self._accelerated, self._options = seed, accelerated, options
        self._transformer: nn.Module | None = None

    def __call__(
        self,
        model: NOVATransformer,
        conditioning: Conditioning,
        *,
        num_frames: int,
        set_sizes: list[int],
        schedule: DiffusionSchedule,
        guidance: Guidance,
        **_: Any,
    ) -> Iterator[Tensor]:
        if self._transformer is None:
            self._transformer = make_reference(model)
            if self._accelerated:
                nova.accelerate(self._pipe(), **self._options)
        batch = conditioning.batch_size
        channels, height, width = model.config.latent_shape
        inputs = {
            "c": conditioning.tokens,
            "x": torch.empty(batch, channels, height, width).to(model.device, model.dtype),
            "num_preds": np.array(set_sizes),
            "guidance_scale": guidance.scale,
            "max_latent_length": num_frames,
            "num_diffusion_steps": len(schedule),
            "generator": torch.Generator(model.device).manual_seed(self._seed),
            "latents": [],
            "tqdm1": False,
            "tqdm2": False,
        }
        self._transformer.generate_video(inputs)
        if self._accelerated:
            self._check_report()
        return iter(inputs["latents"])

    def _pipe(self) -> SimpleNamespace:
        return SimpleNamespace(transformer=self._transformer)

    def _check_report(self) -> None:
        """What was left to the reference, or could not be recorded, is not what the row says."""
        report = nova.report(self._pipe())
        reason = report.left_to_reference or report.graphs_failure
        if reason is not None:
            raise RecordingError(reason)


def import_reference() -> Any:
    """The reference's module of the transformer."""
    from diffnext.models.transformers import transformer_nova

    return transformer_nova


def make_reference(model: NOVATransformer) -> nn.Module:
    """The reference's transformer with a model's weights, on its device, for flow matching."""
    from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler

    reference = import_reference()
    config = {**model.config.to_dict(), "arch": _register(reference, model.config)}
    config.pop("arch_dims", None)
    transformer = reference.NOVATransformer3DModel(**config)
    transformer.load_state_dict(model.state_dict())
    transformer.to(model.device, model.dtype).eval().requires_grad_(False)
    transformer.sample_scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=FlowMatchConfig().num_train_timesteps
    )
    return transformer


def _register(reference: Any, config: ModelConfig) -> list[str]:
    """Names of a geometry's parts, which the reference knows afterwards."""
    names = []
    for registry, make, part, kind in (
        (reference.VIDEO_ENCODERS, reference.video_encoder, config.video_encoder, "vit"),
        (reference.IMAGE_ENCODERS, reference.image_encoder, config.image_encoder, "vit"),
        (reference.IMAGE_DECODERS, reference.image_decoder, config.image_decoder, "mlp"),
    ):
        names.append(f"{kind}_d{part.depth}w{part.embed_dim}")
        registry.register(names[-1], make, **vars(part))
    return names
