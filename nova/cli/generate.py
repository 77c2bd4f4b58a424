"""`nova generate`: its options and the order of its steps; what is cheap to check comes first."""

import math
import secrets
import time
from pathlib import Path
from typing import Annotated

import typer

from .errors import DebugOption
from .options import Backend, Dtype, option

# torch takes 64-bit seeds; the upper half leaves room for seed + i.
LARGEST_SEED = 2**63 - 1
RANDOM_SEEDS = 2**32  # short enough to type again
# Of options that a checkpoint may bring along (`GenerationConfig`).
RECOMMENDED = "the model's, else {}"


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def _seed(value: int | None) -> int | None:
    if value is not None and not 0 <= value <= LARGEST_SEED:
        raise typer.BadParameter(f"{value} is not in 0..{LARGEST_SEED}.")
    return value


WHAT, SAMPLING, OUTPUT, MACHINE = "What to make", "Sampling", "Output", "Machine"


def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What the image or video shows.")
    ] = None,
    *,
    out: Annotated[
        Path,
        option(
            "--out",
            panel=OUTPUT,
            metavar="FILE",
            help=".mp4, .mov, .m4v or .gif; .png, .jpg or .webp for an image, or for the contact "
            "sheet of a video. Several samples: FILE_000, FILE_001, ...",
        ),
    ],
    model: Annotated[
        str,
        option(
            "--model",
            panel=WHAT,
            metavar="FOLDER|ID",
            help="Checkpoint folder or hub id; `shapes` comes with this package.",
        ),
    ] = "shapes",
    image: Annotated[
        Path | None, option("--image", panel=WHAT, help="Go on from this image.")
    ] = None,
    video: Annotated[
        Path | None, option("--video", panel=WHAT, help="Go on from this clip.")
    ] = None,
    negative: Annotated[
        str | None,
        option("--negative", panel=WHAT, metavar="TEXT", help="What it should not show."),
    ] = None,
    class_id: Annotated[
        int | None,
        option("--class-id", panel=WHAT, help="Class of a class-conditional model, for a prompt."),
    ] = None,
    prompt_embeds: Annotated[
        Path | None,
        option(
            "--prompt-embeds",
            panel=WHAT,
            exists=True,
            dir_okay=False,
            help="safetensors file with `prompt_embeds`, (tokens, width) or (prompts, tokens, "
            "width), for a prompt; no text encoder is loaded.",
        ),
    ] = None,
    batch_file: Annotated[
        Path | None,
        option(
            "--batch-file",
            panel=WHAT,
            exists=True,
            dir_okay=False,
            help="Text file, one prompt a line; blank lines and # comments are skipped.",
        ),
    ] = None,
    num: Annotated[int, option("--num", panel=WHAT, min=1, help="Samples of every prompt.")] = 1,
    latents: Annotated[
        int | None,
        option(
            "--latents",
            panel=WHAT,
            min=1,
            show_default="the model's",
            help="Latent frames T, given ones included: 1 + 4 (T - 1) frames of video.",
        ),
    ] = None,
    fps: Annotated[
        float,
        option("--fps", panel=WHAT, callback=_finite, help="Frames a second, for model and file."),
    ] = 12.0,
    motion: Annotated[
        float | None,
        option(
            "--motion",
            panel=WHAT,
            callback=_finite,
            show_default=RECOMMENDED.format(5),
            help="How much moves (mean optical flow).",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        option(
            "--seed",
            panel=SAMPLING,
            callback=_seed,
            show_default="random",
            help="Sample i has seed + i. A seed repeats a result on one kind of device.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        option(
            "--steps",
            panel=SAMPLING,
            min=1,
            show_default=RECOMMENDED.format(64),
            help="Autoregressive steps of a frame.",
        ),
    ] = None,
    diffusion_steps: Annotated[
        int | None,
        option(
            "--diffusion-steps",
            panel=SAMPLING,
            min=1,
            show_default=RECOMMENDED.format(25),
            help="Denoise steps of a step.",
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        option(
            "--guidance",
            panel=SAMPLING,
            callback=_finite,
            show_default=RECOMMENDED.format(5),
            help="Classifier-free guidance; 1 or less: none, and about twice as fast.",
        ),
    ] = None,
    min_guidance: Annotated[
        float | None,
        option(
            "--min-guidance",
            panel=SAMPLING,
            callback=_finite,
            help="Guidance of a frame's first steps, growing to --guidance.",
        ),
    ] = None,
    guidance_trunc: Annotated[
        float,
        option(
            "--guidance-trunc",
            panel=SAMPLING,
            callback=_finite,
            help="No guidance at timesteps (0 to 1000) below this.",
        ),
    ] = 0.0,
    guidance_renorm: Annotated[
        float,
        option(
            "--guidance-renorm",
            panel=SAMPLING,
            callback=_finite,
            help="Below 1: how far the norm of guided predictions may be lowered.",
        ),
    ] = 1.0,
    image_guidance: Annotated[
        float,
        option(
            "--image-guidance",
            panel=SAMPLING,
            callback=_finite,
            help="Guidance towards the frames so far; 0: none.",
        ),
    ] = 0.0,
    flow_shift: Annotated[
        float | None,
        option(
            "--flow-shift",
            panel=SAMPLING,
            callback=_finite,
            show_default="the model's",
            help="Timestep shift of flow matching.",
        ),
    ] = None,
    context_frames: Annotated[
        int | None,
        option(
            "--context-frames",
            panel=SAMPLING,
            min=2,
            show_default="all",
            help="Latent frames that the model sees at a time, for long clips.",
        ),
    ] = None,
    sheet: Annotated[
        bool,
        option(
            "--sheet/--no-sheet",
            panel=OUTPUT,
            help="A contact sheet beside every video, FILE_sheet.png, and one of several samples.",
        ),
    ] = True,
    save_latents: Annotated[
        Path | None,
        option(
            "--save-latents",
            panel=OUTPUT,
            metavar="FILE",
            help="safetensors file for `latents` (samples, channels, frames, height, width).",
        ),
    ] = None,
    quiet: Annotated[bool, option("--quiet", panel=OUTPUT, help="No progress bars.")] = False,
    device: Annotated[
        str | None,
        option(
            "--device",
            panel=MACHINE,
            show_default="the GPU, if there is one",
            help="cpu, cuda, cuda:1, mps...",
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        option(
            "--dtype",
            panel=MACHINE,
            show_default="bfloat16 on a GPU, else float32",
            help="Precision of the weights.",
        ),
    ] = None,
    backend: Annotated[
        Backend,
        option(
            "--backend",
            panel=MACHINE,
            help="Implementation of the ops; `python -m nova_kernels` lists what runs here.",
        ),
    ] = Backend.auto,
    batch_size: Annotated[
        int,
        option(
            "--batch-size",
            panel=MACHINE,
            min=1,
            help="Samples made at a time; fewer where memory is too short for so many.",
        ),
    ] = 1,
    compile_blocks: Annotated[
        bool,
        option(
            "--compile",
            panel=MACHINE,
            help="Compile the model's blocks by torch.compile; on a CPU slower than without.",
        ),
    ] = False,
    cuda_graphs: Annotated[
        bool,
        option(
            "--cuda-graphs",
            panel=MACHINE,
            help="Replay sampling from CUDA graphs: faster in small batches, for more memory.",
        ),
    ] = False,
    tune: Annotated[
        bool,
        option(
            "--tune",
            panel=MACHINE,
            help="First measure, for some seconds, what is fastest here; kept for the next time.",
        ),
    ] = False,
    text_encoder_device: Annotated[
        str | None,
        option(
            "--text-encoder-device",
            panel=MACHINE,
            show_default="as --device",
            help="Where prompts are encoded; cpu spares GPU memory.",
        ),
    ] = None,
    offload: Annotated[
        bool,
        option(
            "--offload",
            panel=MACHINE,
            help="Every part is on the device only while it works: less GPU memory.",
        ),
    ] = False,
    vae_tiling: Annotated[
        bool,
        option(
            "--vae-tiling",
            panel=MACHINE,
            help="Decode large frames in pieces: less memory, slightly different pixels.",
        ),
    ] = False,
    allow_pickle: Annotated[
        bool,
        option("--allow-pickle", panel=MACHINE, help="Also read .bin weights, their tensors only."),
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Make images or videos from sentences, or go on from an image or a clip.

    nova generate "a green star moving up" --out star.mp4
    """
    _check_usage(
        {
            "PROMPT": prompt,
            "--class-id": class_id,
            "--prompt-embeds": prompt_embeds,
            "--batch-file": batch_file,
        }
    )
    if offload and text_encoder_device is not None:
        raise typer.BadParameter("--offload places the text encoder; leave out one of both.")
    if offload and cuda_graphs:
        raise typer.BadParameter("--offload moves the model, so --cuda-graphs cannot be used.")

    from ..media.files import frame_rate
    from .outputs import check_latents_file, check_output, check_outputs, overview_path

    out = check_output(out)
    latents_file = None if save_latents is None else check_latents_file(save_latents)
    frame_rate(fps)

    import torch

    from nova_kernels.ops.denoise import OP as DENOISE

    from ..devices import check_device
    from ..tuning import tune as tune_pipeline
    from .device import choose_device, choose_dtype
    from .model import ModelFiles, open_pipeline
    from .run import make_samples
    from .samples import plan_samples, read_conditions, read_given_frames

    conditions = read_conditions(prompt, class_id, prompt_embeds, batch_file)
    samples = plan_samples(
        conditions,
        repeats=num,
        first_seed=secrets.randbelow(RANDOM_SEEDS) if seed is None else seed,
        out=out,
        numbered=batch_file is not None,
    )
    overview = overview_path(out, len(samples)) if sheet else None
    check_outputs([sample.path for sample in samples], sheets=sheet, overview=overview)
    given = read_given_frames(image, video, fps)
    options = {
        "num_inference_steps": steps,
        "num_diffusion_steps": diffusion_steps,
        "max_latent_length": latents,
        "guidance_scale": guidance,
        "min_guidance_scale": min_guidance,
        "guidance_trunc": guidance_trunc,
        "guidance_renorm": guidance_renorm,
        "image_guidance_scale": image_guidance,
        "flow_shift": flow_shift,
        "motion_flow": motion,
        "fps": fps,
        "context_frames": context_frames,
        "disable_progress_bar": quiet,
        **given,
    }
    run_device = choose_device(device)
    if cuda_graphs and run_device.type != "cuda":
        raise typer.BadParameter(f"--cuda-graphs needs a GPU; this runs on {run_device}.")
    # Every model runs this op, and every backend has it: what cannot run raises here already.
    DENOISE.choose(backend.value, torch.empty(0, device=run_device))
    if text_encoder_device is not None:
        check_device(text_encoder_device)
    run_dtype = choose_dtype(dtype and dtype.value, run_device)
    files = ModelFiles.find(model, allow_pickle=allow_pickle)
    files.check_request(files.generation_config.request(**options), conditions, negative, out)

    typer.echo(f"seed {samples[0].seed}, {run_device}, {str(run_dtype).removeprefix('torch.')}")
    pipeline = open_pipeline(
        files.folder,
        device=run_device,
        dtype=run_dtype,
        text_encoder=prompt_embeds is None or negative is not None,
        text_encoder_device=text_encoder_device,
        offload=offload,
        vae_tiling=vae_tiling,
        backend=backend.value,
        allow_pickle=allow_pickle,
        quiet=quiet,
    )
    if cuda_graphs:
        pipeline.enable_cuda_graphs()
    if tune:
        if not quiet:
            typer.echo("tuning")
        record = tune_pipeline(
            pipeline,
            batch_size=min(batch_size, len(samples)),
            num_inference_steps=steps,
            num_diffusion_steps=diffusion_steps,
            guidance_scale=guidance,
        )
        if not quiet:
            typer.echo(record)
    if compile_blocks:
        pipeline.transformer.compile_blocks()
    start = time.perf_counter()
    made = make_samples(
        pipeline,
        samples,
        {**options, "negative_prompt": negative},
        batch_size=batch_size,
        sheet=sheet,
        overview_file=overview,
        latents_file=latents_file,
    )
    seconds = time.perf_counter() - start
    noun = "frame" if made.frames == 1 else "frames"
    typer.echo(f"{made.frames} {noun} in {seconds:.1f} s, {made.frames / seconds:.2f} a second")
    if made.peak_memory is not None:
        typer.echo(f"at most {made.peak_memory / 2**30:.1f} GiB of GPU memory")


def _check_usage(conditions: dict[str, object]) -> None:
    """Exactly one thing says what to make."""
    given = [name for name, value in conditions.items() if value is not None]
    if len(given) != 1:
        problem = f"got {' and '.join(given)}" if given else "got none"
        raise typer.BadParameter(f"Give one of {', '.join(conditions)}; {problem}.")
