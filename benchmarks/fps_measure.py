"""Rows of all samplers of one workload: figures, and what else a video takes."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from ceilings import Ceilings
from fps_gate import TOLERANCES, Gate, first_sets_by_plain_torch
from fps_rows import FLOAT32_ERROR, Row
from fps_runs import SamplerRuns, fitting_frames, run_samplers, warm_process
from fps_samplers import EXACT, PLAIN, TUNED
from fps_stages import stage_seconds
from fps_text import make_text_encoder, text_seconds
from fps_vae import decode_seconds, make_vae
from fps_workloads import Workload
from random_model import RandomModelRun
from work_counts import TEXT, VAE, total

from nova.devices import is_out_of_memory
from nova_kernels.dispatch import requested


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
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Rows of all samplers for one workload and batch size.

    Args:
        ceilings: of this machine.
        stages: also a run of the exact sampler with a clock for each stage.
        seconds, say: see `run_samplers`.
        keep: is given the rows there are so far, after every run and whatever comes behind.
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
    # In float32 on a CPU the plain sampler is plain torch.
    is_plain_torch = device.type == "cpu" and dtype == torch.float32
    plain_torch = None if is_plain_torch else first_sets_by_plain_torch(run, device, say)
    gate = Gate(
        run,
        TOLERANCES[dtype],
        compared_sets=workload.compared_sets,
        plain_torch=plain_torch,
    )
    maker = _RowMaker(workload, run, backend, ceilings)
    seen = run_samplers(
        run,
        samplers,
        device,
        gate,
        repeats=workload.repeats,
        warm_up=workload.warm_up,
        seconds=seconds,
        say=say,
        keep=lambda seen: keep(maker.make(seen)),
    )
    keep(maker.make(seen))
    if workload.text is not None:
        maker.text_s = _if_memory_suffices(lambda: _text_s(workload, run), "text encoder", say)
    if workload.vae is not None:
        maker.vae_s = _if_memory_suffices(lambda: _vae_s(workload, run), "VAE", say)
    rows = maker.make(seen)
    if TUNED in samplers:
        tuned = next(row for row in rows if row["sampler"] == TUNED)
        tuned["chosen"] = samplers[TUNED].chosen
    keep(rows)
    if stages and seen[EXACT].refused is None:
        in_run = _if_memory_suffices(lambda: stage_seconds(run, device), "stages", say)
        if in_run is not None:
            exact = next(row for row in rows if row["sampler"] == EXACT)
            exact["stages_s"] = maker.stages(in_run)
            keep(rows)
    return rows


def _if_memory_suffices(
    call: Callable[[], Any], what: str, say: Callable[[str], None]
) -> Any | None:
    """What a call gives; None, and a word, where memory runs out."""
    try:
        return call()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        say(f"not enough memory to time the {what}")
    return None


def _text_s(workload: Workload, run: RandomModelRun) -> float:
    encoder = make_text_encoder(
        workload.text,
        run.device,
        run.dtype,
        max_length=run.config.text_token_len,
        checkpoint=workload.checkpoint,
    )
    return text_seconds(encoder, run, run.device, workload.repeats)


def _vae_s(workload: Workload, run: RandomModelRun) -> float:
    vae = make_vae(workload.vae, run.device, run.dtype, workload.checkpoint)
    channels, *size = run.config.latent_shape
    shape = 1, channels, workload.num_frames, *size
    clip = torch.randn(shape, device=run.device, dtype=run.dtype)
    # Pipelines decode one video at a time.
    return run.batch * decode_seconds(vae, clip, run.device, workload.repeats)


class _RowMaker:
    """Makes the rows of a workload at one batch size.

    Args:
        ceilings: of this machine.

    Attributes:
        text_s, vae_s: seconds of text encoder and VAE for the whole batch; None: not measured.
    """

    def __init__(self, workload: Workload, run: RandomModelRun, backend: str, ceilings: Ceilings):
        self.text_s: float | None = None
        self.vae_s: float | None = None
        work = run.work().values()
        self._floor_s = ceilings.floor_seconds(work)
        # What is run, as a share of a video.
        self._share = run.sets_run / run.sets_of_video
        self._frames = run.batch * workload.pixel_frames * self._share
        self._has_frames = workload.num_sets is None  # else a part of one
        self._shared = {
            "geometry": workload.geometry,
            "weights": "random" if workload.checkpoint is None else "checkpoint",
            "latent_frames": workload.num_frames,
            "temporal_factor": workload.temporal_factor,
            "steps": workload.num_steps,
            "diffusion_steps": workload.num_diffusion_steps,
            "sets_run": run.sets_run,
            "sets_of_video": run.sets_of_video,
            "batch": run.batch,
            "device": str(run.device),
            "dtype": str(run.dtype).removeprefix("torch."),
            "backend": requested(backend),
            "text": workload.text,
            "vae": workload.vae,
            "tolerance": TOLERANCES[run.dtype],
            "compared_sets": workload.compared_sets or run.sets_run,
            "operations": total(work).operations,
            "floor_s": self._floor_s,
        }

    def make(self, seen: dict[str, SamplerRuns]) -> list[Row]:
        """Rows of the samplers that have run so far."""
        shared = {**self._shared, "text_s": self.text_s, "vae_s": self.vae_s}
        latencies = seen[PLAIN].latencies
        # Where plain gives NaN, all are refused.
        plain_s = statistics.median(latencies) if latencies else None
        return [
            {"sampler": name, **shared, **self._figures(runs, plain_s)}
            for name, runs in seen.items()
        ]

    def stages(self, in_run: dict[str, float]) -> dict[str, float]:
        """Seconds of all stages: of those of sampling, text encoder and VAE.

        Of a part of a video the last two count as much as it is.
        """
        around = {
            name: None if s is None else self._share * s
            for name, s in ((TEXT, self.text_s), (VAE, self.vae_s))
        }
        stages_s = {TEXT: around[TEXT], **in_run, VAE: around[VAE]}
        return {name: s for name, s in stages_s.items() if s is not None}

    def _figures(self, runs: SamplerRuns, plain_s: float | None) -> dict[str, Any]:
        if runs.refused is not None:
            return {"refused": runs.refused}
        if not runs.latencies:  # as far as the file goes where the command is stopped
            return {"refused": "not timed yet", "first_run_s": runs.first_run_s}
        latency = statistics.median(runs.latencies)
        with_vae = None if self.vae_s is None else latency + self._share * self.vae_s
        return {
            "latency_s": latency,
            "latencies_s": runs.latencies,
            # Of a part of a frame there is no first frame.
            "first_frame_s": statistics.median(runs.first_frames) if self._has_frames else None,
            "first_run_s": runs.first_run_s,
            "fps": self._frames / latency,
            "fps_with_vae": None if with_vae is None else self._frames / with_vae,
            "ratio_to_plain": plain_s / latency,
            "share_of_floor": self._floor_s / latency,
            "max_error_vs_plain": runs.agreement.error,
            FLOAT32_ERROR: runs.agreement.float32_error,
            "peak_memory_bytes": runs.memory.peak_bytes,
        }
