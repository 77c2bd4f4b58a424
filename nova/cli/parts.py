"""What the training commands start from: encoders of a checkpoint, models released or fresh."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..checkpoint import find_folder, read_json
from ..codec import LatentCodec
from ..config import NAMED_CONFIGS, ModelConfig, named_config
from ..devices import out_of_memory
from ..errors import CheckpointError, InputError
from ..folders import read_configs
from ..generation_config import GenerationConfig
from ..model import NOVATransformer
from ..pipeline import NOVAPipeline
from ..schedule import DDPMConfig, FlowMatchConfig, SchedulerConfig
from ..text import TextEncoder
from ..training.checkpoints import FrozenParts
from ..training.initialization import new_model, new_vae
from ..vae import CausalVideoVAE, VAEConfig

READS_PROMPTS = ("text_embed.", "video_encoder.")  # parameters that depend on the text encoder


@dataclass(frozen=True)
class TrainedModel:
    """What `nova train` trains, and what its checkpoints carry along."""

    model: NOVATransformer
    scheduler: SchedulerConfig
    parts: FrozenParts

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def load_encoders(
    model: str | None,
    vae: Path | None,
    text_encoder: Path | None,
    text_length: int,
    device: torch.device,
    precision: str = "float32",
) -> tuple[LatentCodec, TextEncoder | None, tuple[int, int] | None]:
    """VAE, text encoder and image size for `nova encode`.

    Args:
        model: a checkpoint that has all of them, or None for the folders.
        text_length: tokens of a caption, at most.
        precision: what the VAE computes in, "float32" or "bfloat16".

    Returns:
        The parts on the device, the text encoder only where captions are wanted, and the model's
        (height, width), None without a model.

    Raises:
        CheckpointError, ConfigError: what is wrong with which file.
    """
    size = None
    if model is not None:
        folder = find_folder(model)
        config, _ = read_configs(folder)
        vae, size = folder / "vae", config.image_size
        if config.text_token_dim:
            text_encoder = text_encoder or folder
            text_length = config.text_token_len
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    codec = LatentCodec.load(vae, getattr(torch, precision))
    encoder = None
    if text_encoder is not None:
        folders = text_encoder / "text_encoder", text_encoder / "tokenizer"
        encoder = TextEncoder.from_folders(*folders, max_length=text_length, torch_dtype=dtype)
    with out_of_memory("moving the encoders", "--precision bfloat16", for_pipelines=False):
        codec.module.to(device)
        if encoder is not None:
            encoder.module.to(device)
    return codec, encoder, size


def released_model(
    name_or_path: str, text_encoder: Path | None = None, seed: int = 0
) -> TrainedModel:
    """A checkpoint to fine-tune: its transformer and scheduler, the rest carried along.

    Args:
        text_encoder: folder with text_encoder/ and tokenizer/, in place of the checkpoint's. The
            parts that read prompts then start anew, from `seed`: the others stay.

    Raises:
        InputError: a text encoder for a model of class labels.
        CheckpointError, ConfigError: what is wrong with which file.
    """
    folder = find_folder(name_or_path)
    pipeline = NOVAPipeline.from_pretrained(folder, text_encoder=None, vae=None)
    model, parts = pipeline.transformer, FrozenParts.of(folder)
    if text_encoder is not None:
        model = _with_new_text(model, text_encoder, seed)
        parts = _carried(parts.folders.get("vae"), text_encoder, parts.generation_config)
    return TrainedModel(model, pipeline.scheduler, parts)


def _carried(
    vae: Path | None, text_encoder: Path | None, recommended: GenerationConfig | None = None
) -> FrozenParts:
    """`text_encoder` is the parent of text_encoder/ and tokenizer/."""
    if text_encoder is None:
        return FrozenParts(vae, generation_config=recommended)
    folders = text_encoder / "text_encoder", text_encoder / "tokenizer"
    return FrozenParts(vae, *folders, recommended)


def _with_new_text(model: NOVATransformer, text_encoder: Path, seed: int) -> NOVATransformer:
    """A float32 copy whose parts that read prompts have fresh weights for another text encoder.

    A video encoder that has learned one text encoder takes up another very slowly.
    """
    if not model.config.text_token_dim:
        raise InputError("--text-encoder: this model takes class labels, not prompts")
    path = text_encoder / "text_encoder" / "config.json"
    width = read_json(path).get("hidden_size")
    if not isinstance(width, int):
        raise CheckpointError(f"{path} has no hidden_size; it is no text encoder's config")
    renewed = new_model(replace(model.config, text_token_dim=width), seed)
    kept = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith(READS_PROMPTS)
    }
    renewed.load_state_dict(kept, strict=False)
    return renewed


def fresh_model(
    config: str, vae: Path | None, text_encoder: Path | None, *, ddpm: bool, seed: int
) -> TrainedModel:
    """A model with fresh weights.

    Args:
        config: a named size, or a transformer's config.json.
        vae: its folder.
        text_encoder: folder with text_encoder/ and tokenizer/.
        ddpm: diffusion with epsilon as target, in place of flow matching.

    Raises:
        InputError: neither a named size nor a file.
        CheckpointError, ConfigError: what is wrong with which file.
    """
    if config in NAMED_CONFIGS:
        model_config = named_config(config)
    elif Path(config).is_file():
        model_config = ModelConfig.from_dict(read_json(config))
    else:
        raise InputError(
            f"{config} is neither a file nor one of the sizes {', '.join(NAMED_CONFIGS)}"
        )
    parts = _carried(vae, text_encoder)
    scheduler = DDPMConfig() if ddpm else FlowMatchConfig()
    return TrainedModel(new_model(model_config, seed), scheduler, parts)


def open_vae(config: str | None, folder: Path | None, seed: int) -> CausalVideoVAE:
    """A VAE to train: fresh of a config ("tiny", "osp" or a file), or a folder's.

    Raises:
        InputError: no such config, or a folder with an image VAE.
        CheckpointError, ConfigError: what is wrong with which file.
    """
    if folder is not None:
        codec = LatentCodec.load(folder, torch.float32)
        if not codec.is_video:
            raise InputError(f"{folder} holds an image VAE; only video VAEs are trained here")
        return codec.module
    if config in ("tiny", "osp"):
        return new_vae(VAEConfig.tiny() if config == "tiny" else VAEConfig.osp(), seed)
    if not Path(config).is_file():
        raise InputError(f"{config} is neither a file nor one of tiny, osp")
    return new_vae(VAEConfig.from_dict(read_json(config)), seed)
