"""A tiny random language model and its tokenizer, for tests and the demo checkpoint.

    python scripts/tiny_text_encoder.py FOLDER

writes FOLDER/text_encoder and FOLDER/tokenizer, laid out as in a released checkpoint.
"""

import argparse
from itertools import product
from pathlib import Path

import torch
from transformers import PhiConfig, PhiModel

from nova.training.tokenizer import END_OF_TEXT, save_tokenizer, train_tokenizer

COLOURS = "red green blue yellow white orange purple pink grey black cyan magenta".split()
SHAPES = "square circle triangle ball box star disc ring cross diamond".split()
MOTIONS = (
    "moves to the left",
    "moves to the right",
    "moves up",
    "moves down",
    "stands still",
    "bounces",
    "rotates slowly",
    "rotates quickly",
    "grows",
    "shrinks",
    "falls from the top to the bottom",
    "moves in a circle",
)


def make_tiny_text_encoder(
    folder, *, hidden_size=32, num_layers=2, num_heads=4, vocab_size=512, seed=0
):
    """Write a random Phi model and a byte-level BPE tokenizer trained on shapes that move.

    Args:
        folder: parent of the two new folders; created if missing.
        hidden_size: width of the embeddings, a multiple of 4 * num_heads.
        vocab_size: 257 (bytes and the end of text) up to what the sentences yield.
        seed: of the weights; torch's global generator stays as it is.

    Returns:
        (text_encoder_dir, tokenizer_dir) as paths.
    """
    text_encoder_dir, tokenizer_dir = Path(folder, "text_encoder"), Path(folder, "tokenizer")
    tokenizer = train_tokenizer(_sentences(), vocab_size)
    save_tokenizer(tokenizer, tokenizer_dir)
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    config = PhiConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=512,
        # Far above the usual 0.02: untrained, the tokens should still influence each other.
        initializer_range=0.2,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PhiModel(config)
    model.save_pretrained(text_encoder_dir)
    return text_encoder_dir, tokenizer_dir


def _sentences():
    return [
        f"{article} {colour} {shape} {motion} on a {background} background."
        for article, colour, shape, motion, background in product(
            ("a", "A", "The"), COLOURS, SHAPES, MOTIONS, ("white", "black")
        )
    ]


def main():
    parser = argparse.ArgumentParser(description="Write a tiny random text encoder.")
    parser.add_argument("folder", help="where text_encoder/ and tokenizer/ go")
    parser.add_argument("--hidden-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for path in make_tiny_text_encoder(
        options.folder, hidden_size=options.hidden_size, seed=options.seed
    ):
        print(path)


if __name__ == "__main__":
    main()
