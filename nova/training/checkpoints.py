"""Checkpoint folders of a run: whole or not there, the newest few kept."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint import read_json, write_json
from ..errors import CheckpointError
from ..folders import optional_parts
from ..generation_config import GenerationConfig

_PARTIAL = ".partial-"


class Checkpoints:
    """out/checkpoints: folders step-00001000, named by the steps done.

    Args:
        folder: of the run.
        keep: so many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder / "checkpoints"
        self.keep = keep

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first; folders of other names are the user's own."""
        found = [path for path in self.folder.glob("step-*") if path.is_dir()]
        named = [path for path in found if re.fullmatch(r"step-[0-9]{8,}", path.name)]
        return sorted(named, key=lambda path: int(path.name.removeprefix("step-")))

    def latest(self) -> Path | None:
        """The newest complete checkpoint; None: there is none."""
        found = self.all()
        return found[-1] if found else None

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or will be."""
        return self.folder / f"step-{step:08d}"

    def clean(self) -> None:
        """Remove what a killed run has left half written or half removed."""
        for path in self.folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(path)

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A new folder to write into; it gets its name when all has gone well."""
        target = self.path(step)
        partial = self.folder / f"{_PARTIAL}{target.name}"
        try:
            self.clean()
            partial.mkdir(parents=True)
            yield partial
            partial.rename(target)
        except OSError as error:
            raise CheckpointError(f"{target} cannot be written: {error}") from error
        finally:
            # Still there after an error or Ctrl-C only, on a disk that may be full.
            shutil.rmtree(partial, ignore_errors=True)
        for path in self.all()[: -self.keep]:
            # A folder that is half removed must not look whole.
            leaving = path.rename(path.with_name(f"{_PARTIAL}{path.name}"))
            shutil.rmtree(leaving)


class FrozenParts:
    """What a checkpoint carries along unchanged: VAE, text encoder, tokenizer, recommendations.

    After the first checkpoint, parts come from the one before: the folders given may be of an older
    checkpoint of the run, which goes when it is not among the newest any more.

    Args:
        vae, text_encoder, tokenizer: folders in diffusers' layout, or None.
        generation_config: what checkpoints recommend for sampling; None: the reference's values.

    Raises:
        CheckpointError: no such folder, an empty one, or one with a damaged configuration.
    """

    def __init__(
        self,
        vae: Path | None = None,
        text_encoder: Path | None = None,
        tokenizer: Path | None = None,
        generation_config: GenerationConfig | None = None,
    ):
        self.generation_config = generation_config or GenerationConfig()
        named = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
        # Absolute: the script that trains may go to another folder between two checkpoints.
        self.folders = {
            name: Path(path).absolute() for name, path in named.items() if path is not None
        }
        missing = [str(path) for path in self.folders.values() if not path.is_dir()]
        if missing:
            raise CheckpointError(f"{', '.join(missing)} is not a folder")
        # Read at once: what is damaged would otherwise be found when the first checkpoint is due.
        self._classes = {name: _class_of(path) for name, path in self.folders.items()}
        self._files = {name: _files_in(path) for name, path in self.folders.items()}
        empty = [str(self.folders[name]) for name, files in self._files.items() if not files]
        if empty:
            raise CheckpointError(f"{', '.join(empty)} is an empty folder")
        self._linked: Path | None = None  # the checkpoint that has the parts last

    @classmethod
    def of(cls, folder: Path) -> "FrozenParts":
        """Those that a checkpoint folder has."""
        found = {name: folder / name for name in optional_parts(folder)}
        return cls(**found, generation_config=GenerationConfig.read(folder))

    def link_into(self, folder: Path) -> None:
        """Put the parts into a checkpoint folder and its model_index.json.

        Hard links where the file system has them: a text encoder may be larger than the model.

        Raises:
            CheckpointError: files of a part are gone.
        """
        index = read_json(folder / "model_index.json")
        for name in self.folders:
            source = self._source(name)
            for file in self._files[name]:
                target = folder / name / file
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(source / file, target)
            library = "nova" if name == "vae" else "transformers"
            index[name] = [library, self._classes[name]]
        write_json(folder / "model_index.json", index)
        # By the name that it has when the next one is written.
        self._linked = folder.absolute().with_name(folder.name.removeprefix(_PARTIAL))

    def _source(self, name: str) -> Path:
        """The folder to take a part from, with all its files."""
        given = self.folders[name]
        sources = [given] if self._linked is None else [self._linked / name, given]
        for source in sources:
            if all((source / file).is_file() for file in self._files[name]):
                return source
        raise CheckpointError(
            f"{given} lacks files that it had when the training began; put them back, and go on "
            "with --resume (resume=True)"
        )


def _link(source: Path, target: Path) -> None:
    try:
        # The hub's cache has symbolic links, which would point nowhere from here.
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _files_in(folder: Path) -> list[Path]:
    """All files, relative to the folder."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def _class_of(folder: Path) -> str | None:
    """The class that a part's configuration names."""
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config = read_json(folder / name)
            architectures = config.get("architectures") or [None]
            return config.get("_class_name") or architectures[0] or config.get("tokenizer_class")
    return None
