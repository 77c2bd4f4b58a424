"""A batch in parts, one after the other, and in smaller ones where memory is short."""

import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

from .devices import is_out_of_memory

Result = TypeVar("Result")


class BatchSplitWarning(UserWarning):
    """Memory was short, and a batch went on in smaller parts than asked for."""


class BatchParts:
    """A batch that is worked on part after part.

    A part that does not fit into memory is halved and tried again; those behind it are as small
    from the start. A warning then says which size worked.

    Args:
        batch_size: samples in all.
        max_size: samples at a time, at most; None: all.
        doing: what the work is, for the warning: "sampling".
        advice: how to ask for fewer samples from the start, for the warning; "{size}" in it stands
            for the number.
        free_memory: called after an attempt that failed, when nothing refers to its tensors any
            more.

    Attributes:
        size: samples at a time from here on, at most.
    """

    def __init__(
        self,
        batch_size: int,
        max_size: int | None,
        *,
        doing: str,
        advice: str,
        free_memory: Callable[[], None],
    ):
        self.size = batch_size if max_size is None else min(max_size, batch_size)
        self._batch_size = batch_size
        self._doing, self._advice = doing, advice
        self._free_memory = free_memory

    def run(self, work: Callable[[int, int], Result]) -> Iterator[Result]:
        """The results of all parts, in order.

        Args:
            work: called as work(start, stop) for samples start .. stop - 1. It is called again with
                a smaller `stop` where it ran out of memory, so it must not change what it reads.

        Raises:
            RuntimeError: torch's, if memory does not suffice for a single sample.
        """
        start, too_many = 0, None
        while start < self._batch_size:
            count = min(self.size, self._batch_size - start)
            try:
                result = work(start, start + count)
                fits = True
            except RuntimeError as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
                fits = False
            if not fits:
                # Only here is the error gone, whose traceback refers to the attempt's tensors.
                self._free_memory()
                too_many = too_many or count
                self.size = (count + 1) // 2
                continue
            if too_many is not None:
                self._warn(too_many)
                too_many = None
            yield result
            start += count

    def _warn(self, too_many: int) -> None:
        warnings.warn(
            f"out of memory while {self._doing} {too_many} samples at a time; {self.size} at a "
            f"time fit. {self._advice.format(size=self.size)}",
            BatchSplitWarning,
            stacklevel=3,
        )
