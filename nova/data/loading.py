"""Samples read by this process or by others beside it, with errors as they were raised."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import parent_process
from threading import Thread
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
        _WithErrors(dataset),
        num_workers=workers,
        collate_fn=_Collate(collate),
        worker_init_fn=partial(_start_worker, options.pop("worker_init_fn", None)),
        **options,
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


def _start_worker(then: Callable[[int], Any] | None, worker: int) -> None:
    Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if then is not None:
        then(worker)


def _end_with(parent: int) -> None:
    """End this worker process soon after the main one, whatever ended that.

    torch looks for it between samples alone, which is never where the pipe to it is full.
    """
    # Forked processes may keep the pipe open that is_alive() asks; a fork server, itself the
    # parent, outlives the main process.
    while os.getppid() == parent and parent_process().is_alive():
        time.sleep(1)
    os._exit(1)


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
