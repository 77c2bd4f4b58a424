"""What happens after every autoregressive step of a call: progress bar, user's callback."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .errors import InputError
from .request import Request
from .sampling import SetEnd


class StepProgress:
    """Two progress bars, frames (for clips) and sets of the current frame; a context manager.

    Args:
        options: of tqdm, such as disable.
        part: which samples these are, for the first bar; empty: all.
    """

    def __init__(self, num_frames: int, num_sets: int, options: dict[str, Any], part: str = ""):
        self._frames = None
        sets = {"desc": f"{part}sets", "unit": "set", "leave": True, "position": 0}
        if num_frames > 1:
            frames = {"desc": f"{part}frames", "unit": "frame"}
            self._frames = tqdm(**{**frames, **options, "total": num_frames})
            sets |= {"desc": "sets", "leave": False, "position": 1}
        self._sets = tqdm(**{**sets, **options, "total": num_sets})

    def update(self, step: SetEnd) -> None:
        """Count a finished set, and the frame that it finishes."""
        if step.set_index == 0:
            self._sets.reset()
        self._sets.update()
        if step.set_index == step.num_sets - 1 and self._frames is not None:
            self._frames.update()

    def __enter__(self) -> "StepProgress":
        return self

    def __exit__(self, *exc: object) -> None:
        self._sets.close()
        if self._frames is not None:
            self._frames.close()


class Interrupted(Exception):
    """Raised through the sampler when somebody has asked to stop.

    Attributes:
        latents: (B, channels, h, w) the unfinished frame.
    """

    def __init__(self, latents: Tensor):
        super().__init__("somebody asked to stop")
        self.latents = latents


class StepCallback:
    """A user's `callback_on_step_end`, in diffusers' form, as a hook of the sampler.

    Args:
        pipeline: handed to the callback.
        samples: which of the call's samples the steps are of.
    """

    def __init__(self, pipeline: Any, request: Request, samples: range):
        self._pipeline = pipeline
        self._samples = samples
        self._callback = request.callback_on_step_end
        self._inputs = request.callback_on_step_end_tensor_inputs
        self._step = 0

    def __call__(self, step: SetEnd) -> Tensor | None:
        masked = 1.0 - (step.set_index + 1) / step.num_sets
        # The sampler's tensors can neither be edited outside nor have gradients.
        with torch.inference_mode(False), torch.no_grad():
            tensors = {}
            if "latents" in self._inputs:
                tensors["latents"] = step.latents.clone()
            if "samples" in self._inputs:
                tensors["samples"] = torch.tensor(self._samples)
            result = self._callback(self._pipeline, self._step, masked, tensors)
        self._step += 1
        if result is not None and not isinstance(result, Mapping):
            raise InputError(
                "callback_on_step_end must return a dict, which may hold latents, or None, got "
                f"{type(result).__name__}"
            )
        latents = (result or {}).get("latents")
        if latents is None:
            return None
        shape, expected = getattr(latents, "shape", None), step.latents.shape
        if not isinstance(latents, Tensor) or shape != expected:
            found = type(latents).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")
            raise InputError(
                f"callback_on_step_end returned as latents a {found}, expected a Tensor of shape "
                f"{tuple(expected)}"
            )
        return latents.detach().to(step.latents)
