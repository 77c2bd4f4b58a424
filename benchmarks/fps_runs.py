"""Runs of the samplers of one workload, timed, and held against the plain one."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from fps_gate import Agreement, Gate
from fps_memory import SamplerMemory
from fps_samplers import EXACT, PLAIN, STARTING_UP
from measure import held_bytes, synchronize
from random_model import RandomModelRun
from torch import Tensor

from nova.devices import is_out_of_memory
from nova_kernels.errors import in_a_line


@dataclass
class SamplerRuns:
    """What was seen of one sampler.

    Attributes:
        latencies, first_frames: seconds of the timed runs, and those until their first frame.
        first_run_s: of the first run, with whatever starts up in it.
        memory: what it takes.
        agreement: of its latents with others, of the run that was furthest off; None: it gave none.
        refused: why its times do not count; None: all its runs were right.
    """

    memory: SamplerMemory
    latencies: list[float] = field(default_factory=list)
    first_frames: list[float] = field(default_factory=list)
    first_run_s: float = 0.0
    agreement: Agreement | None = None
    refused: str | None = None

    def add(self, agreement: Agreement) -> None:
        """Take note of how far a run's latents are off."""
        self.refused = agreement.refused
        # NaN counts as further off than any number.
        if self.agreement is None or not agreement.error <= self.agreement.error:
            self.agreement = agreement


def timed_run(
    run: RandomModelRun, sampler: Callable, device: torch.device
) -> tuple[Tensor, float, float]:
    """Latents, seconds of the run, and seconds until its first frame."""
    first_frame = None

    def on_frame() -> None:
        nonlocal first_frame
        if first_frame is None:
            synchronize(device)
            first_frame = time.perf_counter()

    synchronize(device)
    start = time.perf_counter()
    latents = run.sample(sampler, on_frame)
    synchronize(device)
    return latents, time.perf_counter() - start, first_frame - start


def run_samplers(
    run: RandomModelRun,
    samplers: dict[str, Callable],
    device: torch.device,
    gate: Gate,
    *,
    repeats: int,
    warm_up: bool = True,
    seconds: float | None = None,
    say: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict[str, SamplerRuns]], None] = lambda seen: None,
) -> dict[str, SamplerRuns]:
    """All samplers of a run.

    The first run of each is the gate: a sampler that fails, as for lack of memory, or whose latents
    differ is not timed. Then they take turns, and what they give is held to the same: graphs are
    recorded in the first run, and replayed in the timed ones alone.

    Args:
        samplers: by name; plain, which the others are compared with, comes first.
        gate: what their latents have to pass.
        warm_up: False: the first run of a sampler counts as the first of `repeats`, but for those
            of `STARTING_UP`.
        seconds: no third or later turn begins after so many.
        say: is told what was run.
        keep: is given all that was seen so far, after every run.
    """
    begin = time.perf_counter()
    seen: dict[str, SamplerRuns] = {}
    shared_bytes = held_bytes(device)
    for name, sampler in samplers.items():
        seen[name] = runs = SamplerRuns(SamplerMemory(device, shared_bytes))
        try:
            with runs.memory.run():
                latents, runs.first_run_s, first_frame = timed_run(run, sampler, device)
        except Exception as error:  # whatever compilers, drivers and other packages raise
            if name == PLAIN:
                raise
            runs.refused = _reason(error)
            say(f"{name}: {runs.refused}")
            keep(seen)
            continue
        say(f"{name}: first run {runs.first_run_s:.3g} s")
        runs.add(gate.check(latents))
        if runs.refused is None and not warm_up and name not in STARTING_UP:
            runs.latencies.append(runs.first_run_s)
            runs.first_frames.append(first_frame)
        keep(seen)
    for turn in range(repeats):
        timed = [
            (name, runs)
            for name, runs in seen.items()
            if runs.refused is None and len(runs.latencies) < repeats
        ]
        for name, runs in timed:
            try:
                with runs.memory.run():
                    latents, latency, first_frame = timed_run(run, samplers[name], device)
            except Exception as error:
                if name == PLAIN:
                    raise
                runs.refused = _reason(error)
                continue
            runs.add(gate.check(latents))
            runs.latencies.append(latency)
            runs.first_frames.append(first_frame)
            keep(seen)
        if timed:
            times = ", ".join(
                f"{name} {runs.refused or f'{runs.latencies[-1]:.3g} s'}" for name, runs in timed
            )
            say(f"turn {turn + 1} of at most {repeats}: {times}")
        if seconds is not None and turn > 0 and time.perf_counter() - begin > seconds:
            break
    return seen


def _reason(error: Exception) -> str:
    if is_out_of_memory(error):
        return "not enough memory"
    return f"failed: {in_a_line(error)}"


def fitting_frames(
    run: RandomModelRun, sampler: Callable, device: torch.device, seconds: float
) -> int:
    """How many latent frames a sampler makes in so many seconds, at least one.

    The run is left at its first frame, which is measured, once it was made before.
    """
    run.shorten(1)
    for _ in range(2):
        _, latency, _ = timed_run(run, sampler, device)
    return max(1, int(seconds / latency))


def warm_process(
    samplers: dict[str, Callable], device: torch.device, dtype: torch.dtype, backend: str
) -> None:
    """What a process does once, by a very small model: loading libraries, starting threads."""
    numbers = {"batch": 1, "num_frames": 2, "num_steps": 2, "num_diffusion_steps": 2}
    run = RandomModelRun("tiny-video", **numbers, device=device, dtype=dtype, backend=backend)
    for name in (PLAIN, EXACT):
        run.sample(samplers[name])
