"""Clips -> text embeddings and VAE posteriors in shards, once, so that training sees no pixels."""

import hashlib
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..altered_layers import named_weights
from ..checkpoint import expand_home, save_state_dict, write_json
from ..codec import LatentCodec
from ..devices import out_of_memory
from ..errors import InputError, NovaError
from ..numeric import check_multiples, checked_count
from ..output_folder import make_output_folder
from ..text import TextEncoder
from .clips import Clip, ClipSource
from .loading import load, worker_failures
from .shard_tensors import ShardTensors
from .shards import INDEX_NAME, SKIPPED_NAME, Shard, ShardIndex

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# What a fingerprint begins with, but in older folders.
_HASH = "sha256:"

# What helps where memory is short.
_LESS_MEMORY = "a smaller batch_size (--batch-size)", "a VAE in bfloat16 (--precision bfloat16)"


@torch.no_grad()
@out_of_memory("encoding", *_LESS_MEMORY, for_pipelines=False)
@worker_failures()
def encode_clips(
    source: ClipSource,
    folder: str | os.PathLike,
    codec: LatentCodec,
    text_encoder: TextEncoder | None = None,
    *,
    shard_size: int = 256,
    batch_size: int = 1,
    dtype: str = "float16",
    workers: int = 0,
    show_progress: bool = True,
) -> ShardIndex:
    """Encode a source into a folder that `LatentDataset` reads.

    A shard appears when it is finished; called again, the function goes on after the last one.
    Clips that cannot be read are left out and listed, with the reason, in skipped.txt.

    Args:
        codec: its device and dtype are used; moments are stored unscaled.
        text_encoder: for captions; None for a source of class labels.
        shard_size: clips of a shard, the unit of resuming.
        batch_size: clips that go through the VAE at a time.
        dtype: "float16", "bfloat16" or "float32", what moments and embeddings are stored in.
        workers: processes that read clips; 0: this one.

    Returns:
        The finished index.

    Raises:
        InputError: an argument of another type or out of range, the folder holds data of other
            settings, no clip can be used, captions without a text encoder, or values that do not
            fit `dtype`.
        MediaError: the folder cannot be made, or not be written into.
        CheckpointError: a file cannot be written, or the index is damaged.
        DeviceError: memory is short, or a process that reads clips was lost. What was finished
            stays.
    """
    shard_size = checked_count("shard_size", shard_size, least=1)
    batch_size = checked_count("batch_size", batch_size, least=1)
    workers = checked_count("workers", workers, least=0)
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} must be one of {list(DTYPES)}")
    folder = expand_home(folder)
    index = _open_index(source, folder, codec, text_encoder, shard_size, dtype)
    if not index.complete:
        make_output_folder(folder)
    start = index.shards[-1].stop if index.shards else 0
    clips = _read_clips(source, start, workers)
    progress = tqdm(
        total=len(source), initial=start, desc="encode", unit="clip", disable=not show_progress
    )
    with progress:
        while not index.complete:
            stop = min(start + shard_size, len(source))
            content = ShardTensors(codec, text_encoder, batch_size, DTYPES[dtype])
            skipped: list[list[str]] = []
            for clip in islice(clips, stop - start):
                # Reasons may have line breaks, the report has one line a clip.
                if isinstance(clip, Clip):
                    _check_condition(clip, text_encoder)
                    content.add(clip)
                else:
                    skipped.append([" ".join(part.split()) for part in clip])
                progress.update()
            file = f"shard-{len(index.shards):05d}.safetensors"
            shard = Shard(file, len(content), start, stop, skipped)
            if len(content):
                tensors = content.finish()
                write_json(folder / shard.captions_file, {"captions": content.captions})
                save_state_dict(tensors, folder, Path(file).stem)
            index = index.with_shard(shard, complete=stop == len(source))
            # Last: what the index names is there.
            index.write(folder)
            start = stop
    if not index.samples:
        raise InputError(f"no clip could be used; {folder / SKIPPED_NAME} says why")
    return index


def _open_index(
    source: ClipSource,
    folder: Path,
    codec: LatentCodec,
    text_encoder: TextEncoder | None,
    shard_size: int,
    dtype: str,
) -> ShardIndex:
    """The folder's index, or a new one."""
    settings = {
        "source": source.describe(),
        "vae": fingerprint(codec.module),
        "text_encoder": fingerprint(text_encoder.module) if text_encoder else None,
        "text_length": text_encoder.max_length if text_encoder else None,
        "shard_size": shard_size,
        "dtype": dtype,
    }
    if (folder / INDEX_NAME).exists():
        index = ShardIndex.read(folder)
        for key, part in (("vae", codec), ("text_encoder", text_encoder)):
            recorded = index.settings.get(key)
            if part is not None and not str(recorded).startswith(_HASH):
                settings[key] = fingerprint(part.module, by_sums=True)
        # Older folders do not say their text_length, nor the contents of their source.
        known = settings.keys() & index.settings.keys()
        changed = sorted(key for key in known if _differ(index.settings[key], settings[key]))
        if changed:
            # A source's description says the format of its clips too.
            changed = [name if name != "source" else "source or format" for name in changed]
            raise InputError(
                f"{folder} holds data made with another {', '.join(changed)}; choose another "
                "folder, or delete this one"
            )
        return index
    wanted, factor = source.format, codec.spatial_factor
    length = 1 + (wanted.num_frames - 1) // codec.temporal_factor
    if wanted.num_frames > 1 and not codec.is_video:
        raise InputError("an image VAE encodes images: num_frames must be 1")
    check_multiples(wanted.height, wanted.width, factor)
    return ShardIndex(
        settings=settings,
        latent_shape=(
            codec.latent_channels,
            length,
            wanted.height // factor,
            wanted.width // factor,
        ),
        text_dim=text_encoder.hidden_size if text_encoder else None,
        scaling_factor=codec.scaling_factor,
        shift_factor=codec.shift_factor,
    )


def _differ(recorded: Any, given: Any) -> bool:
    """Whether a setting is another one; what was not recorded counts as the same."""
    if isinstance(recorded, dict) and isinstance(given, dict):
        given = {key: value for key, value in given.items() if key in recorded}
    return recorded != given


def fingerprint(module: nn.Module, *, by_sums: bool = False) -> str:
    """A text that differs between weights that differ.

    Args:
        by_sums: as in older folders; it may differ with the number of threads, too.
    """
    digest = hashlib.sha256()
    for name, tensor in named_weights(module).items():
        # On the CPU: MPS has no float64, and other devices add up in another order.
        values = tensor.detach().cpu()
        if by_sums:
            digest.update(f"{name} {tuple(values.shape)} {values.double().sum().item()}".encode())
        else:
            digest.update(f"{name} {tuple(values.shape)} ".encode())
            # In one dtype: weights of half precision may be opened in it, or in float32.
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            digest.update(values.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16] if by_sums else _HASH + digest.hexdigest()


class _Readable(Dataset):
    """A source whose unreadable clips are [key, reason]."""

    def __init__(self, source: ClipSource, start: int):
        self._source, self._start = source, start

    def __len__(self) -> int:
        return len(self._source) - self._start

    def __getitem__(self, index: int) -> Clip | list[str]:
        number = self._start + index
        try:
            return self._source[number]
        except NovaError as error:
            # Without an optional library nothing can be read.
            if isinstance(error, ImportError):
                raise
            return [f"clip {number}", str(error)]


def _read_clips(source: ClipSource, start: int, workers: int) -> Iterator[Clip | list[str]]:
    if start == len(source):
        return iter(())
    return load(_Readable(source, start), workers, _as_it_is, batch_size=None)


def _as_it_is(clip: Any) -> Any:
    return clip


def _check_condition(clip: Clip, text_encoder: TextEncoder | None) -> None:
    """Before the VAE, which takes long: whether the clip has what it is encoded with."""
    if text_encoder is None and clip.label is None:
        raise InputError(
            f"{clip.key}: clips with captions need a text encoder; give text_encoder "
            "(--text-encoder)"
        )
    if text_encoder is not None and clip.caption is None:
        raise InputError(
            f"{clip.key}: clips with class labels alone take no text encoder; leave text_encoder "
            "(--text-encoder) out, and --model if it reads prompts (--vae in its place)"
        )
