"""Measuring how fast a run is."""

import time


class Stopwatch:
    """Rate of work between calls, without the time of checkpoints and contact sheets."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def rate(self, amount: float) -> float:
        """amount a second since the last call or skip."""
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return amount / max(elapsed, 1e-9)

    def skip(self) -> None:
        """Leave out the time up to now."""
        self._last = time.perf_counter()
