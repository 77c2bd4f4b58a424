"""Compare this package with recorded outputs of the reference.

    python benchmarks/parity.py tests/data/golden
    python benchmarks/parity.py tests/data/golden --device cuda --backend triton

Runs every case below the folder (case.json + vectors.safetensors, weights beside them) in float32
and prints the largest relative error of its recorded outputs. Exits with 1 if one exceeds 1e-4, or
if a case cannot be run.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import relative_error
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nova.checkpoint import load_strict
from nova.conditioning import Conditioning
from nova.config import ModelConfig
from nova.devices import check_device
from nova.errors import DeviceError, NovaError
from nova.guidance import Guidance
from nova.model import DEFAULT_FPS, DEFAULT_MOTION_FLOW, NULL_CLASS, NOVATransformer
from nova.noise import NoiseSource
from nova.objective import TrainingDraws, training_losses
from nova.sampling import generate_frames
from nova.schedule import scheduler_from_dict, set_sizes
from nova.vae import CausalVideoVAE, VAEConfig
from nova_kernels.dispatch import BACKENDS
from nova_kernels.errors import in_a_line

TOLERANCE = 1e-4
# Options of a recorded call that this script passes on; any other makes a case unsupported.
GUIDANCE_OPTIONS = {
    "guidance_scale": "scale",
    "min_guidance_scale": "min_scale",
    "guidance_trunc": "trunc",
    "guidance_renorm": "renorm",
    "image_guidance_scale": "image_scale",
}
OTHER_OPTIONS = {
    "num_inference_steps",
    "num_diffusion_steps",
    "max_latent_length",
    "motion_flow",
    "flow_shift",
    "fps",
    "seed",
}

Case = dict[str, Any]
Vectors = dict[str, Tensor]


class Unsupported(Exception):
    """A case of a kind, or with an option, that this script does not know."""


@dataclass(frozen=True)
class Place:
    """Where and by what cases are computed.

    Attributes:
        backend: of the ops, see `nova_kernels.dispatch`.
    """

    device: torch.device = torch.device("cpu")
    backend: str = "auto"


def load_model(case: Case, weights: Path, place: Place = Place()) -> NOVATransformer:
    model = NOVATransformer(ModelConfig.from_dict(case["config"]))
    _load(model, weights)
    model.set_backend(place.backend)
    return model.to(place.device)


def _load(module: nn.Module, weights: Path) -> None:
    load_strict(module, {k: v.float() for k, v in load_file(weights).items()}, str(weights))


def sampling_outputs(
    case: Case,
    vectors: Vectors,
    weights: Path,
    place: Place = Place(),
    sampler: Callable = generate_frames,
) -> Vectors:
    """Run a recorded sampling call; `sampler` may be `generate_frames_plain`."""
    call = case["call"]
    unknown = set(call) - set(GUIDANCE_OPTIONS) - OTHER_OPTIONS
    if unknown:
        raise Unsupported(f"options {sorted(unknown)}")
    model = load_model(case, weights, place).requires_grad_(False)
    guidance = Guidance(
        **{name: call[key] for key, name in GUIDANCE_OPTIONS.items() if key in call}
    )
    if "in.labels" in vectors:
        labels = vectors["in.labels"]
        nulls = torch.full_like(labels, NULL_CLASS)
        conditioning = Conditioning.from_labels(model, labels, nulls, guidance)
    else:
        prompts, negatives = (
            model.text_embed.pad(list(vectors[key])) if key in vectors else None
            for key in ("in.prompt_embeds", "in.negative_prompt_embeds")
        )
        motion = {"motion_flow": call.get("motion_flow", DEFAULT_MOTION_FLOW)}
        motion["fps"] = call.get("fps") or DEFAULT_FPS
        conditioning = Conditioning.from_text(model, prompts, negatives, guidance, **motion)
    given = vectors.get("in.prefill_latents")
    if given is not None and given.dim() == 4:
        given = given[:, :, None]
    generator = torch.Generator().manual_seed(call["seed"])
    frames = sampler(
        model,
        conditioning,
        num_frames=call["max_latent_length"],
        set_sizes=set_sizes(model.config.num_image_tokens, call["num_inference_steps"]),
        schedule=scheduler_from_dict(case["scheduler"]).schedule(
            call["num_diffusion_steps"], call.get("flow_shift")
        ),
        guidance=guidance,
        noise=NoiseSource(generator, case["batch"], dtype=model.dtype, device=model.device),
        given_latents=given,
    )
    new = torch.stack(list(frames), dim=2)
    return {"out.latents": new if given is None else torch.cat([given, new], dim=2)}


def training_outputs(
    case: Case, vectors: Vectors, weights: Path, place: Place = Place()
) -> Vectors:
    """Losses and gradients of a recorded training step."""
    model = load_model(case, weights, place)
    conditioning = Conditioning.from_text(
        model,
        vectors["in.prompt_embeds"],
        None,
        Guidance(scale=1.0),
        motion_flow=case["motion_flow"],
        fps=case["fps"],
    )
    latents = vectors["in.latents"]
    draws = TrainingDraws(
        visible=vectors["draw.prev_ids"][..., 0],
        noise=vectors["draw.noise"],
        timestep_index=vectors["draw.timestep_index"],
    )
    losses = training_losses(
        model,
        latents if latents.dim() == 5 else latents[:, :, None],
        conditioning.tokens,
        draws,
        scheduler_from_dict(case["noise_scheduler"], kind="noise"),
    )
    sum(losses.values()).backward()
    outputs = {f"out.{name}": loss.reshape(1) for name, loss in losses.items()}
    for key in vectors:
        if key.startswith("grad."):
            outputs[key] = model.get_parameter(key.removeprefix("grad.")).grad
    return outputs


@torch.no_grad()
def vae_outputs(case: Case, vectors: Vectors, weights: Path, place: Place = Place()) -> Vectors:
    """Encode and decode what was recorded."""
    vae = CausalVideoVAE(VAEConfig.from_dict(case["config"])).eval()
    _load(vae, weights)
    vae.to(place.device)
    outputs = {}
    for key, x in vectors.items():
        name = key.removeprefix("in.")
        if key.startswith("in.z"):
            # in.z3 -> out.decode3, in.z_image -> out.decode_image
            outputs[f"out.decode{name[1:]}"] = vae.decode(vae.scale(x))
        elif key.startswith("in."):
            outputs[f"out.{name}_mean"], outputs[f"out.{name}_logvar"] = vae.encode_moments(x)
    return outputs


def run_case(folder: Path, place: Place = Place()) -> dict[str, float]:
    """Relative error of every recorded output of a case.

    Raises:
        Unsupported, NovaError: the case cannot be run.
        ValueError, SafetensorError: its files are damaged.
    """
    case = json.loads((folder / "case.json").read_text())
    vectors = load_file(folder / "vectors.safetensors", device=str(place.device))
    weights = folder.parent / case.get("weights", f"weights/{folder.name}.safetensors")
    if "call" in case:
        outputs = sampling_outputs(case, vectors, weights, place)
    elif "losses" in case:
        outputs = training_outputs(case, vectors, weights, place)
    elif "down_block_types" in case.get("config", {}):
        outputs = vae_outputs(case, vectors, weights, place)
    else:
        raise Unsupported("neither a sampling, a training, nor a VAE case")
    recorded = [key for key in vectors if key.startswith(("out.", "grad."))]
    missing = [key for key in recorded if key not in outputs]
    if missing:
        raise Unsupported(f"outputs {missing}")
    if not recorded:
        raise Unsupported("no recorded outputs")
    return {key: relative_error(outputs[key], vectors[key]) for key in recorded}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="of the ops")
    arguments = parser.parse_args()
    try:
        place = Place(check_device(arguments.device), arguments.backend)
    except DeviceError as error:
        parser.error(str(error))
    # Convolutions would round what they read, unlike the recorded ones.
    torch.backends.cudnn.allow_tf32 = False
    cases = sorted(path.parent for path in arguments.folder.glob("*/case.json"))
    if not cases:
        parser.error(f"{arguments.folder} has no cases (folders with a case.json)")
    failed = 0
    for folder in cases:
        try:
            errors = run_case(folder, place)
        except (
            Unsupported,
            NovaError,
            OSError,
            KeyError,
            RuntimeError,  # such as of a backend or a kernel, or too little memory
            ValueError,  # such as of JSON
            SafetensorError,
        ) as error:
            print(f"{folder.name:30} NOT SUPPORTED: {in_a_line(error)}")
            failed += 1
            continue
        worst = max(errors, key=lambda key: (errors[key] != errors[key], errors[key]))
        passed = errors[worst] <= TOLERANCE
        failed += not passed
        print(
            f"{folder.name:30} {'ok' if passed else 'FAILED':7} {errors[worst]:.2e}  "
            f"(worst of {len(errors)}: {worst})",
            flush=True,
        )
    print(f"{len(cases) - failed} of {len(cases)} cases within {TOLERANCE:g}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
