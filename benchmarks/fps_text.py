"""The text encoder that fps.py times: a checkpoint's, or Phi-2's layers with random weights."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measure import timed
from random_model import RandomModelRun

from nova.text import TextEncoder

PHI_2 = "phi-2"  # what the released models read prompts with
SIZES = {
    # The config.json of microsoft/phi-2.
    PHI_2: {
        "vocab_size": 51200,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "partial_rotary_factor": 0.4,
    },
}
PROMPT = "a red circle above a blue square"


class RandomTokens:
    """In place of a tokenizer: as many tokens as a prompt has words."""

    def __init__(self, vocabulary: int):
        self._vocabulary = vocabulary

    def __call__(self, prompts: Sequence[str], **_: Any) -> SimpleNamespace:
        ids = [torch.randint(self._vocabulary, (len(p.split()),)).tolist() for p in prompts]
        return SimpleNamespace(input_ids=ids)


def make_text_encoder(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    max_length: int,
    checkpoint: Path | None = None,
) -> TextEncoder:
    """A text encoder on a device.

    Args:
        name: of `SIZES`; weights are random.
        max_length: most tokens of a prompt.
        checkpoint: open this folder's instead.
    """
    if checkpoint is not None:
        folders = checkpoint / "text_encoder", checkpoint / "tokenizer"
        return TextEncoder.from_folders(
            *folders, max_length=max_length, torch_dtype=dtype, device=device
        )
    # Imported late: it takes seconds, and most runs do without.
    from transformers import PhiConfig, PhiModel

    config = PhiConfig(**SIZES[name])
    torch.manual_seed(0)
    with device:
        module = PhiModel(config).to(dtype)
    return TextEncoder(module, RandomTokens(config.vocab_size), max_length)


def text_seconds(
    encoder: TextEncoder, run: RandomModelRun, device: torch.device, repeats: int
) -> float:
    """Median seconds from a run's number of different sentences to what the video encoder reads.

    The first time warms up and does not count.
    """
    prompts = [f"{PROMPT}, {number}" for number in range(run.batch)]

    def work() -> None:
        run.condition(encoder.encode(prompts))

    times = [timed(work, device)[1] for _ in range(repeats + 1)]
    return statistics.median(times[1:])
