"""The parts of a checkpoint folder in diffusers layout: opening and writing them."""

import os
from pathlib import Path
from typing import Any

import torch

from .altered_layers import uncompiled, weights_to_save
from .checkpoint import (
    expand_home,
    load_state_dict,
    load_strict,
    read_json,
    save_state_dict,
    write_json,
)
from .codec import LatentCodec
from .config import ModelConfig
from .errors import CheckpointError
from .generation_config import GenerationConfig
from .model import NOVATransformer
from .schedule import SchedulerConfig, scheduler_from_dict, scheduler_to_dict
from .text import TextEncoder

LOAD = "load"  # in place of a part: open the folder's
OPTIONAL_PARTS = ("vae", "text_encoder", "tokenizer")
ABSENT = [None, None]  # in place of a part's classes in model_index.json, as diffusers writes it

Parts = tuple[NOVATransformer, SchedulerConfig, LatentCodec | None, TextEncoder | None]


def load_parts(
    folder: Path,
    dtype: torch.dtype,
    *,
    vae: LatentCodec | None | str = LOAD,
    text_encoder: TextEncoder | None | str = LOAD,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> Parts:
    """Open the parts of a folder; see `NOVAPipeline.from_pretrained` for arguments and errors."""
    config, scheduler = read_configs(folder)
    present = optional_parts(folder)
    with torch.device("meta"):
        transformer = NOVATransformer(config)
    weights = load_state_dict(folder / "transformer", variant=variant, allow_pickle=allow_pickle)
    load_strict(transformer, weights, str(folder / "transformer"))
    if vae == LOAD:
        vae = None
        if "vae" in present:
            vae = LatentCodec.load(folder / "vae", dtype, allow_pickle=allow_pickle)
    if text_encoder == LOAD:
        text_encoder = None
        if config.text_token_dim and "text_encoder" in present:
            text_encoder = TextEncoder.from_folders(
                folder / "text_encoder",
                folder / "tokenizer",
                max_length=config.text_token_len,
                torch_dtype=dtype,
                allow_pickle=allow_pickle,
            )
    _check_fit(config, vae, text_encoder)
    return transformer.to(dtype), scheduler, vae, text_encoder


def read_configs(folder: Path) -> tuple[ModelConfig, SchedulerConfig]:
    """What a folder's transformer and scheduler are.

    Raises:
        CheckpointError, ConfigError: what is wrong with which file.
    """
    if not (folder / "transformer").is_dir():
        raise CheckpointError(
            f"{folder} has no transformer/ folder; is it a NOVA checkpoint in diffusers layout?"
        )
    config = ModelConfig.from_dict(read_json(folder / "transformer" / "config.json"))
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    return config, scheduler_from_dict(scheduler)


def save_parts(
    folder: str | os.PathLike,
    transformer: NOVATransformer,
    scheduler: SchedulerConfig,
    vae: LatentCodec | None,
    text_encoder: TextEncoder | None,
    generation_config: GenerationConfig,
) -> None:
    """Write a folder that `load_parts` opens, in the layout of the released ones.

    Raises:
        CheckpointError: a part has layers that no folder could hold; nothing is written then.
    """
    folder = expand_home(folder)
    with torch.device("meta"):
        fresh = NOVATransformer(transformer.config)
    weights = weights_to_save(transformer, fresh, "the transformer")
    for part in (vae, text_encoder):  # before anything is written
        if part is not None:
            part.weights_to_save()
    scheduler_config = scheduler_to_dict(scheduler)
    config = {"_class_name": "NOVATransformer3DModel", **transformer.config.to_dict()}
    write_json(folder / "transformer" / "config.json", config)
    save_state_dict(weights, folder / "transformer")
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config)
    generation_config.write(folder)
    index: dict[str, Any] = {
        "_class_name": "NOVAPipeline",
        "transformer": ["nova", "NOVATransformer3DModel"],
        "scheduler": ["nova", scheduler_config["_class_name"]],
        # The folder may have parts of a pipeline that was saved there before.
        **dict.fromkeys(OPTIONAL_PARTS, ABSENT),
    }
    if vae is not None:
        vae.save(folder / "vae")
        index["vae"] = ["nova", type(uncompiled(vae.module)).__name__]
    if text_encoder is not None:
        text_encoder.save(folder / "text_encoder", folder / "tokenizer")
        index["text_encoder"] = ["transformers", type(uncompiled(text_encoder.module)).__name__]
        index["tokenizer"] = ["transformers", type(text_encoder.tokenizer).__name__]
    # Last: a folder with an index is complete.
    write_json(folder / "model_index.json", index)


def optional_parts(folder: Path) -> set[str]:
    """Optional parts that the folder has: named in model_index.json, and there."""
    present = {name for name in OPTIONAL_PARTS if (folder / name).is_dir()}
    index = folder / "model_index.json"
    if not index.exists():
        return present
    left_out = {name for name, entry in read_json(index).items() if entry in (None, ABSENT)}
    return present - left_out


def _check_fit(
    config: ModelConfig, vae: LatentCodec | None, text_encoder: TextEncoder | None
) -> None:
    if vae is not None and vae.latent_channels != config.image_dim:
        raise CheckpointError(
            f"the VAE has {vae.latent_channels} latent channels, the transformer takes "
            f"{config.image_dim}; these parts do not belong together"
        )
    if text_encoder is not None and text_encoder.hidden_size != config.text_token_dim:
        raise CheckpointError(
            f"the text encoder gives {text_encoder.hidden_size} values a token, the transformer "
            f"takes {config.text_token_dim}; these parts do not belong together"
        )
