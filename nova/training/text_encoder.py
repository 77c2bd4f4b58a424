"""A small text encoder made from captions: a Phi model that predicts tokens or what they say."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checkpoint import write_files
from ..data.seeds import keyed_generator
from ..devices import torch_defaults
from ..errors import CheckpointError, InputError, dependency_error
from ..output_folder import make_output_folder
from .divergence import DivergenceError
from .options import TextEncoderOptions
from .text_objectives import LabelObjective, NextTokenObjective
from .tokenizer import END_OF_TEXT, end_with, save_tokenizer, train_tokenizer


@dataclass(frozen=True)
class CaptionLabels:
    """What captions say, as answers to the same questions for each.

    Attributes:
        answers: int64 (captions, questions), the number of the right answer.
        sizes: how many answers each question has.

    Raises:
        InputError: shapes that do not fit, or an answer that is out of range.
    """

    answers: Tensor
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        answers = self.answers
        if answers.dtype != torch.int64 or answers.dim() != 2:
            raise InputError(f"answers must be int64 (captions, questions), got {answers.dtype}")
        if answers.shape[1] != len(self.sizes):
            raise InputError(f"{answers.shape[1]} answers a caption, but {len(self.sizes)} sizes")
        if (answers < 0).any() or (answers >= torch.tensor(self.sizes)).any():
            raise InputError("an answer lies beyond its question's size")


def make_text_folders(folder: str | os.PathLike) -> tuple[Path, Path]:
    """Find out before long work whether a text encoder can be written into a folder.

    Args:
        folder: parent of text_encoder/ and tokenizer/; made if it is absent.

    Returns:
        These two folders, which do not exist, or are empty.

    Raises:
        InputError: one of them is there already.
        MediaError: the folder cannot be made, or not be written into.
    """
    folder = Path(folder).expanduser()
    make_output_folder(folder)
    folders = folder / "text_encoder", folder / "tokenizer"
    for path in folders:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise InputError(f"{path} is there already; choose another folder, or delete it")
    return folders


@torch.inference_mode(False)  # gradients are wanted, whatever the caller has turned off
def make_text_encoder(
    captions: Sequence[str],
    folder: str | os.PathLike,
    options: TextEncoderOptions | None = None,
    *,
    labels: CaptionLabels | None = None,
    on_step: Callable[[int, float], None] | None = None,
    show_progress: bool = True,
) -> tuple[Path, Path]:
    """Train a tokenizer and a small Phi model on captions.

    Args:
        captions: sentences; repeated ones count as often as they are there.
        folder: parent of the new folders text_encoder/ and tokenizer/, as in a checkpoint.
        labels: what the captions say. The model then learns to tell it at a token that the
            tokenizer puts after every prompt (`LabelObjective`); without labels it learns to
            predict the next token.
        on_step: called with the number of steps done and the loss, in nats a token (with labels:
            a caption).

    Returns:
        The two folders, which `TextEncoder.from_folders` opens.

    Raises:
        InputError: no captions, labels of other captions, or a text encoder in the folder already.
        MediaError: the folder cannot be made, or not be written into.
        CheckpointError: the text encoder cannot be saved; the two folders are not there then.
        DivergenceError: a loss or gradient is not finite; nothing is written then.
        DependencyError: transformers is not installed.
    """
    options = options or TextEncoderOptions()
    if len(captions) == 0:  # an array has no truth value
        raise InputError("a text encoder needs captions to learn from")
    if labels is not None and len(labels.answers) != len(captions):
        raise InputError(f"{len(labels.answers)} rows of labels for {len(captions)} captions")
    try:
        from transformers import PhiConfig, PhiModel
    except ImportError as error:
        raise dependency_error(
            "text encoders need transformers", "transformers", "pip install transformers", error
        ) from error
    text_encoder_dir, tokenizer_dir = make_text_folders(folder)
    tokenizer = train_tokenizer(captions, options.vocab_size)
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokens = [
        [*encoding.ids[: options.max_length - 1], end]
        for encoding in tokenizer.encode_batch(list(captions))
    ]
    config = PhiConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=options.hidden_size,
        intermediate_size=4 * options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        max_position_embeddings=max(options.max_length, 512),
        bos_token_id=end,
        eos_token_id=end,
    )
    sizes = config.hidden_size, config.vocab_size
    with torch.random.fork_rng(devices=[]), torch_defaults(torch.float32, "cpu"):
        torch.manual_seed(options.seed)
        model = PhiModel(config)
        if labels is None:
            objective = NextTokenObjective(*sizes)
        else:
            noise = keyed_generator(options.seed, 1)
            objective = LabelObjective(*sizes, labels.answers, labels.sizes, noise)
            end_with(tokenizer, END_OF_TEXT)
    _fit(model, objective, tokens, options, on_step, show_progress)
    try:
        save_tokenizer(tokenizer, tokenizer_dir)
        write_files(text_encoder_dir, model.save_pretrained)
    except BaseException as error:  # Ctrl-C too: what is left would refuse the next attempt
        for path in (text_encoder_dir, tokenizer_dir):
            shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):  # a full disk is the latter
            raise CheckpointError(f"the text encoder cannot be saved: {error}") from error
        raise
    return text_encoder_dir, tokenizer_dir


def _fit(
    model: nn.Module,
    objective: nn.Module,
    tokens: list[list[int]],
    options: TextEncoderOptions,
    on_step: Callable[[int, float], None] | None,
    show_progress: bool,
) -> None:
    model.train()
    parameters = [*model.parameters(), *objective.parameters()]
    optimizer = torch.optim.AdamW(parameters, options.learning_rate, weight_decay=0.01)
    warmup = max(options.steps // 20, 1)
    generator = keyed_generator(options.seed)
    for step in tqdm(range(options.steps), desc="text encoder", disable=not show_progress):
        rows = torch.randint(len(tokens), (options.batch_size,), generator=generator)
        ids, lengths = _batch([tokens[row] for row in rows.tolist()])
        # Padding is on the right: with causal attention no real token sees it.
        hidden = model(input_ids=ids, use_cache=False).last_hidden_state
        loss = objective(hidden, ids, lengths, rows)
        cosine = 0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * step / options.steps)).item()
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min((step + 1) / warmup, cosine)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not (loss.isfinite() and norm.isfinite()):
            raise DivergenceError(
                f"step {step}: the loss is {loss.item()} and the gradient norm {norm.item()}. "
                "Lower the learning rate"
            )
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, loss.item())
    model.eval()


def _batch(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Padded ids (B, n) and lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return ids, lengths
