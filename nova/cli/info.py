"""`nova info`: geometry and size of a checkpoint, from configs and the headers of its weights."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..checkpoint import find_folder, read_json
from ..config import ModelConfig
from ..errors import CheckpointError
from ..folders import read_configs
from ..schedule import scheduler_to_dict

PARTS = ("transformer", "vae", "text_encoder")


def describe(name_or_path: str) -> dict[str, Any]:
    """What is in a checkpoint folder, as a dictionary that JSON can hold.

    Args:
        name_or_path: a folder, or a hub id that has been downloaded already.

    Raises:
        CheckpointError, ConfigError: what is wrong with which file.
    """
    folder = find_folder(name_or_path, local_files_only=True)
    config, scheduler = read_configs(folder)
    counts = {part: count_parameters(folder / part) for part in PARTS if (folder / part).is_dir()}
    return {
        "folder": str(folder),
        "task": _task(config),
        "geometry": config.to_dict(),
        "latent_shape": list(config.latent_shape),
        "image_tokens": config.num_image_tokens,
        "frame_tokens": config.num_frame_tokens,
        "scheduler": scheduler_to_dict(scheduler),
        "vae": _class_name(folder / "vae", "_class_name"),
        "text_encoder": _class_name(folder / "text_encoder", "model_type"),
        "parameters": {part: sum(count.values()) for part, count in counts.items()},
        "transformer_parameters": dict(counts["transformer"]),
    }


def _task(config: ModelConfig) -> str:
    condition = "class" if config.text_token_dim is None else "text"
    return f"{condition} to {'video' if config.is_video else 'image'}"


def _class_name(folder: Path, key: str) -> str | None:
    """What a part's config.json says it is; None without the part."""
    return str(read_json(folder / "config.json").get(key)) if folder.is_dir() else None


def count_parameters(folder: Path) -> Counter[str]:
    """Parameters in a folder's safetensors files, by the first part of their names.

    Raises:
        CheckpointError: a file is damaged.
    """
    counts: Counter[str] = Counter()
    seen = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    # Variants, such as fp16 files, hold the same names again.
                    if name not in seen:
                        seen.add(name)
                        shape = file.get_slice(name).get_shape()
                        counts[name.partition(".")[0]] += math.prod(shape)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is truncated or damaged: {error}. Download it again"
            ) from None
    return counts


def print_description(description: dict[str, Any]) -> None:
    """Print what `describe` found as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, title=Text(description["folder"]), title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _rows(description):
        table.add_row(name, Text(value))
    Console().print(table)


def _rows(description: dict[str, Any]) -> list[tuple[str, str]]:
    geometry = description["geometry"]
    rows = [
        ("task", description["task"]),
        ("pixels", " x ".join(map(str, geometry["image_size"]))),
        ("latent frame", " x ".join(map(str, description["latent_shape"]))),
        (
            "tokens a frame",
            f"{description['image_tokens']} image, {description['frame_tokens']} frame",
        ),
        ("time base", f"{geometry['video_base_size'][0]} latent frames"),
        ("positions", "rotary" if geometry["rotary_pos_embed"] else "absolute"),
        ("scheduler", description["scheduler"]["_class_name"]),
        ("VAE", description["vae"] or "none"),
        ("text encoder", description["text_encoder"] or "none"),
    ]
    parts = {
        **description["parameters"],
        **{f"  {k}": n for k, n in description["transformer_parameters"].items()},
    }
    return rows + [(f"{name} parameters", f"{count:,}") for name, count in parts.items()]
