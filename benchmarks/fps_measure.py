"""Runs of the samplers of one workload, timed, and held against the plain one."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from ceilings import Ceilings
from fps_gate import TOLERANCES, Agreement, Gate, first_tokens_in_float32
from fps_memory import SamplerMemory
from fps_rows import FLOAT32_ERROR
from fps_samplers import EXACT, PLAIN, STARTING_UP, TUNED
from fps_stages import stage_seconds
from fps_text import make_text_encoder, text_seconds
from fps_vae import decode_seconds, make_vae
from fps_workloads import Workload
from measure import allocated_bytes, synchronize
from random_model import RandomModelRun
from torch import Tensor
from work_counts import TEXT, VAE, total

from nova_kernels.dispatch import requested
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
) -> dict[str, SamplerRuns]:
    """All samplers of a run.

    The first run of each is the gate: a sampler that fails, as for lack of memory, or whose latents
    differ is not timed. Then they take turns, and what they give is held to the same: graphs are
    recorded in the first run, and replayed in the timed ones alone.

    Args:
        samplers: by name; plain, which the others are compared with, comes first.
        gate: what their latents have to pass.
        warm_up: False: the first run of a sampler counts as the first of `repeats`, but for those
            that compile or record in it.
        seconds: no third or later turn begins after so many.
        say: is told what was run.
    """
    begin = time.perf_counter()
    seen: dict[str, SamplerRuns] = {}
    shared_bytes = allocated_bytes(device)
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
            continue
        say(f"{name}: first run {runs.first_run_s:.3g} s")
        runs.add(gate.check(latents))
        if runs.refused is None and not warm_up and name not in STARTING_UP:
            runs.latencies.append(runs.first_run_s)
            runs.first_frames.append(first_frame)
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
        if timed:
            times = ", ".join(
                f"{name} {runs.refused or f'{runs.latencies[-1]:.3g} s'}" for name, runs in timed
            )
            say(f"turn {turn + 1} of at most {repeats}: {times}")
        if seconds is not None and turn > 0 and time.perf_counter() - begin > seconds:
            break
    return seen


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "not enough memory"
    return f"failed: {in_a_line(error)}"


def fitting_frames(
    run: RandomModelRun, sampler: Callable, device: torch.device, seconds: float
) -> int:
    """How many latent frames a sampler makes in so many seconds, at least one.

    The run is left at its first frame, which is measured.
    """
    run.shorten(1)
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


def measure(
    workload: Workload,
    batch: int,
    samplers: dict[str, Callable],
    ceilings: Ceilings,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    stages: bool = True,
    seconds: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Rows of all samplers for one workload and batch size.

    Args:
        ceilings: of this machine.
        stages: also a run of the exact sampler with a clock for each stage.
        seconds, say: see `run_samplers`.
    """
    run = RandomModelRun(
        workload.geometry,
        batch=batch,
        num_frames=workload.num_frames,
        num_steps=workload.num_steps,
        num_diffusion_steps=workload.num_diffusion_steps,
        num_sets=workload.num_sets,
        run_frames=workload.run_frames,
        device=device,
        dtype=dtype,
        backend=backend,
        checkpoint=workload.checkpoint,
    )
    if not workload.warm_up:
        warm_process(samplers, device, dtype, backend)
    if workload.run_seconds is not None and not workload.is_part:
        fitting = fitting_frames(run, samplers[PLAIN], device, workload.run_seconds)
        run.shorten(min(fitting, workload.num_frames))
        say(f"{run.sets_run} of {run.sets_of_video} sets are run")
    in_float32 = None if dtype == torch.float32 else first_tokens_in_float32(run, device, say)
    gate = Gate(
        run,
        TOLERANCES[dtype],
        compared_sets=workload.compared_sets,
        float32_tokens=in_float32,
    )
    seen = run_samplers(
        run,
        samplers,
        device,
        gate,
        repeats=workload.repeats,
        warm_up=workload.warm_up,
        seconds=seconds,
        say=say,
    )
    text_s = vae_s = None
    if workload.text is not None:
        encoder = make_text_encoder(
            workload.text,
            device,
            dtype,
            max_length=run.config.text_token_len,
            checkpoint=workload.checkpoint,
        )
        text_s = text_seconds(encoder, run, device, workload.repeats)
        del encoder
    if workload.vae is not None:
        vae = make_vae(workload.vae, device, dtype, workload.checkpoint)
        channels, *size = run.config.latent_shape
        clip = torch.randn(1, channels, workload.num_frames, *size, device=device, dtype=dtype)
        # Pipelines decode one video at a time.
        vae_s = batch * decode_seconds(vae, clip, device, workload.repeats)
        del vae
    work = run.work().values()
    shared = {
        "geometry": workload.geometry,
        "weights": "random" if workload.checkpoint is None else "checkpoint",
        "latent_frames": workload.num_frames,
        "steps": workload.num_steps,
        "diffusion_steps": workload.num_diffusion_steps,
        "sets_run": run.sets_run,
        "sets_of_video": run.sets_of_video,
        "batch": batch,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "backend": requested(backend),
        "text": workload.text,
        "text_s": text_s,
        "vae": workload.vae,
        "vae_s": vae_s,
        "tolerance": TOLERANCES[dtype],
        "compared_sets": workload.compared_sets or run.sets_run,
        "operations": total(work).operations,
        "floor_s": ceilings.floor_seconds(work),
    }
    plain_s = statistics.median(seen[PLAIN].latencies)
    share = run.sets_run / run.sets_of_video
    frames = batch * workload.pixel_frames * share
    rows = [
        {
            "sampler": name,
            **shared,
            **_figures(runs, frames, plain_s, shared, has_frames=workload.num_sets is None),
        }
        for name, runs in seen.items()
    ]
    if TUNED in samplers:
        tuned = next(row for row in rows if row["sampler"] == TUNED)
        tuned["chosen"] = samplers[TUNED].chosen
    if stages and seen[EXACT].refused is None:
        exact = next(row for row in rows if row["sampler"] == EXACT)
        # Of a part of a video the text encoder and the VAE count as much as it is.
        around = {
            name: None if s is None else share * s for name, s in ((TEXT, text_s), (VAE, vae_s))
        }
        stages_s = {TEXT: around[TEXT], **stage_seconds(run, device), VAE: around[VAE]}
        exact["stages_s"] = {name: s for name, s in stages_s.items() if s is not None}
    return rows


def _figures(
    runs: SamplerRuns, frames: float, plain_s: float, shared: dict[str, Any], *, has_frames: bool
) -> dict[str, Any]:
    if runs.refused is not None:
        return {"refused": runs.refused}
    latency, vae_s = statistics.median(runs.latencies), shared["vae_s"]
    share = shared["sets_run"] / shared["sets_of_video"]
    return {
        "latency_s": latency,
        "latencies_s": runs.latencies,
        # Of a part of a frame there is no first frame.
        "first_frame_s": statistics.median(runs.first_frames) if has_frames else None,
        "first_run_s": runs.first_run_s,
        "fps": frames / latency,
        "fps_with_vae": None if vae_s is None else frames / (latency + share * vae_s),
        "ratio_to_plain": plain_s / latency,
        "share_of_floor": shared["floor_s"] / latency,
        "max_error_vs_plain": runs.agreement.error,
        FLOAT32_ERROR: runs.agreement.float32_error,
        "peak_memory_bytes": runs.memory.peak_bytes,
    }
