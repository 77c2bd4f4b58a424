"""Noticing that a training has gone wrong, before its weights are of no use."""

import math
from collections import deque
from statistics import median

from ..errors import NovaError

WINDOW = 100  # losses that the median is taken of
ENOUGH = 20  # losses that a median needs
FACTOR = 10.0
PATIENCE = 3  # one bad batch is survived: its gradient is clipped


class DivergenceError(NovaError, ArithmeticError):
    """A loss or gradient is not finite, or the loss has grown far beyond what it was."""


class LossWatch:
    """Looks at every step's loss and gradient norm before the weights are changed by them.

    After the warm-up, a loss above 10 times the median of the last 100 is suspicious, and three
    suspicious steps in a row are an error. Suspicious losses do not enter the median.

    Args:
        losses: the last ones, to go on with after a resume.
        suspicious: steps in a row up to now.
    """

    def __init__(self, warmup_steps: int, losses: list[float] = (), suspicious: int = 0):
        self.warmup_steps = warmup_steps
        self.losses = deque(losses, maxlen=WINDOW)
        self.suspicious = suspicious

    def check(self, step: int, loss: float, grad_norm: float) -> None:
        """Take note of a step.

        Raises:
            DivergenceError: see the class.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise DivergenceError(
                f"step {step}: the loss is {loss} and the gradient norm {grad_norm}. Lower the "
                "learning rate, lengthen the warm-up, or look for broken data"
            )
        limit = FACTOR * median(self.losses) if len(self.losses) >= ENOUGH else math.inf
        if step < self.warmup_steps or loss <= limit:
            self.losses.append(loss)
            self.suspicious = 0
            return
        self.suspicious += 1
        if self.suspicious >= PATIENCE:
            raise DivergenceError(
                f"step {step}: the loss is {loss:.4g}, more than {FACTOR:g} times its median "
                f"{median(self.losses):.4g} for {PATIENCE} steps. Lower the learning rate"
            )
