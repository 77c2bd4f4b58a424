"""A byte-level BPE tokenizer trained on sentences, in the files of Phi-2's."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import dependency_error

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(sentences: Iterable[str], vocab_size: int) -> Any:
    """Train a tokenizer of the `tokenizers` library.

    Args:
        vocab_size: at least 257 (bytes and the end of text); fewer entries come out of sentences
            that do not yield as many.

    Raises:
        DependencyError: tokenizers (a part of transformers) is not installed.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise dependency_error(
            "text encoders need tokenizers", "tokenizers", "pip install transformers", error
        ) from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return tokenizer


def end_with(tokenizer: Any, token: str) -> None:
    """Have the tokenizer put a special token after every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(
        single=f"$A {token}", special_tokens=[(token, tokenizer.token_to_id(token))]
    )


def save_tokenizer(tokenizer: Any, folder: Path, max_length: int = 512) -> None:
    """Write the files of Phi-2's tokenizer; every version of transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    config = {
        "tokenizer_class": "CodeGenTokenizerFast",
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": max_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
