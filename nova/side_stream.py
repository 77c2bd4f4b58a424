"""Work beside the caller's, on a CUDA stream of its own."""

from collections.abc import Callable
from functools import cache
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import DeviceError


class SideStream(Protocol):
    """Runs work in the order of the calls; the caller's own work goes on meanwhile.

    A context manager: when it is left, what the caller does next comes after all of the work.
    """

    def launch(self, work: Callable[[], Any], reads: Tensor) -> Any:
        """Start `work`, behind all that the caller has started so far.

        Args:
            reads: what the work reads of the caller's; the caller may drop it.

        Returns:
            What `finish` takes; not to be used otherwise.
        """

    def finish(self, use: Callable[[Any], Any], launched: Any) -> Any:
        """`use` of what a launched work gives, behind all that was launched here so far.

        It does not wait for what the caller has started since. The result is the caller's.
        """

    def __enter__(self) -> "SideStream": ...

    def __exit__(self, *exc: object) -> None: ...


def side_stream(device: torch.device) -> SideStream:
    """A stream on a GPU.

    Raises:
        DeviceError: `device` is no GPU.
    """
    if device.type != "cuda":
        raise DeviceError(
            f"overlap_decoding needs a GPU, and this pipeline is on {device}; leave it out, or "
            'move the pipeline first: pipe.to("cuda")'
        )
    return CUDASideStream(device)


class CUDASideStream:
    """A CUDA stream beside the current one.

    Launches return before the GPU has done the work; `finish` waits only where `use` does, as by
    copying to the CPU.
    """

    def __init__(self, device: torch.device):
        self._device = device
        index = torch.cuda.current_device() if device.index is None else device.index
        self._stream = _stream_of(index)

    def launch(self, work: Callable[[], Tensor], reads: Tensor) -> Tensor:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        # Its memory is the caller's stream's, which would reuse it as soon as it is dropped.
        reads.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            return work()

    def finish(self, use: Callable[[Tensor], Any], launched: Tensor) -> Any:
        with torch.cuda.stream(self._stream):
            result = use(launched)
        if isinstance(result, Tensor):
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            # The other way round: it belongs to this stream, and the caller is about to read it.
            result.record_stream(current)
        return result

    def __enter__(self) -> "CUDASideStream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Weights may be moved away next, and their memory given to others.
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


@cache
def _stream_of(gpu: int) -> torch.cuda.Stream:
    """The same every time: memory that was freed on a stream serves that stream alone."""
    return torch.cuda.Stream(gpu)
