"""Candidates take turns on the same work; the fastest one that computes the same is chosen."""

import time
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nova_kernels.errors import in_a_line

from ..devices import is_out_of_memory
from ..graph_recording import Recorder, Recording, RecordingError, record_checked
from .choices import Choice
from .record import Measurement

# Largest error, relative to the largest value.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
ROUNDS = 5
# A time is taken over as many repetitions as last so long.
LEAST_SECONDS = 0.01
# A smaller gain may be noise, unless every turn of the candidate beat every turn of the default.
LEAST_GAIN = 0.05
# A clear gain below this is not worth leaving the default.
LEAST_CLEAR_GAIN = 0.01


def measure(
    choice: Choice,
    work: Callable[[], Tensor],
    device: torch.device,
    *,
    record: Recorder | None = None,
    refused: Mapping[str, str] | None = None,
    exact: Tensor | None = None,
) -> Measurement:
    """Time the candidates of a choice, and set the best one.

    Args:
        work: what they compute.
        record: times replays of what it records, as CUDA graphs, in place of calls.
        refused: candidates that are not to be run, and why.
        exact: the result in a wider dtype; None: the first candidate's.

    Raises:
        RuntimeError: of the first candidate, which is what runs without a choice.
    """
    seconds: dict[str, list[float]] = {}
    refused = dict(refused or {})
    allowed = None
    for turn in range(ROUNDS):
        for name in choice.candidates:
            if name in refused:
                continue
            choice.set(name)
            try:
                output, time_of_one = _time(work, device, record)
            except Exception as problem:  # whatever a compiler or driver raises
                if name == choice.candidates[0]:
                    raise
                refused[name] = in_a_line(problem)
                continue
            if turn == 0:
                exact = output if exact is None else exact
                error = _relative_error(output, exact)
                if allowed is None:
                    # Trained weights may magnify rounding, whoever rounds.
                    allowed = max(TOLERANCES[output.dtype], 2 * error)
                elif not error <= allowed:
                    refused[name] = f"wrong by {error:.1e} of the largest value"
                    continue
            seconds.setdefault(name, []).append(time_of_one)
    seconds = {name: times for name, times in seconds.items() if name not in refused}
    chosen = _fastest(seconds, choice.candidates[0])
    choice.set(chosen)
    # The least: whatever else a machine does only adds to it.
    least = {name: min(times) for name, times in seconds.items()}
    return Measurement(choice.name, chosen, least, refused)


def _fastest(seconds: Mapping[str, list[float]], default: str) -> str:
    """The fastest of the candidates that gain enough, or the default.

    Args:
        seconds: of all turns, by candidate.
    """
    least = min(seconds[default])

    def gains(times: list[float]) -> bool:
        is_clear = max(times) < least
        return min(times) < (1 - (LEAST_CLEAR_GAIN if is_clear else LEAST_GAIN)) * least

    gaining = [name for name, times in seconds.items() if gains(times)]
    return min(gaining, key=lambda name: min(seconds[name]), default=default)


@torch.inference_mode()
def _time(
    work: Callable[[], Tensor],
    device: torch.device,
    record: Recorder | None,
) -> tuple[Tensor, float]:
    """The output of some work, and the seconds that it takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on why a kernel cannot be used
        output = work().clone()
        run = work if record is None else _recorded(work, output, record).replay
    repeats = max(1, round(LEAST_SECONDS / _seconds(run, device, 1)))
    return output, _seconds(run, device, repeats)


def _recorded(work: Callable[[], Tensor], output: Tensor, record: Recorder) -> Recording:
    """Checked, since work that a graph missed, as on another stream, takes no time in it."""
    try:
        return record_checked(work, output, record)
    except RecordingError as error:
        cause = error.__cause__
        if isinstance(cause, RuntimeError) and is_out_of_memory(cause):
            raise cause from None  # it may go well the next time
        raise


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _relative_error(output: Tensor, exact: Tensor) -> float:
    output, exact = output.float(), exact.float()
    return float((output - exact).abs().max() / exact.abs().max())
