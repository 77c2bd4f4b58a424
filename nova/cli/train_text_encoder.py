"""`nova train-text-encoder`: a small text encoder and its tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..training.options import TextEncoderOptions
from . import options as shared
from .errors import DebugOption
from .options import FILES, RUN, option
from .sources import SHAPES, echo, open_source

if TYPE_CHECKING:
    from ..data import ShapesSource
    from ..training.text_encoder import CaptionLabels


def train_text_encoder(
    source: shared.Source,
    *,
    out: Annotated[
        Path,
        option("--out", panel=FILES, metavar="FOLDER", help="Gets text_encoder/ and tokenizer/."),
    ],
    captions: shared.Captions = None,
    clips: shared.Clips = 10_000,
    shapes_seed: shared.ShapesSeed = 0,
    width: Annotated[
        int, option("--width", panel=RUN, min=16, help="Of the embeddings.")
    ] = TextEncoderOptions.hidden_size,
    layers: Annotated[
        int, option("--layers", panel=RUN, min=1, help="Blocks.")
    ] = TextEncoderOptions.num_layers,
    heads: Annotated[
        int, option("--heads", panel=RUN, min=1, help="Attention heads.")
    ] = TextEncoderOptions.num_heads,
    vocabulary: Annotated[
        int, option("--vocabulary", panel=RUN, min=257, help="Tokens, at most.")
    ] = TextEncoderOptions.vocab_size,
    steps: Annotated[
        int, option("--steps", panel=RUN, min=0, help="Optimiser steps.")
    ] = TextEncoderOptions.steps,
    batch_size: Annotated[
        int, option("--batch-size", panel=RUN, min=1, help="Captions.")
    ] = TextEncoderOptions.batch_size,
    lr: Annotated[
        float, option("--lr", panel=RUN, help="Learning rate.")
    ] = TextEncoderOptions.learning_rate,
    labels: Annotated[
        bool,
        option(
            "--labels",
            panel=RUN,
            help="Learn to tell what a caption says (shapes only), not its next token.",
        ),
    ] = False,
    seed: shared.Seed = 0,
    quiet: shared.Quiet = False,
    debug: DebugOption = False,
) -> None:
    """Train a small text encoder and its tokenizer on captions alone.

    nova train-text-encoder shapes --labels --clips 60000 --steps 5000 --out runs/text
    """
    from ..errors import NovaError
    from ..training.text_encoder import make_text_encoder, make_text_folders
    from .model import hide_loading_bars

    if labels and source != SHAPES:
        raise typer.BadParameter(
            "what captions say is known of shapes alone; leave --labels out", param_hint="--labels"
        )
    options = TextEncoderOptions(
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        vocab_size=vocabulary,
        steps=steps,
        batch_size=batch_size,
        learning_rate=lr,
        seed=seed,
    )
    # Frames are not read, whatever their size and rate.
    clip_source = open_source(source, 1, 64, 64, 12.0, captions, clips, shapes_seed)
    # Before captions are read, which are drawn one by one where they are of shapes.
    make_text_folders(out)
    sentences = []
    for index in range(len(clip_source)):
        try:
            sentences.append(clip_source.caption(index))
        except NovaError as error:
            echo(f"left out: {error}")
    if quiet:
        hide_loading_bars()
    losses: list[float] = []
    folders = make_text_encoder(
        [sentence for sentence in sentences if sentence],
        out,
        options,
        labels=_shapes_labels(clip_source) if labels else None,
        on_step=lambda _, loss: losses.append(loss),
        show_progress=not quiet,
    )
    if losses:
        unit = "caption" if labels else "token"
        echo(f"loss {losses[0]:.3f} to {losses[-1]:.3f} nats a {unit}")
    echo(f"wrote {folders[0]} and {folders[1]}")


def _shapes_labels(source: "ShapesSource") -> "CaptionLabels":
    import torch

    from ..shapes.labels import QUESTIONS
    from ..training.text_encoder import CaptionLabels

    answers = torch.tensor([source.labels(index) for index in range(len(source))])
    return CaptionLabels(answers, tuple(len(possible) for possible in QUESTIONS.values()))
