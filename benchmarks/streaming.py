"""When the pixels of a clip are there: by a call, and by streaming it.

    python benchmarks/streaming.py                     # the released 0.6B model; shapes on a CPU
    python benchmarks/streaming.py --model FOLDER --json streaming.json --plot streaming.png

One clip, decoded, from the prompt to frames on the CPU. A call gives all frames at once; a stream
gives them as the VAE finishes tiles of latent frames. On a GPU also with decoding beside sampling,
and all from CUDA graphs. docs/benchmarks.md describes what is measured.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from argument_types import positive_float
from card_facts import card_facts
from fps_plot import check_plot
from fps_rows import Row, workload_name
from fps_text import PROMPT
from fps_vae import make_vae
from fps_workloads import RELEASED, Workload, choose_workloads
from measure import check_file, keep_rows, machine
from rich.console import Console
from rich.table import Table
from streaming_runs import WayRuns, run_ways, ways

import nova
from nova.devices import check_device
from nova.model import DEFAULT_FPS
from nova.schedule import FlowMatchConfig


def make_pipeline(
    workload: Workload, device: torch.device, dtype: torch.dtype
) -> tuple[nova.NOVAPipeline, dict[str, Any]]:
    """A checkpoint's pipeline and a sentence, or random weights and a random prompt.

    Raises:
        NovaError: no video model, or a checkpoint that cannot be opened.
    """
    folder, config = workload.checkpoint, workload.model_config
    if not config.is_video:
        raise nova.InputError(f"{workload.geometry} makes images; choose a video model")
    if folder is not None:
        pipe = nova.NOVAPipeline.from_pretrained(folder, torch_dtype=dtype)
        return pipe.to(device), {"prompt": PROMPT}
    torch.manual_seed(0)
    with device:
        transformer = nova.NOVATransformer(config).to(dtype)
    vae = make_vae(workload.vae, device, dtype)
    pipe = nova.NOVAPipeline(transformer, FlowMatchConfig(), vae, None)
    prompt = torch.randn(1, config.text_token_len, config.text_token_dim, dtype=dtype)
    return pipe, {"prompt_embeds": prompt.to(device)}


def make_row(runs: WayRuns, workload: Workload, rate: float) -> Row:
    """What one way took; figures are those of its median run."""
    row = {
        "way": runs.way.name,
        "geometry": workload.geometry,
        "weights": "random" if workload.checkpoint is None else "checkpoint",
        "latent_frames": workload.num_frames,
        "steps": workload.num_steps,
        "diffusion_steps": workload.num_diffusion_steps,
        "tile_latents": runs.way.tiles.latents,
        "first_frame_alone": runs.way.tiles.first_frame_alone,
        "rate": rate,
    }
    if runs.refused is not None:
        return {**row, "refused": runs.refused}
    median = runs.median
    return {
        **row,
        "frames": median.num_frames,
        "arrivals": [list(piece) for piece in median.pieces],
        "first_s": median.first_s,
        "plays_from_s": median.plays_from(rate),
        "latency_s": median.last_s,
        "latencies_s": [run.last_s for run in runs.runs],
        "fps": median.num_frames / median.last_s,
        "peak_memory_bytes": runs.peak_bytes,
        "levels_from_trained_tiles": runs.levels,
    }


def print_table(rows: Sequence[Row], facts: dict[str, Any]) -> None:
    rate = rows[0]["rate"]
    title = f"{workload_name(rows[0])}, one clip on {facts['name']}, torch {facts['torch']}"
    table = Table(title=title)
    names = ("way", "1st frame, s", "plays from, s", "all, s", "spread", "frames/s", "peak MB")
    for name in (*names, "levels"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        if "refused" in row:
            table.add_row(row["way"], row["refused"], style="dim")
            continue
        times, levels = row["latencies_s"], row["levels_from_trained_tiles"]
        table.add_row(
            row["way"],
            f"{row['first_s']:.2f}",
            f"{row['plays_from_s']:.2f}",
            f"{row['latency_s']:.2f}",
            f"{min(times):.2f}-{max(times):.2f}",
            f"{row['fps']:.3g}",
            f"{row['peak_memory_bytes'] / 2**20:.0f}",
            "-" if levels is None else f"{levels:.2f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        f"plays from: the earliest second to start playing at {rate:g} frames a second without a "
        "pause. Figures are of the run of the median time. levels: of 256, by which values differ "
        "on average from those by the tiles that the VAE was trained for.",
        highlight=False,
    )


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """Write a picture of how many frames were there at what time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        if "refused" in row:
            continue
        seconds, counts = [0.0], [0]
        for second, frames in row["arrivals"]:
            seconds.append(second)
            counts.append(counts[-1] + frames)
        axes.step(seconds, counts, where="post", marker=".", label=row["way"])
    axes.set(xlabel="seconds since the call", ylabel="frames that are there", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--geometry", help="random weights of this size, such as small-video")
    add("--model", help="a checkpoint's folder or hub id, or shapes")
    add("--latents", type=int, help="latent frames T")
    add("--steps", type=int, help="autoregressive steps A of a frame")
    add("--diffusion-steps", type=int, help="diffusion steps D")
    add("--rate", type=positive_float, default=DEFAULT_FPS, help="frames a second of the player")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"])
    add(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        help="sample from CUDA graphs; default: on a GPU",
    )
    add("--repeats", type=int, help="timed runs of each way; default: 3")
    add("--json", type=Path, help="write the rows to this file")
    add("--plot", type=Path, help="draw them into this file, such as streaming.png")
    return parser


def main() -> int:
    parser = build_parser()
    arguments = parser.parse_args()
    try:
        device = check_device(arguments.device)
        on_gpu = device.type == "cuda"
        geometry, model = arguments.geometry, arguments.model
        if geometry is None and model is None:
            geometry, model = (RELEASED.geometry, None) if on_gpu else (None, "shapes")
        [workload] = choose_workloads(
            device.type,
            geometries=None if geometry is None else [geometry],
            model=model,
            vae=True,
            num_frames=arguments.latents,
            num_steps=arguments.steps,
            num_diffusion_steps=arguments.diffusion_steps,
            repeats=arguments.repeats,
        )
        if arguments.plot:
            check_plot(arguments.plot)
        for path in (arguments.json, arguments.plot):
            if path is not None:
                check_file(path)
        dtype = getattr(torch, arguments.dtype or ("bfloat16" if on_gpu else "float32"))
        pipe, prompt = make_pipeline(workload, device, dtype)
        if on_gpu if arguments.cuda_graphs is None else arguments.cuda_graphs:
            pipe.enable_cuda_graphs()
    except nova.NovaError as error:
        parser.error(str(error))
    request = {
        **prompt,
        "max_latent_length": workload.num_frames,
        "num_inference_steps": workload.num_steps,
        "num_diffusion_steps": workload.num_diffusion_steps,
        "disable_progress_bar": True,
    }
    facts = machine(device) | card_facts(device)
    rows: list[Row] = []
    is_written = True

    def keep(seen: list[WayRuns]) -> None:
        """Make their rows, and write them at once: what comes later may not end well."""
        nonlocal rows, is_written
        rows = [make_row(runs, workload, arguments.rate) for runs in seen]
        if arguments.json:
            is_written = keep_rows(arguments.json, "streaming.py", facts, rows)

    run_ways(
        pipe,
        ways(device, pipe.vae.module.tile_latents),
        request,
        repeats=workload.repeats,
        say=lambda line: print(f"  {line}", file=sys.stderr, flush=True),
        keep=keep,
    )
    print_table(rows, facts)
    if arguments.plot:
        draw(arguments.plot, rows, f"{workload_name(rows[0])} on {facts['name']}")
    return 1 if not is_written or any("refused" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
