"""Contact sheets of what a model makes while it is trained, always of the same prompts and seed."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..codec import LatentCodec
from ..data import LatentDataset
from ..errors import InputError
from ..media import compare_clips, write_image
from ..pipeline import NOVAPipeline
from ..text import TextEncoder
from .checkpoints import FrozenParts
from .options import TrainingOptions


@dataclass(frozen=True)
class SheetConditions:
    """What the sheets show.

    Attributes:
        conditions: embeddings (tokens, width) a prompt, or class ids.
        captions: written above the rows.
        motion_flow, fps: what the model is told, one a prompt.
    """

    conditions: list[Tensor] | list[int]
    captions: list[str]
    motion_flow: list[float]
    fps: list[float]

    @classmethod
    def choose(
        cls,
        data: LatentDataset,
        options: TrainingOptions,
        parts: FrozenParts,
        text_length: int | None,
    ) -> "SheetConditions":
        """The prompts that the options name, or the first captions of the data.

        Raises:
            InputError: prompts for a class-conditional model, or without a text encoder.
        """
        if not options.sample_prompts:
            return cls._from_data(data, min(options.num_samples, len(data)))
        folders = parts.folders
        if text_length is None or not {"text_encoder", "tokenizer"} <= set(folders):
            raise InputError(
                "sample_prompts need a text encoder; without them, captions of the data are used"
            )
        encoder = TextEncoder.from_folders(
            folders["text_encoder"], folders["tokenizer"], max_length=text_length
        )
        prompts = list(options.sample_prompts)
        first = data[0]
        count = len(prompts)
        # It is done with the encoder after this, which may be large.
        embeddings = encoder.encode(prompts)
        return cls(embeddings, prompts, [first.motion_flow] * count, [first.fps] * count)

    @classmethod
    def _from_data(cls, data: LatentDataset, count: int) -> "SheetConditions":
        samples = [data[index] for index in range(count)]
        return cls(
            [s.label if s.text is None else s.text for s in samples],
            [data.caption(index) for index in range(count)],
            [s.motion_flow for s in samples],
            [s.fps for s in samples],
        )


def write_sample_sheet(
    path: Path,
    pipeline: NOVAPipeline,
    conditions: SheetConditions,
    options: TrainingOptions,
    num_frames: int,
) -> None:
    """Sample every prompt with a seed of its own, and lay the clips below each other.

    Args:
        pipeline: with a VAE.
        num_frames: latent frames.
    """
    given = conditions.conditions
    is_text = isinstance(given[0], Tensor)
    output = pipeline(
        **{"prompt_embeds" if is_text else "prompt": given},
        num_inference_steps=options.sample_steps,
        num_diffusion_steps=options.sample_diffusion_steps,
        guidance_scale=options.sample_guidance,
        max_latent_length=num_frames,
        motion_flow=conditions.motion_flow,
        fps=conditions.fps,
        generator=[torch.Generator().manual_seed(options.seed + i) for i in range(len(given))],
        disable_progress_bar=True,
        output_type="uint8",
    )
    clips = output.images[:, None] if output.frames is None else output.frames
    sheet = compare_clips(list(clips), captions=conditions.captions)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, sheet)


def load_codec(parts: FrozenParts) -> LatentCodec | None:
    """The VAE that draws the sheets; None: no sheets."""
    folder = parts.folders.get("vae")
    return None if folder is None else LatentCodec.load(folder, torch.float32)
