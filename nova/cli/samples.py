"""What `nova generate` makes: conditions (sentences, class ids, embeddings), seeds and files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import InputError
from ..media import read_image, read_video

Condition = str | int | Tensor  # a sentence, a class id, or embeddings (tokens, width)


@dataclass(frozen=True)
class Sample:
    """One image or clip to make."""

    condition: Condition
    seed: int
    path: Path

    @property
    def caption(self) -> str | None:
        """What a contact sheet says above the frames."""
        if isinstance(self.condition, int):
            return f"class {self.condition}"
        return self.condition if isinstance(self.condition, str) else None


def read_conditions(
    prompt: str | None, class_id: int | None, prompt_embeds: Path | None, batch_file: Path | None
) -> list[Condition]:
    """The conditions that one of the four options gives.

    Raises:
        InputError: a file that cannot be read, or holds nothing of use.
    """
    if batch_file is not None:
        return list(_read_prompts(batch_file))
    if prompt_embeds is not None:
        return list(_read_embeddings(prompt_embeds))
    return [prompt if class_id is None else class_id]


def _read_prompts(path: Path) -> list[str]:
    try:
        # Sentences may hold what splitlines() takes for an end of line, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines]
    prompts = [line for line in prompts if line and not line.startswith("#")]
    if not prompts:
        raise InputError(f"{path} holds no prompts; write one a line")
    return prompts


def _read_embeddings(path: Path) -> Iterator[Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a safetensors file: {error}") from error
    if "prompt_embeds" not in tensors:
        raise InputError(f"{path} has no tensor `prompt_embeds`, only {sorted(tensors)}; rename it")
    embeds = tensors["prompt_embeds"]
    if embeds.dim() not in (2, 3) or not embeds.is_floating_point():
        raise InputError(
            f"`prompt_embeds` in {path} must be floating point (tokens, width) or (prompts, "
            f"tokens, width), got {embeds.dtype} {tuple(embeds.shape)}"
        )
    embeds = embeds if embeds.dim() == 3 else embeds[None]
    if not len(embeds):
        raise InputError(f"`prompt_embeds` in {path} holds no prompt, its shape is (0, ...)")
    return iter(embeds)


def plan_samples(
    conditions: list[Condition], *, repeats: int, first_seed: int, out: Path, numbered: bool
) -> list[Sample]:
    """Samples in order: all of the first condition, then of the second...

    Sample i has the seed first_seed + i. Where there are several, or `numbered` says so, its file
    is x_00i.mp4 for the output x.mp4.
    """
    repeated = [condition for condition in conditions for _ in range(repeats)]
    if len(repeated) == 1 and not numbered:
        return [Sample(repeated[0], first_seed, out)]
    return [
        Sample(condition, first_seed + i, out.with_name(f"{out.stem}_{i:03d}{out.suffix}"))
        for i, condition in enumerate(repeated)
    ]


def read_given_frames(image: Path | None, video: Path | None, fps: float) -> dict[str, Any]:
    """The pipeline's arguments `image` or `video`, read from their files as uint8 arrays.

    Raises:
        MediaError: a file is missing or damaged.
        InputError: both are given.
    """
    if image is not None and video is not None:
        raise InputError("give one of --image and --video, not both")
    if image is not None:
        return {"image": read_image(image)}
    if video is not None:
        return {"video": read_video(video, fps=fps)[0]}
    return {}
