"""Samples read by this process or by others beside it, with errors as they were raised."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset

from ..errors import DeviceError, NovaError

# What torch's messages have in them about a process that is no longer there, or tensors for which
# there was no shared memory.
_FAILURES = ("DataLoader worker (pid", "</torch_")
# Errors that are carried from one process to the other.
_CARRIED = (NovaError, MemoryError)


def load(
    dataset: Dataset, workers: int, collate: Callable[[Any], Any], **options: Any
) -> Iterator[Any]:
    """Batches of a data set.

    Args:
        workers: processes that read; 0: this one.
        collate: makes a batch of samples.
        options: of torch's `DataLoader`.

    Raises:
        NovaError, MemoryError: what reading a sample raised, in whichever process.
    """
    loader = DataLoader(
        _WithErrors(dataset), num_workers=workers, collate_fn=_Collate(collate), **options
    )
    for batch in loader:
        if isinstance(batch, _CARRIED):
            raise batch
        yield batch


@contextmanager
def worker_failures() -> Iterator[None]:
    """Turn torch's errors inside, where a process that reads has failed, into a `DeviceError`.

    Of one that has ended, torch tells wherever the process that it reads for happens to be.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(message in str(error) for message in _FAILURES):
            raise
        reason = str(error).strip().splitlines()[-1]  # behind a traceback
        raise DeviceError(
            f"a process that reads data has failed ({reason}); perhaps memory is short, or shared "
            "memory (/dev/shm). Use fewer workers (--workers), or 0"
        ) from error


class _WithErrors(Dataset):
    """A data set whose samples may be errors.

    Of one that a worker process raises, torch makes another whose message is a traceback.
    """

    def __init__(self, dataset: Dataset):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self._dataset[index]
        except _CARRIED as error:
            return error


@dataclass(frozen=True)
class _Collate:
    """Makes a batch of samples, unless one is an error; then that."""

    collate: Callable[[Any], Any]

    def __call__(self, samples: Any) -> Any:
        for sample in samples if isinstance(samples, list) else [samples]:
            if isinstance(sample, _CARRIED):
                return sample
        return self.collate(samples)
