"""What a text-to-video model trained on the world of shapes shows, measured on its videos.

    python benchmarks/quality.py --plots build/quality
    python benchmarks/quality.py --tasks motion,frechet
    python benchmarks/quality.py --model FOLDER --tasks sweep --sweep-steps 4,8,16

Every task is described in docs/quality.md. The results file is written after each of them.
"""

import argparse
import datetime
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from clip_lengths import latent_frames
from measure import machine
from quality_evaluation import DEFAULT_MOTION_RANGE, DEFAULT_SEED, CaseSet, Evaluation
from quality_frechet import frechet
from quality_longer import continuation, extrapolation
from quality_plots import ACCURACIES, require_matplotlib
from quality_report import run_tasks
from quality_results import TaskResult
from quality_sampler import ClipSampler, SamplerSettings
from quality_speed import Sweep, measure_sweep
from quality_tasks import image_to_video, motion, text_to_video

import nova
from nova.devices import check_device, default_device
from nova.errors import InputError, NovaError
from nova.generation_config import GenerationConfig
from nova.media import check_writable
from nova.motion import require_opencv

DEFAULT_CLIPS = 128
DEFAULT_SWEEP = Sweep(steps=(4, 8, 16), diffusion_steps=(5, 10, 25), clips=64)
DEFAULT_BATCH_SIZE = 16
RESULTS = Path(__file__).resolve().parent / "results"
INTERRUPTED = 130  # what shells give for a process that Ctrl-C ended

TASKS: dict[str, Callable[[Evaluation], TaskResult]] = {
    "text-to-video": text_to_video,
    "motion": motion,
    "image-to-video": image_to_video,
    "continuation": continuation,
    "extrapolation": extrapolation,
    "frechet": frechet,
}
SWEEP = "sweep"  # the one task that runs only where it is asked for

# Option -> field of `SamplerSettings`.
SETTINGS = {
    "--steps": "num_inference_steps",
    "--diffusion-steps": "num_diffusion_steps",
    "--guidance": "guidance_scale",
    "--min-guidance": "min_guidance_scale",
    "--guidance-trunc": "guidance_trunc",
    "--guidance-renorm": "guidance_renorm",
    "--image-guidance": "image_guidance_scale",
    "--flow-shift": "flow_shift",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="shapes", help="checkpoint folder or id")
    add("--tasks", default=",".join(TASKS), help=f"of these and {SWEEP}")
    add("--clips", type=int, default=DEFAULT_CLIPS, help="of a task and split")
    add("--seed", type=int, default=DEFAULT_SEED, help="of captions and noise")
    add(
        "--motion-range",
        type=float,
        nargs=2,
        default=DEFAULT_MOTION_RANGE,
        metavar=("LOW", "HIGH"),
        help="scores that the swept captions ask for",
    )
    add("--context-frames", type=int, help="of extrapolation; None: as trained, 0: all")
    add("--batch-size", type=int, default=DEFAULT_BATCH_SIZE, help="clips at a time")
    add("--device", help="None: the GPU, if there is one")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="None: bfloat16 on CUDA GPUs")
    add("--out", type=Path, help="None: benchmarks/results/quality_<cpu or cuda>.json")
    add("--plots", type=Path, metavar="FOLDER", help="of plots and contact sheets")
    sampler = parser.add_argument_group("sampler (see nova.Request; None: as the model recommends)")
    for option, name in SETTINGS.items():
        kind = int if name.endswith("steps") else float
        sampler.add_argument(option, dest=name, type=kind, help=name)
    sweep = parser.add_argument_group("quality against speed (either list adds the sweep)")
    sweep.add_argument("--sweep-steps", metavar="A,A,...", help="autoregressive steps")
    sweep.add_argument("--sweep-diffusion-steps", metavar="D,D,...", help="denoise steps")
    sweep.add_argument("--sweep-clips", type=int, default=DEFAULT_SWEEP.clips)
    return parser


def run(arguments: argparse.Namespace, command: str) -> None:
    """Check all that can be checked, then open the model and run the tasks.

    Raises:
        NovaError: what is wrong with the options, the model or the installation.
    """
    names = choose_tasks(arguments)
    sweep = Sweep(
        steps=_numbers(arguments.sweep_steps, DEFAULT_SWEEP.steps),
        diffusion_steps=_numbers(arguments.sweep_diffusion_steps, DEFAULT_SWEEP.diffusion_steps),
        clips=arguments.sweep_clips,
    )
    options = {name: getattr(arguments, name) for name in SETTINGS.values()}
    # Wrong ones are refused here, whatever the model recommends for the others.
    SamplerSettings.of(GenerationConfig().request(**options))
    case_set = CaseSet(arguments.clips, arguments.seed, tuple(arguments.motion_range))
    _check_numbers(arguments)
    cv2 = require_opencv()
    cv2.setNumThreads(1)  # small frames gain nothing from threads
    device = default_device() if arguments.device is None else check_device(arguments.device)
    out = arguments.out or RESULTS / f"quality_{device.type}.json"
    check_writable(out, (".json",))
    if arguments.plots is not None:
        require_matplotlib()
        check_writable(arguments.plots / ACCURACIES)

    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    pipeline = nova.NOVAPipeline.from_pretrained(arguments.model, torch_dtype=dtype).to(device)
    settings = SamplerSettings.of(pipeline.generation_config.request(**options))
    sampler = ClipSampler(pipeline, arguments.batch_size)
    context_frames = arguments.context_frames
    if context_frames is None:
        context_frames = latent_frames(sampler.num_frames)
    evaluation = Evaluation(sampler, settings, case_set, context_frames or None)
    facts = {
        "machine": {**machine(device), "opencv": cv2.__version__},
        "command": command,
        "date": datetime.date.today().isoformat(),
        "model": arguments.model,
        "dtype": str(dtype).removeprefix("torch."),
        "batch_size": arguments.batch_size,
        "frames": [sampler.num_frames, *sampler.size],
        "context_frames": context_frames,
        "sampler": asdict(settings),
        "cases": asdict(case_set),
    }
    tasks = {name: partial(TASKS[name], evaluation) for name in names if name != SWEEP}
    if SWEEP in names:
        tasks[SWEEP] = partial(measure_sweep, evaluation, sweep)
    run_tasks(tasks, out, facts, arguments.plots)


def choose_tasks(arguments: argparse.Namespace) -> list[str]:
    """The tasks asked for, each once.

    Raises:
        InputError: an unknown one, or none.
    """
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    if arguments.sweep_steps or arguments.sweep_diffusion_steps:
        names.append(SWEEP)
    known = (*TASKS, SWEEP)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        problem = f"no task named {', '.join(unknown)}" if unknown else "no task"
        raise InputError(f"--tasks: {problem}; the tasks are {', '.join(known)}")
    return list(dict.fromkeys(names))


def _numbers(text: str | None, default: tuple[int, ...]) -> tuple[int, ...]:
    """The different whole numbers of a list such as "4,8,16"."""
    if text is None:
        return default
    try:
        return tuple(dict.fromkeys(int(number) for number in text.split(",")))
    except ValueError as error:
        raise InputError(f"{text!r} is no list of whole numbers such as 4,8,16") from error


def _check_numbers(arguments: argparse.Namespace) -> None:
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    context = arguments.context_frames
    if context not in (None, 0) and context < 2:
        raise InputError(f"--context-frames must be at least 2, or 0 for all, got {context}")


def main(argv: list[str]) -> int:
    arguments = build_parser().parse_args(argv)
    command = shlex.join(["python", "benchmarks/quality.py", *argv])
    try:
        run(arguments, command)
    except NovaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
