"""What a measurement found, in memory and in the user's cache folder."""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import expand_home, read_json, write_json
from ..errors import CheckpointError

VARIABLE = "NOVA_CACHE"
LISTS = ("measurements", "stages")


class TuningWarning(UserWarning):
    """What was measured is not kept."""


@dataclass(frozen=True)
class Measurement:
    """How the candidates of one choice did.

    Attributes:
        choice: its name.
        chosen: a candidate.
        seconds: that the stage of a step takes with each candidate.
        refused: candidates that cannot compute it, or compute something else, and why.
    """

    choice: str
    chosen: str
    seconds: Mapping[str, float]
    refused: Mapping[str, str]

    def __str__(self) -> str:
        by_time = sorted(self.seconds.items(), key=lambda entry: entry[1])
        others = [f"{name} {s * 1e3:.3g} ms" for name, s in by_time]
        others += [f"{name}: {reason}" for name, reason in self.refused.items()]
        return f"{self.choice}: {self.chosen} ({'; '.join(others)})"


@dataclass(frozen=True)
class TuningRecord:
    """All measurements for one model on one machine.

    Attributes:
        facts: what they hold for: card, versions, geometry, sizes, candidates.
        stages: parts of a step with what was chosen for them all together, where that is not what
            runs by default.
    """

    facts: Mapping[str, Any]
    measurements: tuple[Measurement, ...]
    stages: tuple[Measurement, ...]

    def __str__(self) -> str:
        facts = self.facts
        first = f"tuned for batch {facts['batch_size']}, {facts['dtype']}, on {facts['device']}"
        return "\n".join([first, *(f"  {m}" for m in (*self.measurements, *self.stages))])


def cache_folder() -> Path:
    """Where records are kept: $NOVA_CACHE, else nova-kernels in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        CheckpointError: ~ of a user who has no home folder.
    """
    if os.environ.get(VARIABLE):
        return expand_home(os.environ[VARIABLE])
    return expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "nova-kernels"


def load_record(facts: Mapping[str, Any]) -> TuningRecord | None:
    """The record for these facts; None: there is none that can be read."""
    try:
        content = read_json(_path(facts))
        measurements, stages = (tuple(map(_read_measurement, content[key])) for key in LISTS)
        chosen = {entry.choice: entry.chosen for entry in measurements}
        fits = content["facts"] == facts and chosen.keys() == facts["choices"].keys()
    except (CheckpointError, KeyError, TypeError, RecursionError):  # the last: deeply nested
        return None
    if not fits or any(chosen[name] not in names for name, names in facts["choices"].items()):
        return None
    return TuningRecord(facts, measurements, stages)


def _read_measurement(entry: Any) -> Measurement:
    """A measurement of a file, which may hold anything.

    Raises:
        TypeError: it is none.
    """
    measurement = Measurement(**entry)
    for values, kind in ((measurement.seconds, float), (measurement.refused, str)):
        if not isinstance(values, dict) or not all(type(v) is kind for v in values.values()):
            raise TypeError(f"{values} are not {kind.__name__} by name")
    return measurement


def save_record(record: TuningRecord) -> None:
    """Keep it for the next process; if that fails, a warning says so."""
    lists = {key: [asdict(m) for m in getattr(record, key)] for key in LISTS}
    content = {"facts": record.facts, **lists}
    try:
        write_json(_path(record.facts), content)
    except CheckpointError as error:
        warnings.warn(
            f"the tuning is not kept for the next run: {error}; set {VARIABLE} to a folder that "
            "can be written",
            TuningWarning,
            stacklevel=2,
        )


def _path(facts: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "tuning" / f"{digest[:16]}.json"
