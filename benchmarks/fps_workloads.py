"""What fps.py samples: geometry, latent frames, steps, batch sizes, and how much of a video."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clip_lengths import pixel_frames
from fps_text import PHI_2, SIZES
from fps_vae import IMAGE_VAE
from random_model import check_takes_text

from nova.checkpoint import find_folder
from nova.codec import read_temporal_factor
from nova.config import ModelConfig, named_config
from nova.data.clips import VIDEO_STRIDE
from nova.errors import InputError
from nova.folders import read_configs
from nova.pipeline import DEFAULT_LATENT_FRAMES

RELEASED_VIDEO = "nova-d48w1024-osp480"


@dataclass(frozen=True)
class Workload:
    """What is sampled: a geometry, latent frames T, steps A and D.

    Attributes:
        geometry: a name of `nova.config.NAMED_CONFIGS`, or of a checkpoint.
        num_sets: run only so many sets of one frame; None: all.
        run_frames: run only so many latent frames; None: all, or as `run_seconds` says.
        run_seconds: run as many latent frames as the plain sampler makes in so many seconds, at
            least one; None: all.
        batches: batch sizes.
        repeats: timed runs of each sampler.
        warm_up: whether a run of each sampler goes before the timed ones.
        text: name for `fps_text.make_text_encoder`; None: prompts are embeddings, untimed.
        vae: name for `fps_vae.make_vae`; None: nothing is decoded.
        temporal_factor: pixel frames of a latent frame, after the first, which stands for one.
        checkpoint: folder; None: random weights.
    """

    geometry: str
    num_frames: int
    num_steps: int
    num_diffusion_steps: int
    num_sets: int | None = None
    run_frames: int | None = None
    run_seconds: float | None = None
    batches: tuple[int, ...] = (1, 4)
    repeats: int = 3
    warm_up: bool = True
    text: str | None = None
    vae: str | None = None
    temporal_factor: int = VIDEO_STRIDE
    checkpoint: Path | None = None

    @property
    def pixel_frames(self) -> int:
        """Frames of a whole video."""
        return pixel_frames(self.num_frames, self.temporal_factor)

    @property
    def model_config(self) -> ModelConfig:
        """The config of the model that samples."""
        if self.checkpoint is None:
            return named_config(self.geometry)
        return read_configs(self.checkpoint)[0]

    @property
    def is_part(self) -> bool:
        """Whether only a part of a video is asked for."""
        return self.num_sets is not None or self.run_frames is not None

    @property
    def compared_sets(self) -> int | None:
        """Sets of the first frame on which samplers have to agree; None: all of all frames.

        A trained model, on prompts that mean nothing, makes a rounding error larger from set to
        set, by orders of magnitude within a frame: there only the first ones tell.
        """
        return None if self.checkpoint is None else 2


SMALL = Workload("small-video", 5, 16, num_diffusion_steps=25, vae="tiny")
# The released model is too slow for a CPU: the first sets of a frame, once.
PART_OF_RELEASED = Workload(
    RELEASED_VIDEO,
    DEFAULT_LATENT_FRAMES,
    64,
    num_diffusion_steps=25,
    num_sets=2,
    batches=(1,),
    repeats=1,
    warm_up=False,
    text=PHI_2,
    vae="osp",
)
RELEASED = Workload(
    RELEASED_VIDEO,
    DEFAULT_LATENT_FRAMES,
    64,
    num_diffusion_steps=25,
    run_seconds=10.0,
    batches=(1, 4, 24),
    text=PHI_2,
    vae="osp",
)
KNOWN = {"cpu": (SMALL, PART_OF_RELEASED), "cuda": (SMALL, RELEASED)}
DEFAULTS = {"cpu": (SMALL,), "cuda": (SMALL, RELEASED)}


def choose_workloads(
    device_type: str,
    *,
    geometries: Sequence[str] | None = None,
    model: str | None = None,
    batches: Sequence[int] | None = None,
    text: bool | None = None,
    vae: bool | None = None,
    **numbers: int | None,
) -> list[Workload]:
    """The default workloads of a device, or others, with what is asked for changed.

    Args:
        device_type: "cpu" or "cuda".
        geometries: these alone; any names of `nova.config.NAMED_CONFIGS`.
        model: this one alone: a checkpoint's folder, hub id or "shapes".
        text, vae: time the text encoder, decode as well; None: on a GPU, wherever there is one and
            no part of a video was asked for.
        numbers: num_steps, num_diffusion_steps, num_sets, run_frames, repeats; None: as the
            workload has it.

    Raises:
        InputError: numbers below 1, both a geometry and a model, both sets and frames to run, a
            model that takes no text, a clip of an image model, or a text encoder or VAE that is
            asked for and cannot be timed.
        ConfigError, CheckpointError: no such geometry or model.
    """
    changes: dict[str, Any] = {name: n for name, n in numbers.items() if n is not None}
    if batches is not None:
        changes["batches"] = tuple(batches)
    for name, value in changes.items():
        if min(value if isinstance(value, tuple) else (value,)) < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if changes.keys() >= {"num_sets", "run_frames"}:
        raise InputError("run a number of sets or of latent frames, not both")
    if geometries is not None and model is not None:
        raise InputError("choose geometries or a model, not both")
    if model is not None:
        workloads = [_of_checkpoint(find_folder(model))]
    elif geometries is not None:
        workloads = [_of_geometry(name, device_type) for name in geometries]
    else:
        workloads = list(DEFAULTS[device_type])
    if "run_frames" in changes:
        changes["num_sets"] = None  # in place of a few sets, which a CPU takes by default
    workloads = [replace(workload, **changes) for workload in workloads]
    for workload in workloads:
        check_takes_text(workload.model_config, workload.geometry)
        check_latent_frames(workload.model_config, workload.num_frames)
    for part, is_wanted in (("text", text), ("vae", vae)):
        workloads = [_with_part(workload, part, is_wanted, device_type) for workload in workloads]
    return workloads


def check_latent_frames(config: ModelConfig, num_frames: int) -> None:
    """Check that a model makes so many latent frames.

    Raises:
        InputError: an image model makes one.
    """
    if num_frames > 1 and not config.is_video:
        raise InputError(f"an image model makes one latent frame, not {num_frames}")


def _of_geometry(name: str, device_type: str) -> Workload:
    """A known workload, or one like it: a CPU runs a part of a released geometry."""
    config, (small, released) = named_config(name), KNOWN[device_type]
    template = small if config.image_encoder.embed_dim < 512 else released
    if template.geometry == name:
        return template
    num_frames = min(DEFAULT_LATENT_FRAMES, config.time_base)
    vae = (template.vae or "osp") if config.is_video else IMAGE_VAE
    return replace(
        template,
        geometry=name,
        num_frames=num_frames,
        text=_text_encoder_of(config),
        vae=vae,
    )


def _text_encoder_of(config: ModelConfig) -> str | None:
    widths = {sizes["hidden_size"]: name for name, sizes in SIZES.items()}
    return widths.get(config.text_token_dim)


def _of_checkpoint(folder: Path) -> Workload:
    config, _ = read_configs(folder)
    has_vae = (folder / "vae").is_dir()
    return Workload(
        folder.name,
        min(DEFAULT_LATENT_FRAMES, config.time_base),
        64,
        num_diffusion_steps=25,
        run_seconds=RELEASED.run_seconds,
        text="checkpoint" if (folder / "text_encoder").is_dir() else None,
        vae="checkpoint" if has_vae else None,
        temporal_factor=read_temporal_factor(folder / "vae") if has_vae else VIDEO_STRIDE,
        checkpoint=folder,
    )


def _with_part(workload: Workload, part: str, is_wanted: bool | None, device_type: str) -> Workload:
    """The workload without the text encoder or VAE where it is not to be timed, or cannot be."""
    if is_wanted and getattr(workload, part) is None:
        raise InputError(f"{workload.geometry}: none is known for this model; leave --{part} out")
    by_default = device_type == "cuda" and not workload.is_part
    is_timed = by_default if is_wanted is None else is_wanted
    return workload if is_timed else replace(workload, **{part: None})
