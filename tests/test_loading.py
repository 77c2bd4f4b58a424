"""Reading samples in processes beside this one: the same batches and the same errors."""

import os
import signal

import pytest
import torch
from torch.utils.data import Dataset, default_collate

from nova.data.loading import load, worker_failures
from nova.errors import DependencyError, DeviceError, MediaError

WORKERS = pytest.mark.parametrize("workers", [0, 2])


class Numbers(Dataset):
    """Of 0 to 7, one of which may raise an error, or end the process that asks for it."""

    def __init__(self, error=None, deadly=None):
        self.error, self.deadly = error, deadly

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5 and self.error is not None:
            raise self.error
        if index == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(index)


def read(dataset, workers):
    return [batch.tolist() for batch in load(dataset, workers, default_collate, batch_size=2)]


@WORKERS
def test_batches(workers):
    assert read(Numbers(), workers) == [[0, 1], [2, 3], [4, 5], [6, 7]]


@WORKERS
def test_samples_one_by_one(workers):
    assert list(load(Numbers(), workers, int, batch_size=None)) == list(range(8))


@WORKERS
@pytest.mark.parametrize(
    "error",
    [MediaError("x.mp4 is damaged"), DependencyError("pip install it"), MemoryError("short")],
)
def test_errors(error, workers):
    """They arrive as they are, and what is before them is read."""
    batches = load(Numbers(error), workers, default_collate, batch_size=2)
    assert [next(batches).tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(type(error)) as caught:
        next(batches)
    assert str(caught.value) == str(error)


def test_bugs_are_no_errors_of_the_data():
    with pytest.raises(KeyError, match="a bug"):
        read(Numbers(KeyError("a bug")), workers=0)


def test_lost_processes():
    with pytest.raises(DeviceError, match=r"has failed \(DataLoader worker.*Use fewer workers"):
        with worker_failures():
            read(Numbers(deadly=3), workers=1)


def test_short_shared_memory():
    error = RuntimeError(
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:\n  File ...\n"
        "RuntimeError: unable to write to file </torch_7_8_0>: No space left on device (28)\n"
    )
    message = r"has failed \(RuntimeError: unable to write to file .*\(28\)\); perhaps memory"
    with pytest.raises(DeviceError, match=message), worker_failures():
        raise error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="^something else$"), worker_failures():
        raise RuntimeError("something else")
