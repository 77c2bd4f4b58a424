"""Options that commands share."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

DATA, RUN, OPTIMISER, FILES = "Data", "Run", "Optimiser", "Files"


def option(*names: str, panel: str, **settings: object) -> object:
    return typer.Option(*names, rich_help_panel=panel, **settings)


class Backend(str, Enum):
    """Implementations of the ops, by the names of `nova_kernels.dispatch`."""

    auto = "auto"
    reference = "reference"
    triton = "triton"
    cuda = "cuda"
    cpp = "cpp"


class Dtype(str, Enum):
    """Precisions of `--dtype`, by torch's names."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="Folder of videos or images; `shapes` for the built-in world."
    ),
]
Captions = Annotated[
    Path | None,
    option(
        "--captions",
        panel=DATA,
        exists=True,
        dir_okay=False,
        show_default="captions.jsonl of the folder, else a .txt beside each file",
        help='JSONL file: {"file": ..., "caption": ...} or {"file": ..., "label": ...} a line.',
    ),
]
Size = Annotated[
    tuple[int, int], option("--size", panel=DATA, metavar="H W", help="Height and width in pixels.")
]
Frames = Annotated[
    int, option("--frames", panel=DATA, min=1, help="Frames of a clip, 1 + 4n; 1 for images.")
]
Fps = Annotated[float, option("--fps", panel=DATA, help="Frames a second.")]
Clips = Annotated[
    int, option("--clips", panel=DATA, min=1, help="Number of clips drawn, of `shapes`.")
]
ShapesSeed = Annotated[
    int, option("--shapes-seed", panel=DATA, min=0, help="Other seeds draw other `shapes`.")
]
Workers = Annotated[
    int, option("--workers", panel=RUN, min=0, help="Processes that read data; 0: this one.")
]
Device = Annotated[
    str | None,
    option("--device", panel=RUN, show_default="what accelerate finds", help="cpu: no GPU."),
]
Quiet = Annotated[bool, option("--quiet", panel=RUN, help="No progress bars.")]
Out = Annotated[Path, option("--out", panel=FILES, metavar="FOLDER", help="Folder of the run.")]
Steps = Annotated[
    int, option("--steps", panel=RUN, min=1, help="Optimiser steps, earlier ones included.")
]
BatchSize = Annotated[
    int, option("--batch-size", panel=RUN, min=1, help="Clips of a step, over all processes.")
]
MicroBatchSize = Annotated[
    int | None,
    option(
        "--micro-batch-size",
        panel=RUN,
        min=1,
        show_default="its share of the batch",
        help="Clips that a process computes at a time; the rest is accumulated.",
    ),
]
LearningRate = Annotated[float, option("--lr", panel=OPTIMISER, help="Learning rate.")]
Warmup = Annotated[
    int, option("--warmup", panel=OPTIMISER, min=0, help="Steps of the linear warm-up.")
]
Schedule = Annotated[
    str, option("--schedule", panel=OPTIMISER, help="After the warm-up: constant or cosine.")
]
Optimizer = Annotated[
    str,
    option("--optimizer", panel=OPTIMISER, help="adamw, or muon for the matrices of blocks."),
]
WeightDecay = Annotated[
    float, option("--weight-decay", panel=OPTIMISER, help="Of matrices and kernels.")
]
GradNorm = Annotated[
    float, option("--max-grad-norm", panel=OPTIMISER, help="Larger gradients are scaled down.")
]
EMADecay = Annotated[
    float, option("--ema", panel=OPTIMISER, help="Decay of the averaged weights, those to use.")
]
Precision = Annotated[
    str, option("--precision", panel=RUN, help="float32, or bfloat16 (mixed precision).")
]
Seed = Annotated[int, option("--seed", panel=RUN, min=0, help="Of everything random.")]
SaveEvery = Annotated[
    int, option("--save-every", panel=FILES, min=1, help="Steps between checkpoints.")
]
Keep = Annotated[int, option("--keep", panel=FILES, min=1, help="Newest checkpoints kept.")]
LogEvery = Annotated[
    int, option("--log-every", panel=FILES, min=1, help="Steps between rows of metrics.csv.")
]
SampleEvery = Annotated[
    int,
    option("--sample-every", panel=FILES, min=0, help="Steps between contact sheets; 0: none."),
]
Resume = Annotated[
    bool,
    option("--resume", panel=RUN, help="Go on from the newest checkpoint in --out, if any."),
]
