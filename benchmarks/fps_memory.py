"""Peak memory of samplers that take turns in one process and keep some of it, as CUDA graphs do."""

from collections.abc import Iterator
from contextlib import contextmanager

from measure import PeakBytes, held_bytes
from torch import device as Device


class SamplerMemory:
    """The most memory that a sampler takes, what it keeps between its runs included.

    On a GPU what other samplers keep does not count; on a CPU the peak is that of the process.

    Args:
        shared_bytes: allocated before the first sampler ran, such as weights; all of them need it.

    Attributes:
        peak_bytes: so far.
    """

    def __init__(self, device: Device, shared_bytes: int):
        self.peak_bytes = 0
        self._device, self._shared_bytes, self._kept_bytes = device, shared_bytes, 0

    @contextmanager
    def run(self) -> Iterator[None]:
        """A run of the sampler happens inside."""
        before = held_bytes(self._device)
        of_others = before - self._shared_bytes - self._kept_bytes
        peak = PeakBytes(self._device)
        try:
            yield
        finally:
            self.peak_bytes = max(self.peak_bytes, peak.read() - of_others)
            self._kept_bytes += held_bytes(self._device) - before
