"""The index of a folder of encoded clips: what was encoded, with what, and into which files."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint import read_json, write_json
from ..errors import CheckpointError

INDEX_NAME = "index.json"
SKIPPED_NAME = "skipped.txt"
_FORMAT = "nova-latents-1"


@dataclass(frozen=True)
class Shard:
    """One finished shard: clips start .. stop - 1 of the source, without those skipped.

    Attributes:
        file: name of the safetensors file, which does not exist for a shard without samples.
        samples: rows in it.
        start, stop: range of the source.
        skipped: [key, reason] of every clip that could not be used.
    """

    file: str
    samples: int
    start: int
    stop: int
    skipped: list[list[str]]

    @property
    def captions_file(self) -> str:
        """JSON file with the captions, in the order of the rows."""
        return f"{Path(self.file).stem}.json"


@dataclass(frozen=True)
class ShardIndex:
    """index.json.

    Attributes:
        settings: source, models and options; a folder is only gone on with under the same.
        latent_shape: (C, T, h, w).
        text_dim: width of the text embeddings; None for class labels.
        scaling_factor, shift_factor: of the VAE.
        shards: finished ones, in the order of the source.
        complete: whether the whole source is encoded.
    """

    settings: dict[str, Any]
    latent_shape: tuple[int, int, int, int]
    text_dim: int | None
    scaling_factor: float
    shift_factor: float
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    @classmethod
    def read(cls, folder: Path) -> "ShardIndex":
        """Read a folder's index.

        Raises:
            CheckpointError: missing, damaged, or of another format.
        """
        content = read_json(folder / INDEX_NAME)
        if content.pop("format", None) != _FORMAT:
            raise CheckpointError(f"{folder / INDEX_NAME} is not of the format {_FORMAT}")
        try:
            content["shards"] = tuple(Shard(**shard) for shard in content["shards"])
            content["latent_shape"] = tuple(content["latent_shape"])
            return cls(**content)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / INDEX_NAME} is damaged: {error}") from None

    def write(self, folder: Path) -> None:
        """Write the index, atomically, and the list of skipped clips beside it."""
        shards = [vars(shard) for shard in self.shards]
        write_json(folder / INDEX_NAME, {"format": _FORMAT, **vars(self), "shards": shards})
        lines = [f"{key}\t{reason}\n" for s in self.shards for key, reason in s.skipped]
        # Names of files need not be UTF-8.
        (folder / SKIPPED_NAME).write_text(
            "".join(lines), encoding="utf-8", errors="backslashreplace"
        )

    def with_shard(self, shard: Shard, complete: bool) -> "ShardIndex":
        """The index after one more finished shard."""
        return replace(self, shards=(*self.shards, shard), complete=complete)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)
