"""Peak memory and time of the parts of video generation.

    python benchmarks/memory.py vae
    python benchmarks/memory.py vae --frames 17 --height 240 --width 384 --json memory.json
    python benchmarks/memory.py sampling --geometry nova-d48w1024-osp480 --sets 2

Every measurement runs in a process of its own, with random weights. On a CPU the peak is that of
the whole process (resident set: libraries, weights, activations, result), on a GPU it is what
torch allocated there, weights included. The time is that of the one call, without warming up.

To add a part: write `measure_<part>(arguments)`, which prepares, calls `measured` and returns a
row, give it a subcommand in `build_parser` and name it in `PARTS`.
"""

import argparse
import datetime
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from argument_types import positive_float, positive_int
from replace_text import replace_text

ROOT = Path(__file__).resolve().parent.parent


def measure_vae(arguments: argparse.Namespace) -> dict[str, Any]:
    """Decode (or encode) one video with the released VAE geometry."""
    import torch

    from nova.vae import CausalVideoVAE, VAEConfig

    config = VAEConfig.osp()
    frames, height, width = arguments.frames, arguments.height, arguments.width
    if (frames - 1) % config.temporal_factor:
        raise SystemExit(f"--frames must be 1 + {config.temporal_factor} n, got {frames}")
    if height % config.spatial_factor or width % config.spatial_factor:
        raise SystemExit(
            f"--height and --width must be multiples of {config.spatial_factor}, got "
            f"{height} and {width}"
        )
    torch.manual_seed(0)
    vae = CausalVideoVAE(config, tile_latents=arguments.tile_latents)
    vae.to(arguments.device, getattr(torch, arguments.dtype)).eval()
    if arguments.memory_budget is not None:
        vae.memory_budget = round(arguments.memory_budget * 1e9)
    if arguments.tile_pixels:
        vae.enable_tiling(arguments.tile_pixels, arguments.tile_pixels // 4)

    if arguments.encode:
        x = torch.rand(1, config.in_channels, frames, height, width) * 2 - 1
    else:
        latent_frames = 1 + (frames - 1) // config.temporal_factor
        factor = config.spatial_factor
        x = torch.randn(1, config.latent_channels, latent_frames, height // factor, width // factor)
    with torch.no_grad():
        call = vae.encode if arguments.encode else vae.decode
        row = measured(lambda: call(x), arguments.device)
    row["what"] = f"vae {'encode' if arguments.encode else 'decode'}"
    row["geometry"] = f"{frames} x {height} x {width}"
    return row


def measure_sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Sample latents with a named geometry: no text encoder, no VAE."""
    import torch
    from random_model import RandomModelRun

    from nova.config import named_config

    device = torch.device(arguments.device)
    # The released video model is too slow for a CPU.
    default = "nova-d48w1024-osp480" if device.type == "cuda" else "small-video"
    name = arguments.geometry or default
    config = named_config(name)
    if not config.text_token_dim:
        raise SystemExit(f"{name} takes no text; choose another --geometry")
    # 33 pixel frames, or the most that the geometry is for.
    latents = arguments.latents or min(9, config.video_base_size[0])
    run = RandomModelRun(
        name,
        batch=arguments.batch,
        num_frames=latents,
        num_steps=arguments.steps,
        num_diffusion_steps=arguments.diffusion_steps,
        num_sets=arguments.sets,
        device=device,
        dtype=getattr(torch, arguments.dtype),
    )
    row = measured(run.sample, arguments.device)
    geometry = f"{name} T={latents} A={arguments.steps} D={arguments.diffusion_steps}"
    row["what"] = "sampling"
    row["geometry"] = f"{geometry} batch {arguments.batch}"
    if arguments.sets:
        row["geometry"] += f", {run.sets_run} of {run.sets_of_video} sets"
    return row


# Subcommand -> what its process runs.
PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "vae": measure_vae,
    "sampling": measure_sampling,
}


def measured(call: Callable[[], Any], device: str) -> dict[str, Any]:
    """Run `call` once; its time, the peak memory of this process or of the GPU, the machine."""
    import torch
    from measure import PeakBytes, machine, timed

    where = torch.device(device)
    peak = PeakBytes(where)
    _, latency = timed(call, where)
    return {
        "peak_memory_bytes": peak.read(),
        "latency_s": round(latency, 3),
        "machine": machine(where),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="cpu", help="such as cpu or cuda")
    common.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    common.add_argument("--json", type=Path, help="append the row to this file, a list of rows")
    common.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parts = parser.add_subparsers(dest="part", required=True)

    vae = parts.add_parser("vae", parents=[common], help="the video VAE alone")
    vae.add_argument("--frames", type=positive_int, default=33)
    vae.add_argument("--height", type=positive_int, default=480)
    vae.add_argument("--width", type=positive_int, default=768)
    vae.add_argument("--encode", action="store_true", help="encode in place of decode")
    vae.add_argument("--tile-latents", type=positive_int, default=5, help="latent frames of a tile")
    vae.add_argument(
        "--tile-pixels", type=positive_int, help="cut frames into square tiles of this size"
    )
    vae.add_argument(
        "--memory-budget",
        type=positive_float,
        help="GB for hidden tensors; default 6 on a CPU, most of the free memory on a GPU",
    )

    sampling = parts.add_parser("sampling", parents=[common], help="the transformer alone")
    sampling.add_argument("--geometry", help="a size of nova.config.NAMED_CONFIGS")
    sampling.add_argument("--batch", type=positive_int, default=1)
    sampling.add_argument(
        "--latents", type=positive_int, help="latent frames; default 9 (33 frames) or 5"
    )
    sampling.add_argument(
        "--steps", type=positive_int, default=64, help="autoregressive steps a frame"
    )
    sampling.add_argument("--diffusion-steps", type=positive_int, default=25)
    sampling.add_argument(
        "--sets", type=positive_int, help="stop after so many sets of the first frame"
    )
    return parser


def earlier_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file that can be written; none if it is new.

    Raises:
        SystemExit: it cannot be read or written, or holds something else.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = json.loads(path.read_text() or "[]") if path.exists() else []
        with path.open("a"):  # what is in it stays
            pass
    except (OSError, ValueError) as error:
        raise SystemExit(f"--json: {path} cannot be used: {error}") from error
    if not isinstance(rows, list):
        raise SystemExit(f"--json: {path} holds no list of rows; name another file")
    return rows


def main(argv: list[str]) -> None:
    arguments = build_parser().parse_args(argv)
    if arguments.worker:
        sys.path.insert(0, str(ROOT))
        from nova.devices import check_device
        from nova.errors import NovaError

        try:
            check_device(arguments.device)
            print(json.dumps(PARTS[arguments.part](arguments)))
        except NovaError as error:
            raise SystemExit(str(error)) from error
        return
    rows = [] if arguments.json is None else earlier_rows(arguments.json)
    # On some systems a process starts with its parent's peak, so this one must not import torch,
    # nor `measure`, which does.
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--worker"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise SystemExit(f"the measurement failed with exit status {result.returncode}")
    row = json.loads(result.stdout.splitlines()[-1])
    row = {
        "what": row["what"],
        "geometry": row["geometry"],
        "dtype": arguments.dtype,
        "peak_memory_bytes": row["peak_memory_bytes"],
        "latency_s": row["latency_s"],
        "machine": row["machine"],
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/memory.py", *argv]),
    }
    print(json.dumps(row, indent=1))
    if arguments.json:
        replace_text(arguments.json, json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
