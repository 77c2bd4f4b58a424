"""The loop of a training run, whatever is trained: steps, metrics, checkpoints, contact sheets."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.loading import worker_failures
from ..devices import out_of_memory
from ..errors import InputError
from ..output_folder import make_output_folder
from .checkpoints import Checkpoints
from .engine import Engine
from .metrics import MetricsFile, plot_metrics
from .options import RunOptions
from .speed import Stopwatch
from .state import averaged_weights, read_progress, save_training_state

OnStep = Callable[[int, dict[str, float]], None]
Weights = dict[str, Tensor]


class Task(Protocol):
    """What a run trains, as far as its files are concerned. Called on the main process alone.

    The device is the one that trains, for what is computed of the weights, which are on the CPU.
    """

    def save(self, folder: Path, weights: Weights, device: torch.device) -> None:
        """Write what a checkpoint offers for use, made of the averaged weights."""
        ...

    def write_sheet(self, path: Path, weights: Weights, device: torch.device) -> None:
        """Write a contact sheet of what the averaged weights make."""
        ...

    def metrics(self, step: int) -> dict[str, float]:
        """More columns of metrics.csv for a step, counted from 0."""
        ...


@contextmanager
def training_run(less_memory: str) -> Iterator[None]:
    """What a whole run happens in: gradients, whatever the caller has turned off; clear errors.

    Args:
        less_memory: what makes this kind of run take less memory, beside what helps all.

    Raises:
        DeviceError: memory is short, or a process that reads was lost.
    """
    remedies = (
        "a smaller micro_batch_size (--micro-batch-size)",
        'precision="bfloat16"',
        less_memory,
    )
    memory = out_of_memory("training", *remedies, for_pipelines=False)
    with torch.inference_mode(False), memory, worker_failures():
        yield


def find_resumed(options: RunOptions, fixed: tuple[str, ...]) -> Path | None:
    """The checkpoint to go on from; None for a new run. The run's folder is made.

    Args:
        fixed: names of options that a run must go on with unchanged.

    Raises:
        InputError: there is a checkpoint and `resume` was not asked for, it is of another kind of
            run, it has all steps already, or it was made with other values of `fixed`.
        MediaError: the folder cannot be made, or not be written into.
    """
    make_output_folder(options.out)
    latest = Checkpoints(options.out, options.keep).latest()
    if latest is None:
        return None
    if not options.resume:
        raise InputError(
            f"{options.out} has checkpoints already; go on with --resume (resume=True), or choose "
            "another folder"
        )
    progress = read_progress(latest)
    before, now = progress["options"], _recorded(options)
    # An older run may lack options; one that has others was no run of this kind.
    if before.keys() - now.keys():
        raise InputError(
            f"{options.out} has checkpoints of another kind of run; nova train and nova train-vae "
            "go on with their own alone: choose another folder"
        )
    if progress["step"] >= options.steps:
        raise InputError(f"{latest} has {progress['step']} steps already; raise --steps above that")
    fixed = [name for name in fixed if name in before]
    changed = [f"{name}={before[name]!r}" for name in fixed if before[name] != now[name]]
    if changed:
        raise InputError(f"this run was started with {', '.join(changed)}; go on with the same")
    return latest


def run_steps(
    engine: Engine,
    task: Task,
    batches: Iterable[dict[str, Tensor]],
    per_step: int,
    options: RunOptions,
    resumed: Path | None,
    on_step: OnStep | None = None,
) -> Path:
    """Do the steps that are left.

    Args:
        engine: with the state of `resumed` in it already.
        batches: this process's micro-batches from the first of these steps on, `per_step` a step.
        resumed: the checkpoint that this run goes on from.
        on_step: called after every step with the number of steps done and its metrics.

    Returns:
        The last checkpoint.

    Raises:
        DivergenceError: see `LossWatch`; checkpoints stay as they are.
    """
    first_step, position = read_position(resumed)
    accelerator = engine.accelerator
    is_main = accelerator.is_main_process
    checkpoints = Checkpoints(options.out, options.keep)
    metrics = MetricsFile(options.out, first_step) if is_main else None
    bar = tqdm(
        total=options.steps,
        initial=first_step,
        desc="train",
        unit="step",
        disable=not (options.progress and is_main),
    )
    stopwatch, batches = Stopwatch(), iter(batches)
    with bar:
        for step in range(first_step, options.steps):
            result = engine.step(step, [next(batches) for _ in range(per_step)])
            done, position = step + 1, position + options.batch_size
            result.update(task.metrics(step))
            result["samples_per_second"] = stopwatch.rate(options.batch_size)
            bar.update()
            bar.set_postfix(loss=f"{result['loss']:.4f}", refresh=False)
            is_last = done == options.steps
            if metrics is not None and (done % options.log_every == 0 or is_last):
                metrics.write({"step": done, **result})
            # A loss that may be about to diverge makes no checkpoint to go on from.
            save = is_last or (done % options.save_every == 0 and not engine.watch.suspicious)
            sheet = options.sample_every > 0 and done % options.sample_every == 0
            if save or sheet:
                weights = averaged_weights(engine)
                if save:
                    record = {"step": done, "position": position, "options": _recorded(options)}
                    _save(engine, task, checkpoints, weights, record)
                if is_main:
                    plot_metrics(options.out)
                    if sheet:
                        path = options.out / "samples" / f"step-{done:08d}.png"
                        task.write_sheet(path, weights, accelerator.device)
                accelerator.wait_for_everyone()
                stopwatch.skip()
            if on_step is not None:
                on_step(done, result)
    return checkpoints.path(options.steps)


def read_position(resumed: Path | None) -> tuple[int, int]:
    """Steps done and samples used by a run so far; zeros for a new run."""
    if resumed is None:
        return 0, 0
    progress = read_progress(resumed)
    return progress["step"], progress["position"]


def _save(
    engine: Engine,
    task: Task,
    checkpoints: Checkpoints,
    weights: Weights,
    record: dict[str, Any],
) -> None:
    if not engine.accelerator.is_main_process:
        # Gathering takes all processes; this one writes nothing.
        save_training_state(engine, checkpoints.folder, record)
        return
    with checkpoints.writing(record["step"]) as folder:
        task.save(folder, weights, engine.accelerator.device)
        save_training_state(engine, folder, record)


def _recorded(options: RunOptions) -> dict[str, Any]:
    """Options as JSON gives them back."""
    values = asdict(options)
    values["out"] = str(options.out)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
