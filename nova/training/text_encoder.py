"""A small text encoder made from captions alone: a Phi model trained as a language model."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..checkpoint import shared_file_mode
from ..data.seeds import keyed_generator
from ..errors import CheckpointError, DependencyError, InputError
from .tokenizer import END_OF_TEXT, save_tokenizer, train_tokenizer

_IGNORED = -100  # of cross entropy: padding


@dataclass(frozen=True)
class TextEncoderOptions:
    """Size of a text encoder, and how it is trained.

    Attributes:
        hidden_size: width of the embeddings (`text_token_dim` of a NOVA config), a multiple of
            4 * num_heads.
        vocab_size: at most; 257 (bytes and the end of text) at least.
        max_length: tokens of a caption; longer ones are cut.
        steps, batch_size, learning_rate: of AdamW, with a cosine schedule after a short warm-up.
            0 steps leave random weights.
        seed: of weights and order.

    Raises:
        InputError: a value that is out of range.
    """

    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    vocab_size: int = 512
    max_length: int = 64
    steps: int = 500
    batch_size: int = 32
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = (self.hidden_size, self.num_layers, self.num_heads, self.max_length)
        if min(*sizes, self.batch_size) < 1 or min(self.steps, self.seed) < 0:
            raise InputError("sizes must be at least 1, steps and seed not negative")
        if self.hidden_size % (4 * self.num_heads):
            raise InputError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 * {self.num_heads} heads"
            )
        if self.vocab_size < 257:
            raise InputError(f"vocab_size must be at least 257, got {self.vocab_size}")


def make_text_encoder(
    captions: Sequence[str],
    folder: str | os.PathLike,
    options: TextEncoderOptions | None = None,
    *,
    on_step: Callable[[int, float], None] | None = None,
    show_progress: bool = True,
) -> tuple[Path, Path]:
    """Train a tokenizer and a small Phi model on captions, to predict the next token.

    Args:
        captions: sentences; repeated ones count as often as they are there.
        folder: parent of the new folders text_encoder/ and tokenizer/, as in a checkpoint.
        on_step: called with the number of steps done and the loss, in nats a token.

    Returns:
        The two folders, which `TextEncoder.from_folders` opens.

    Raises:
        InputError: no captions.
        DependencyError: transformers is not installed.
    """
    options = options or TextEncoderOptions()
    if not captions:
        raise InputError("a text encoder needs captions to learn from")
    try:
        from transformers import PhiConfig, PhiForCausalLM
    except ImportError as error:
        raise DependencyError(
            "text encoders need transformers: pip install transformers"
        ) from error
    folder = Path(folder).expanduser()
    text_encoder_dir, tokenizer_dir = folder / "text_encoder", folder / "tokenizer"
    tokenizer = train_tokenizer(captions, options.vocab_size)
    end = tokenizer.token_to_id(END_OF_TEXT)
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = PhiForCausalLM(config)
    tokens = [
        [*encoding.ids[: options.max_length - 1], end]
        for encoding in tokenizer.encode_batch(list(captions))
    ]
    _fit(model, tokens, options, on_step, show_progress)
    try:
        save_tokenizer(tokenizer, tokenizer_dir)
        model.base_model.save_pretrained(text_encoder_dir)
        for path in text_encoder_dir.glob("*.safetensors"):
            path.chmod(shared_file_mode())
    except OSError as error:
        raise CheckpointError(f"the text encoder cannot be saved: {error}") from error
    return text_encoder_dir, tokenizer_dir


def _fit(
    model: torch.nn.Module,
    tokens: list[list[int]],
    options: TextEncoderOptions,
    on_step: Callable[[int, float], None] | None,
    show_progress: bool,
) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=0.01)
    warmup = max(options.steps // 20, 1)
    generator = keyed_generator(options.seed)
    for step in tqdm(range(options.steps), desc="text encoder", disable=not show_progress):
        rows = torch.randint(len(tokens), (options.batch_size,), generator=generator).tolist()
        inputs, targets = _batch([tokens[row] for row in rows])
        # Padding is on the right: with causal attention no real token sees it.
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED)
        cosine = 0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * step / options.steps)).item()
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min((step + 1) / warmup, cosine)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, loss.item())
    model.eval()


def _batch(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Padded inputs (B, n) and targets (B, n), shifted by one."""
    length = max(len(row) for row in rows)
    inputs = torch.zeros(len(rows), length, dtype=torch.long)
    targets = torch.full((len(rows), length), _IGNORED)
    for index, row in enumerate(rows):
        inputs[index, : len(row)] = torch.tensor(row)
        targets[index, : len(row) - 1] = torch.tensor(row[1:])
    return inputs, targets
