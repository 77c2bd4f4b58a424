"""How much a model makes of its prompts: the training loss under captions that say a wrong thing.

    python benchmarks/prompt_use.py --model shapes
    python benchmarks/prompt_use.py --model runs/nova/checkpoints/step-00001000 --scenes 200

A minute in place of sampled videos, to see during a training which facts have begun to count.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from measure import machine
from torch import Tensor
from tqdm.auto import tqdm

import nova
from nova import shapes
from nova.codec import to_pixels
from nova.conditioning import Conditioning
from nova.errors import InputError, NovaError
from nova.guidance import Guidance
from nova.media import check_writable
from nova.motion import motion_score
from nova.objective import draw_training_noise, training_losses
from nova.shapes.geometry import SHAPES
from nova.shapes.vocabulary import BACKGROUNDS, COLORS, DIRECTIONS

FRAMES = 5  # two latent frames: in the first is what there is, in the second how it moves
FIRST, SECOND = "first latent", "second latent"
BATCH = 20
REPEATS = 4  # noise draws of a token
SEED = 91
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
TURNED = {"above": "left of", "below": "right of", "left of": "above", "right of": "below"}


@dataclass(frozen=True)
class Change:
    """A scene told wrongly, and the latent frame that shows it."""

    name: str
    shown_in: str
    tell: Callable[[shapes.Scene], shapes.Scene]


@dataclass(frozen=True)
class Rise:
    """By how much the loss rises: mean over batches and its standard error."""

    change: str
    shown_in: str
    rise: float
    standard_error: float


def _with_objects(scene: shapes.Scene, field: str, words: tuple[str, str]) -> shapes.Scene:
    """The scene with one field of its two objects replaced."""
    things = (replace(t, **{field: word}) for t, word in zip(scene.objects, words, strict=True))
    return replace(scene, objects=tuple(things))


def _exchanged(field: str) -> Callable[[shapes.Scene], shapes.Scene]:
    def tell(scene: shapes.Scene) -> shapes.Scene:
        first, second = (getattr(thing, field) for thing in scene.objects)
        return _with_objects(scene, field, (second, first))

    return tell


def _another(field: str, words: tuple[str, ...]) -> Callable[[shapes.Scene], shapes.Scene]:
    """The first object's word replaced by the next one that neither object has."""

    def tell(scene: shapes.Scene) -> shapes.Scene:
        first, second = (getattr(thing, field) for thing in scene.objects)
        return _with_objects(scene, field, (_next(words, first, second), second))

    return tell


def _next(words: tuple[str, ...], word: str, *others: str) -> str:
    start = words.index(word) + 1
    return next(w for w in words[start:] + words[:start] if w not in (word, *others))


def _opposite(motion: str) -> str:
    angle = (DIRECTIONS[motion] + 180) % 360
    return next(name for name, other in DIRECTIONS.items() if other == angle)


CHANGES = (
    Change("shapes exchanged", FIRST, _exchanged("shape")),
    Change("colours exchanged", FIRST, _exchanged("color")),
    Change("relation inverted", FIRST, lambda s: replace(s, relation=INVERSE[s.relation])),
    Change("relation turned", FIRST, lambda s: replace(s, relation=TURNED[s.relation])),
    Change("another shape", FIRST, _another("shape", SHAPES)),
    Change("another colour", FIRST, _another("color", tuple(COLORS))),
    Change(
        "another background",
        FIRST,
        lambda s: replace(s, background=_next(tuple(BACKGROUNDS), s.background)),
    ),
    Change(
        "opposite motion",
        SECOND,
        lambda s: _with_objects(s, "motion", (_opposite(s.objects[0].motion), s.objects[1].motion)),
    ),
)


def scenes(count: int) -> Iterator[shapes.Scene]:
    """Scenes of two different shapes, of which the first moves in one of eight directions."""
    number = found = 0
    while found < count:
        rng = np.random.default_rng((SEED, number))
        scene = shapes.sample_scene(
            rng, held_out=None, num_objects=2, motions=(*DIRECTIONS, "still")
        )
        number += 1
        first, second = scene.objects
        if first.motion in DIRECTIONS and first.shape != second.shape:
            found += 1
            yield scene


def caption(scene: shapes.Scene) -> str:
    return f"{shapes.describe(scene)} on a {scene.background} background"


@torch.no_grad()
def measure(
    pipeline: nova.NOVAPipeline, count: int, *, show_progress: bool = True
) -> tuple[dict[str, float], list[Rise]]:
    """Losses under true captions, and how they rise for each of `CHANGES`.

    All image tokens are masked, so that the first latent has to come from the prompt alone, and
    all captions of a scene are held against the same noise.

    Raises:
        InputError: too few scenes, or not a text-to-video model with a VAE and a text encoder.
    """
    if count < 2 * BATCH:
        raise InputError(f"--scenes must be at least {2 * BATCH}, got {count}")
    config = pipeline.config
    if pipeline.vae is None or pipeline.text_encoder is None or not config.is_video:
        raise InputError("this needs a text-to-video model with vae/, text_encoder/, tokenizer/")
    drawn = list(scenes(count - count % BATCH))
    true, wrong = [], []
    for start in tqdm(range(0, len(drawn), BATCH), desc="prompts", disable=not show_progress):
        batch = drawn[start : start + BATCH]
        clips = [shapes.render(scene, FRAMES, *config.image_size) for scene in batch]
        latents = pipeline.vae.encode(to_pixels(clips), sample=False, batch_size=BATCH)
        latents = latents.to(pipeline.device, pipeline.transformer.dtype)
        flow = [motion_score(clip, shapes.FPS) for clip in clips]
        losses = [
            _losses(pipeline, latents, [caption(tell(scene)) for scene in batch], flow, start)
            for tell in (lambda scene: scene, *(change.tell for change in CHANGES))
        ]
        true.append(losses[0])
        wrong.append(losses[1:])
    true_losses = np.array(true)  # (batches, latents)
    rises = np.array(wrong) - true_losses[:, None]  # (batches, changes, latents)
    results = []
    for change, values in zip(CHANGES, rises.transpose(1, 2, 0), strict=True):
        of_batches = values[(FIRST, SECOND).index(change.shown_in)]
        error = of_batches.std(ddof=1) / len(of_batches) ** 0.5
        results.append(Rise(change.name, change.shown_in, float(of_batches.mean()), float(error)))
    means = true_losses.mean(0)
    return {FIRST: float(means[0]), SECOND: float(means[1])}, results


def _losses(
    pipeline: nova.NOVAPipeline, latents: Tensor, captions: list[str], flow: list[float], seed: int
) -> tuple[float, float]:
    """Losses of the first and of the second latent frame."""
    model, config = pipeline.transformer, pipeline.config
    prompts = model.text_embed.pad(pipeline.text_encoder.encode(captions))
    prefix = Conditioning.from_text(
        model, prompts, None, Guidance(1.0), motion_flow=flow, fps=shapes.FPS
    ).tokens
    draws = draw_training_noise(
        latents,
        (config.num_image_tokens, config.token_dim),
        pipeline.scheduler,
        mask_ratio=1.0,
        repeats=REPEATS,
        generator=torch.Generator(latents.device).manual_seed(seed),
    )
    losses = training_losses(model, latents, prefix, draws, pipeline.scheduler)
    return losses["loss_t2i"].item(), losses["loss_i2i"].item()


def table(losses: dict[str, float], rises: list[Rise]) -> str:
    lines = [f"loss of the {name}: {loss:.4f}" for name, loss in losses.items()]
    lines.append(f"{'told wrongly':20} {'shown in':14} {'the loss rises by':>24}")
    lines += [
        f"{r.change:20} {r.shown_in:14} {r.rise:+12.4f} (s.e. {r.standard_error:.4f})"
        for r in rises
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="shapes", help="checkpoint folder or id")
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the figures")
    arguments = parser.parse_args(argv)
    try:
        if arguments.out is not None:
            check_writable(arguments.out, (".json",))
        pipeline = nova.NOVAPipeline.from_pretrained(arguments.model, torch_dtype=torch.float32)
        losses, rises = measure(pipeline, arguments.scenes)
    except NovaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(losses, rises))
    if arguments.out is not None:
        facts = {
            "machine": machine(pipeline.device),
            "command": shlex.join(["python", "benchmarks/prompt_use.py", *argv]),
            "model": arguments.model,
            "scenes": arguments.scenes,
            "losses": losses,
            "rises": [vars(rise) for rise in rises],
        }
        arguments.out.write_text(json.dumps(facts, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
