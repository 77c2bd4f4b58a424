"""Checkpoint folders: find them, read and write their files, load weights strictly.

Weights are safetensors. Pickles are refused unless asked for, and then read with `weights_only`.
Nothing from a checkpoint is ever executed.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import CheckpointError, InputError

WEIGHTS_STEM = "diffusion_pytorch_model"
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Checkpoints that come with this package.
EMBEDDED = {"shapes": Path(__file__).parent / "models" / "shapes"}
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")
_MAX_LISTED = 6
_ALIGNMENT = 64  # bytes, of torch's own memory on CPUs


def find_folder(name_or_path: str | os.PathLike, **hub_options: Any) -> Path:
    """A local folder as it is, the downloaded snapshot of a hub id ("owner/name"), or "shapes".

    The model that comes with this package goes before a folder of its name, which is "./shapes".

    Args:
        hub_options: revision, cache_dir, token, local_files_only; `allow_pickle` (bool) lets .bin
            files be downloaded too.

    Raises:
        InputError: another option.
        CheckpointError: neither a folder nor a hub id, or the hub does not give it.
    """
    allow_pickle = hub_options.pop("allow_pickle", False)
    unknown = sorted(hub_options.keys() - set(_HUB_OPTIONS))
    if unknown:
        # As transformers calls it.
        hint = "; torch_dtype is the dtype of the weights" if "dtype" in unknown else ""
        raise InputError(
            f"unknown option {', '.join(unknown)}; those of downloads are "
            f"{', '.join(_HUB_OPTIONS)}{hint}"
        )
    if name_or_path in EMBEDDED:
        return EMBEDDED[name_or_path]
    path = expand_home(name_or_path)
    try:
        is_folder, is_file = path.is_dir(), path.exists()
    except OSError as error:  # too long a name
        raise CheckpointError(f"{name_or_path} is no path: {error}") from None
    if is_folder:
        return path
    if is_file:
        raise CheckpointError(
            f"{path} is a file; give the checkpoint's folder (the one with model_index.json)"
        )
    if not _HUB_ID.fullmatch(str(name_or_path)):
        raise CheckpointError(
            f"{name_or_path} is not a folder; give a checkpoint folder, a hub id such as "
            f"BAAI/nova-d48w1024-osp480, or {', '.join(EMBEDDED)} for the model of this package"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    if allow_pickle:
        patterns.append("*.bin")
    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=patterns, **hub_options))
    except Exception as error:  # the hub client's errors are many: network, name, access, disk
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        reason = reason.rstrip(".")
        raise CheckpointError(
            f"{name_or_path} is not a folder here, and the hub did not give it: {reason}. Check "
            "the name and the network, or download the folder and give its path"
        ) from error


def expand_home(path: str | os.PathLike) -> Path:
    """The path, with a home folder in place of ~.

    Raises:
        CheckpointError: ~ of a user that there is not.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{path} is no path: {error}") from None


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: missing, unreadable, not JSON, or not an object.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is the checkpoint folder complete?") from None
    except (OSError, ValueError) as error:  # the latter, too, for a number of too many digits
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def write_json(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Write an object as JSON, atomically; parent folders are made."""
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    _write_atomically(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def load_state_dict(
    folder: str | os.PathLike,
    stem: str = WEIGHTS_STEM,
    *,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> dict[str, Tensor]:
    """All tensors of a component's folder, from one file or from shards.

    Args:
        stem: file name without suffix.
        variant: such as "fp16" for stem.fp16.safetensors.
        allow_pickle: read .bin files (with torch's weights_only) where there are no safetensors.

    Raises:
        CheckpointError: nothing to load, a shard missing, a truncated or damaged file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing; is the checkpoint folder complete?")
    name = f"{stem}.{variant}" if variant else stem
    files = weight_files(folder, name, "safetensors")
    if files:
        return _merge(load_safetensors(file) for file in files)
    # transformers and diffusers both name their pickles pytorch_model-like; any .bin is one.
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.ckpt")])
    if pickles and allow_pickle:
        files = weight_files(folder, name, "bin") or pickles
        return _merge(_load_pickle(file) for file in files)
    if pickles:
        raise CheckpointError(
            f"{folder} has no {name}.safetensors, only pickles ({pickles[0].name}), which can run "
            "code when opened. Convert it to safetensors, or pass allow_pickle=True "
            "(--allow-pickle) to read its tensors only"
        )
    raise CheckpointError(f"{folder} has no {name}.safetensors; is the download complete?")


def weight_files(folder: Path, name: str, suffix: str) -> list[Path]:
    """The single file, or the shards of an index; [] if there is neither.

    Raises:
        CheckpointError: an index without names of files in its folder, or a shard missing.
    """
    single = folder / f"{name}.{suffix}"
    if single.exists():
        return [single]
    index = folder / f"{name}.{suffix}.index.json"
    if not index.exists():
        return []
    weight_map = read_json(index).get("weight_map")
    is_map = isinstance(weight_map, dict) and weight_map
    if not is_map or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map; download it again")
    shards = sorted(set(weight_map.values()))
    if any(Path(shard).name != shard for shard in shards):
        raise CheckpointError(f"{index} names shards outside its folder; do not trust it")
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise CheckpointError(f"{folder} lacks the shards {missing}; download them again")
    return [folder / shard for shard in shards]


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, which is mapped: values are read when they are used.

    Raises:
        CheckpointError: truncated or damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size:,} bytes) is truncated or damaged: {error}. Download it again"
        ) from None


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in many ways
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} holds more than tensors, or is damaged: {reason}") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} does not hold a state dict of tensors")
    return content


def _merge(parts) -> dict[str, Tensor]:
    return {key: tensor for part in parts for key, tensor in part.items()}


def load_strict(module: nn.Module, state_dict: Mapping[str, Tensor], where: str) -> None:
    """Put every tensor into the module (which may be on the meta device).

    Args:
        where: what the message calls the source, such as the folder.

    Raises:
        CheckpointError: with a report of missing, unexpected and mis-shaped keys, or of tensors
            that are quantised, or hold NaN or infinite values.
    """
    expected = module.state_dict()
    missing = sorted(set(expected) - set(state_dict))
    unexpected = sorted(set(state_dict) - set(expected))
    misshaped = [
        f"{key} {tuple(state_dict[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state_dict and state_dict[key].shape != tensor.shape
    ]
    problems = [
        f"{len(keys)} {kind}: {_listed(keys)}"
        for kind, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("mis-shaped", misshaped),
        )
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"the weights of {where} do not fit its config. " + "; ".join(problems)
        )
    check_dtypes(state_dict, where)
    broken = [
        key
        for key, tensor in state_dict.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if broken:
        raise CheckpointError(
            f"the weights of {where} hold NaN or infinite values in {_listed(broken)}; "
            "download them again, or use an earlier checkpoint of the training"
        )
    aligned = {key: _aligned(tensor) for key, tensor in state_dict.items()}
    module.load_state_dict(aligned, strict=True, assign=True)


def check_dtypes(state_dict: Mapping[str, Tensor], where: str) -> None:
    """Raises CheckpointError for weights in other dtypes than this package computes in.

    Quantised ones, such as int8 or float8, would need their scales.
    """
    others = [f"{k} {t.dtype}" for k, t in state_dict.items() if t.dtype not in WEIGHT_DTYPES]
    if others:
        raise CheckpointError(
            f"the weights of {where} must be float16, bfloat16, float32 or float64, got "
            f"{_listed(others)}; take a checkpoint that is not quantised"
        )


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied unless it starts where torch itself would let it start.

    Tensors of a mapped file start anywhere; some CPU kernels then sum in another order, and results
    would depend on how a checkpoint is laid out.
    """
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_LISTED])
    return shown + (f", and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else "")


def save_state_dict(
    state_dict: Mapping[str, Tensor], folder: str | os.PathLike, stem: str = WEIGHTS_STEM
) -> Path:
    """Write folder/stem.safetensors, atomically; parent folders are made."""
    path = Path(folder) / f"{stem}.safetensors"
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state_dict.items()}
    # diffusers and transformers look for this entry.
    _write_atomically(path, lambda temporary: save_file(tensors, temporary, {"format": "pt"}))
    return path


def _write_atomically(path: Path, write) -> None:
    """Call write(temporary path), then rename: the file is whole or not there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise CheckpointError(f"cannot write to {path.parent}: {error}") from None
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(_shared_file_mode())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:  # a full disk is the latter
        raise CheckpointError(f"cannot write {path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_files(folder: Path, write: Callable[[str], Any]) -> None:
    """Call write(temporary folder), then move its files: each is whole or not there.

    Files of the same names may be links of other checkpoints, or be mapped by the weights that are
    written. Weights of other names go, which would be read in place of the new ones.

    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as temporary:
        write(temporary)
        written = [path for path in Path(temporary).rglob("*") if path.is_file()]
        names = {path.relative_to(temporary) for path in written}
        for path in written:
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(exist_ok=True)
            path.chmod(_shared_file_mode())
            path.replace(target)
    for path in folder.glob("*.safetensors*"):
        if path.relative_to(folder) not in names:
            path.unlink()


def _shared_file_mode() -> int:
    """The mode of ordinary new files; temporary files are private, checkpoints are not."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
