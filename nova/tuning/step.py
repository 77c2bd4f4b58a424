"""What is timed: a step in the middle of a frame, on random tensors."""

import copy

import torch
from torch import Tensor

from ..denoising import NoisyTokens, SetNoise, denoise
from ..guidance import Guidance
from ..head import PreparedHead
from ..layers import Rotary
from ..model import NOVATransformer
from ..noise import NoiseSource
from ..schedule import DiffusionSchedule
from ..set_step import FrameTensors
from ..token_order import TokenOrder
from .choices import Stage


class MiddleStep:
    """The step that reveals the set in the middle.

    Args:
        set_sizes: of all steps of a frame.
    """

    def __init__(
        self,
        model: NOVATransformer,
        schedule: DiffusionSchedule,
        guidance: Guidance,
        set_sizes: list[int],
        batch_size: int,
    ):
        self._model, self._schedule, self._guidance = model, schedule, guidance
        middle = len(set_sizes) // 2
        self._start = sum(set_sizes[:middle])
        self._stop = self._start + set_sizes[middle]
        self._scale = guidance.scale_at(middle, len(set_sizes))
        config, device, dtype = model.config, model.device, model.dtype
        generator = torch.Generator(device).manual_seed(0)
        noise = NoiseSource(generator, batch_size, dtype=dtype, device=device)
        order = TokenOrder.draw(model, noise, guidance.passes)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        rows, width = order.masked.shape[0], order.masked.shape[-1]
        embedded = random(*order.masked.shape)
        cond = random(rows, config.num_frame_tokens, width)
        self._frame = FrameTensors(cond, embedded, order.masked, order.rotary)
        self._z = random(rows, self._stop - self._start, width)
        noisy = NoisyTokens(
            noise, order, self._start, self._stop, config.latent_shape, config.patch_size
        )
        self._drawn = SetNoise.draw(noisy, schedule, guidance)
        self._timesteps = torch.tensor(schedule.timesteps, dtype=torch.float32, device=device)

    def in_float32(self) -> "MiddleStep":
        """The same step of the same numbers by plain torch in float32, on a copy of the model."""
        step = copy.copy(self)
        step._model = copy.deepcopy(self._model).float()
        step._model.set_backend("reference")
        frame, rotary = self._frame, self._frame.rotary
        step._frame = FrameTensors(
            frame.cond.float(),
            frame.embedded.float(),
            frame.masked.float(),
            None if rotary is None else Rotary(rotary.cos.float(), rotary.sin.float()),
        )
        step._z, step._drawn = self._z.float(), self._drawn.map(Tensor.float)
        return step

    def run(self, stage: Stage) -> Tensor:
        """What a stage of the step computes."""
        return self._encode() if stage is Stage.IMAGE_ENCODER else self._denoise()

    def _encode(self) -> Tensor:
        frame = self._frame
        return self._model.encode_image(
            frame.cond,
            frame.embedded[:, : self._start],
            frame.masked[:, self._start :],
            rotary=frame.rotary,
            rows=slice(self._start, self._stop),
        )

    def _denoise(self) -> Tensor:
        # Prepared here, since that is when the head's backend is read.
        return denoise(
            PreparedHead(self._model.image_decoder, self._timesteps),
            self._z,
            self._drawn,
            schedule=self._schedule,
            guidance=self._guidance,
            scale=self._scale,
        )
