"""How fast a video can be at best: counted work at the rates of cards, and of this machine.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --geometry nova-d48w1024-sd512 --batch 1 16 --steps 128

Figures of the named cards are predictions: work counted by benchmarks/work_counts.py, rates of
benchmarks/ceilings.py, which others have measured. This machine's rates are measured here, and its
figures are what they allow, not what runs. No program of this package enters either.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from ceilings import CARDS, Ceilings, measure_ceilings
from clip_lengths import pixel_frames
from fps_table import PUBLISHED
from fps_workloads import RELEASED_VIDEO, check_latent_frames
from measure import machine, results_file, write_rows
from rich.console import Console
from rich.table import Table
from work_counts import VAE, Work, sampling_work, total, vae_work

from nova.config import ModelConfig, named_config
from nova.devices import check_device
from nova.errors import InputError, NovaError
from nova.guidance import Guidance
from nova.pipeline import DEFAULT_LATENT_FRAMES
from nova.schedule import FlowMatchConfig, set_sizes
from nova.vae import VAEConfig


def video_work(
    config: ModelConfig,
    *,
    batch: int,
    num_frames: int,
    num_steps: int,
    num_diffusion_steps: int,
    guidance_scale: float,
    dtype: torch.dtype,
) -> dict[str, Work]:
    """Work of a batch of videos by stage; for video models with the VAE's decoder.

    Args:
        num_frames, num_steps, num_diffusion_steps: T, A and D.
        guidance_scale: of the classifier-free guidance; up to 1 there is none.

    Raises:
        InputError: numbers below 1, or a clip of an image model.
    """
    if min(batch, num_frames) < 1:
        raise InputError(f"batch and latents must be at least 1, got {batch} and {num_frames}")
    check_latent_frames(config, num_frames)
    work = sampling_work(
        config,
        batch=batch,
        num_frames=num_frames,
        set_sizes=set_sizes(config.num_image_tokens, num_steps),
        schedule=FlowMatchConfig().schedule(num_diffusion_steps),
        guidance=Guidance(scale=guidance_scale),
        dtype=dtype,
    )
    if config.is_video:
        work[VAE] = vae_work(VAEConfig.osp(), (num_frames, *config.latent_size), batch, dtype)
    return work


def machine_row(
    name: str, ceilings: Ceilings, kind: str, work: dict[str, Work], batch: int, num_frames: int
) -> dict[str, Any]:
    """What the ceilings of a machine allow.

    Args:
        kind: "predicted", or "measured ceilings".
        num_frames: latent frames.
    """
    sampling = [w for stage, w in work.items() if stage != VAE]
    frames = batch * pixel_frames(num_frames)
    floor = ceilings.floor_seconds(sampling)
    whole = ceilings.floor_seconds(work.values())
    return {
        "machine": name,
        "kind": kind,
        "batch": batch,
        **ceilings.facts(),
        "floor_s": floor,
        "roofline_s": ceilings.roofline_seconds(sampling),
        "fps_at_floor": frames / floor,
        "fps_at_roofline": frames / ceilings.roofline_seconds(sampling),
        "fps_at_floor_with_vae": frames / whole if VAE in work else None,
    }


def print_work(work: dict[str, Work], title: str) -> None:
    """Operations and bytes of every stage."""
    table = Table(title=title)
    table.add_column("stage")
    for name in ("TFLOP", "share", "GB read"):
        table.add_column(name, justify="right")
    operations = total(work.values()).operations
    for stage, w in {**work, "together": total(work.values())}.items():
        share = f"{100 * w.operations / operations:.2f} %"
        table.add_row(stage, f"{w.operations / 1e12:.5g}", share, f"{w.bytes / 1e9:.3g}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """What machines allow."""
    table = Table(title="At best: predictions and bounds, nothing that was run")
    for name in ("machine", "kind"):
        table.add_column(name)
    names = ("TFLOP/s", "GB/s", "batch", "floor s", "roofline s", "FPS at floor", "at roofline")
    for name in (*names, "floor with VAE"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row["machine"], row["kind"], *cells(row))
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)


def cells(row: dict[str, Any]) -> list[str]:
    """Figures of a row as they are printed and stand in docs/benchmarks.md."""
    with_vae = row["fps_at_floor_with_vae"]
    return [
        f"{row['matmul_TFLOP_per_s']:.3g}",
        f"{row['copy_GB_per_s']:.4g}",
        str(row["batch"]),
        f"{row['floor_s']:.3g}",
        f"{row['roofline_s']:.3g}",
        f"{row['fps_at_floor']:.3g}",
        f"{row['fps_at_roofline']:.3g}",
        "-" if with_vae is None else f"{with_vae:.3g}",
    ]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--geometry", default=RELEASED_VIDEO, help="a size of nova.config.NAMED_CONFIGS")
    add("--batch", type=int, nargs="+", default=[1, 24], help="videos at a time")
    add("--latents", type=int, help="latent frames T; default: as trained, 9 at most")
    add("--steps", type=int, default=64, help="autoregressive steps A of a frame")
    add("--diffusion-steps", type=int, default=25, help="diffusion steps D")
    add("--guidance", type=float, default=5.0, help="guidance scale; up to 1: none")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=results_file, help="write the rows to this file")
    return parser


def main() -> int:
    parser = build_parser()
    arguments = parser.parse_args()
    rows = []
    try:
        device = check_device(arguments.device)
        config = named_config(arguments.geometry)
        num_frames = arguments.latents
        if num_frames is None:
            num_frames = min(DEFAULT_LATENT_FRAMES, config.time_base)

        def by_batch(dtype: torch.dtype) -> dict[int, dict[str, Work]]:
            return {
                batch: video_work(
                    config,
                    batch=batch,
                    num_frames=num_frames,
                    num_steps=arguments.steps,
                    num_diffusion_steps=arguments.diffusion_steps,
                    guidance_scale=arguments.guidance,
                    dtype=dtype,
                )
                for batch in arguments.batch
            }

        in_bfloat16 = by_batch(torch.bfloat16)
    except NovaError as error:
        parser.error(str(error))
    numbers = f"T={num_frames} A={arguments.steps} D={arguments.diffusion_steps}"
    first = arguments.batch[0]
    title = f"Work of {arguments.geometry} {numbers}, batch {first}, in bfloat16"
    print_work(in_bfloat16[first], title)
    facts = machine(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    here = measure_ceilings(device, dtype)
    name = str(dtype).removeprefix("torch.")
    for card in CARDS:
        for batch, work in in_bfloat16.items():
            row = machine_row(card.name, card.ceilings, "predicted", work, batch, num_frames)
            rows.append({**row, "source": card.source})
    for batch, work in by_batch(dtype).items():
        kind = f"ceilings measured, {name}"
        rows.append(machine_row(facts["name"], here, kind, work, batch, num_frames))
    print_rows(rows)
    for card in CARDS:
        print(f"Rate of {card.name}: {card.source}. Bandwidth: data sheet.")
    print(
        "Floor: all operations at the rate. Roofline: stage by stage, reading where it is slower."
    )
    if arguments.geometry == RELEASED_VIDEO:
        print(PUBLISHED)
    if arguments.json:
        shared = {"geometry": arguments.geometry, "latent_frames": num_frames}
        shared |= {"steps": arguments.steps, "diffusion_steps": arguments.diffusion_steps}
        write_rows(arguments.json, "roofline.py", facts, [{**shared, **row} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
