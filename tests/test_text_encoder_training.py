"""Training text encoders: their objectives, written out caption by caption, and whole runs."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nova.errors import CheckpointError, InputError, MediaError
from nova.text import TextEncoder
from nova.training import (
    CaptionLabels,
    DivergenceError,
    TextEncoderOptions,
    make_text_encoder,
    text_encoder,
)
from nova.training.text_objectives import LabelObjective, NextTokenObjective

HIDDEN, VOCABULARY = 8, 11
IDS = torch.tensor([[4, 2, 9, 7], [5, 1, 0, 0], [3, 6, 8, 0]])
LENGTHS = torch.tensor([4, 2, 3])


@pytest.fixture
def hidden():
    return torch.randn(3, 4, HIDDEN, generator=torch.Generator().manual_seed(0))


def captions(hidden):
    """Every caption's hidden states and token ids, without padding."""
    return [(h[:n], ids[:n]) for h, ids, n in zip(hidden, IDS, LENGTHS.tolist(), strict=True)]


def test_next_tokens(hidden):
    objective = NextTokenObjective(HIDDEN, VOCABULARY)
    losses = [
        cross_entropy(objective.head(state), token)
        for states, ids in captions(hidden)
        for state, token in zip(states[:-1], ids[1:], strict=True)
    ]
    loss = objective(hidden, IDS, LENGTHS, torch.arange(3))
    torch.testing.assert_close(loss, torch.stack(losses).mean())


def test_answers_of_captions(hidden):
    labels = torch.tensor([[0, 4], [1, 2], [1, 0], [0, 1]])
    rows = torch.tensor([2, 0, 3])
    noise = torch.Generator().manual_seed(1)
    objective = LabelObjective(HIDDEN, VOCABULARY, labels, (2, 5), noise)

    def wrong(layer: nn.Linear, state, answers):
        first, second = layer(state).split((2, 5))
        return cross_entropy(first, answers[0]) + cross_entropy(second, answers[1])

    noisy = hidden + 0.3 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    last, early, token = [], [], []
    for (states, ids), row in zip(captions(noisy), rows, strict=True):
        last.append(wrong(objective.last, states[-1], labels[row]))
        early += [wrong(objective.early, state, labels[row]) for state in states]
        token += [cross_entropy(objective.token(s), i) for s, i in zip(states, ids, strict=True)]
    last, early, token = (torch.stack(losses).mean() for losses in (last, early, token))
    torch.testing.assert_close(objective(hidden, IDS, LENGTHS, rows), last + 0.2 * early + token)


def test_a_text_encoder_learns_captions(tmp_path):
    captions = [
        f"a {color} {shape} moving {where}"
        for color in ("red", "green", "blue")
        for shape in ("circle", "square", "star")
        for where in ("left", "right", "up")
    ]
    losses = []
    options = TextEncoderOptions(
        hidden_size=32, num_layers=1, num_heads=2, vocab_size=300, steps=80
    )
    folders = make_text_encoder(
        captions, tmp_path, options, on_step=lambda _, loss: losses.append(loss),
        show_progress=False,
    )  # fmt: skip
    assert losses[-1] < 0.5 * losses[0]
    encoder = TextEncoder.from_folders(*folders, max_length=32)
    (embedding,) = encoder.encode([captions[0]])
    assert embedding.shape[1] == encoder.hidden_size == 32
    assert encoder.tokenizer.decode(encoder.tokenizer(captions[0]).input_ids) == captions[0]
    with pytest.raises(InputError, match="needs captions"):
        make_text_encoder([], tmp_path)
    with pytest.raises(InputError, match="multiple of 4"):
        TextEncoderOptions(hidden_size=30)


def test_a_text_encoder_learns_what_captions_say(tmp_path):
    """Sentences of the same words in another order get embeddings from which that can be read."""
    colors, shapes = ("red", "green", "blue"), ("circle", "square", "star")
    pairs = [(a, b, s, t) for a in colors for b in colors if a != b for s in shapes for t in shapes]
    captions = [f"a {a} {s} above a {b} {t}" for a, b, s, t in pairs]
    answers = [
        [colors.index(a), colors.index(b), shapes.index(s), shapes.index(t)] for a, b, s, t in pairs
    ]
    labels = CaptionLabels(torch.tensor(answers), (3, 3, 3, 3))
    options = TextEncoderOptions(
        hidden_size=32, num_layers=2, num_heads=2, vocab_size=300, steps=250, learning_rate=5e-3
    )
    folders = make_text_encoder(captions, tmp_path, options, labels=labels, show_progress=False)
    encoder = TextEncoder.from_folders(*folders, max_length=32)
    last = torch.stack([embedding[-1] for embedding in encoder.encode(captions)])
    # One linear layer, fitted to half of the captions, answers for the other half.
    inputs = torch.cat([last, torch.ones(len(last), 1)], dim=1)
    targets = torch.cat([torch.eye(3)[column] for column in labels.answers.T], dim=1)
    ridge = inputs[::2].T @ inputs[::2] + 0.1 * torch.eye(33)
    weights = torch.linalg.solve(ridge, inputs[::2].T @ targets[::2])
    guesses = (inputs[1::2] @ weights).unflatten(1, (4, 3)).argmax(-1)
    assert (guesses == labels.answers[1::2]).float().mean() > 0.9
    assert encoder.tokenizer(captions[0]).input_ids[-1] == encoder.tokenizer.eos_token_id
    assert encoder.encode([""])[0].shape == (0, 32)  # still the null prompt


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_turned_off(tmp_path, off):
    options = TextEncoderOptions(hidden_size=32, num_layers=1, num_heads=2, steps=2)
    make_text_encoder(["a red circle"], tmp_path / "on", options, show_progress=False)
    with off():
        make_text_encoder(["a red circle"], tmp_path / "off", options, show_progress=False)
    on, found = (tmp_path / name / "text_encoder/model.safetensors" for name in ("on", "off"))
    assert on.read_bytes() == found.read_bytes()


def test_long_captions_are_cut_and_still_end(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(text_encoder, "_fit", lambda model, _, tokens, *rest: seen.extend(tokens))
    options = TextEncoderOptions(hidden_size=32, num_layers=1, num_heads=2, max_length=4)
    make_text_encoder(["one", "a b c d e f g h"], tmp_path, options, show_progress=False)
    short, long = seen
    assert len(short) < len(long) == 4 and short[-1] == long[-1] not in (*short[:-1], *long[:-1])


@pytest.mark.parametrize(
    "answers, sizes, message",
    [
        ([[0, 1]], (2,), "2 answers a caption, but 1 sizes"),
        ([[0, 2]], (2, 2), "beyond its question's size"),
        ([[0.0, 1.0]], (2, 2), "must be int64"),
    ],
)
def test_caption_labels_that_do_not_fit(answers, sizes, message):
    with pytest.raises(InputError, match=message):
        CaptionLabels(torch.tensor(answers), sizes)


def test_labels_of_other_captions(tmp_path):
    labels = CaptionLabels(torch.tensor([[0], [1]]), (2,))
    with pytest.raises(InputError, match="2 rows of labels for 1 captions"):
        make_text_encoder(["a red circle"], tmp_path, labels=labels)


@pytest.mark.parametrize("function", ["save_tokenizer", "write_files"])
@pytest.mark.parametrize(
    "error, raised, message",
    [
        (
            OSError(28, "No space left on device"),
            CheckpointError,
            "the text encoder cannot be saved: .*No space left",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["full", "stopped"],
)
def test_a_text_encoder_that_is_half_saved(tmp_path, monkeypatch, function, error, raised, message):
    """It goes, so that the next attempt is not refused."""
    save = getattr(text_encoder, function)

    def fail(*arguments):
        save(*arguments)
        raise error

    options = TextEncoderOptions(hidden_size=32, num_heads=2, num_layers=1, steps=0)
    with monkeypatch.context() as patched, pytest.raises(raised, match=message):
        patched.setattr(text_encoder, function, fail)
        make_text_encoder(["a red circle"], tmp_path, options, show_progress=False)
    assert not any(tmp_path.iterdir())
    make_text_encoder(["a red circle"], tmp_path, options, show_progress=False)


def test_a_text_encoder_that_diverges_is_not_written(tmp_path):
    options = TextEncoderOptions(
        hidden_size=32, num_heads=2, num_layers=1, steps=30, learning_rate=1e30
    )
    with pytest.raises(DivergenceError, match="the loss is nan .* Lower the learning rate"):
        make_text_encoder(["a red circle"], tmp_path, options, show_progress=False)
    assert not any(tmp_path.iterdir())


def test_captions_in_an_array(tmp_path):
    options = TextEncoderOptions(hidden_size=32, num_heads=2, num_layers=1, steps=1)
    captions = np.array(["a red circle", "a blue star"])
    make_text_encoder(captions, tmp_path, options, show_progress=False)
    with pytest.raises(InputError, match="needs captions"):
        make_text_encoder(captions[:0], tmp_path, options)


def test_a_text_encoder_that_is_there_stays(tmp_path):
    options = TextEncoderOptions(hidden_size=32, num_heads=2, num_layers=1, steps=0)
    make_text_encoder(["a red circle"], tmp_path, options, show_progress=False)
    with pytest.raises(InputError, match="text_encoder is there already"):
        make_text_encoder(["a red circle"], tmp_path, options, show_progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(MediaError, match="cannot be made"):
        make_text_encoder(["a red circle"], tmp_path / "file", options, show_progress=False)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"num_layers": 0}, "num_layers must be a whole number of at least 1, got 0"),
        ({"steps": -1}, "steps must be a whole number of at least 0, got -1"),
        ({"vocab_size": 256}, "vocab_size must be a whole number of at least 257, got 256"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number of at least 0"),
        ({"learning_rate": -1.0}, "learning_rate must be a finite number of at least 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"seed": 2**64}, r"seed must be at most 2\^62"),
    ],
)
def test_numbers_that_no_run_takes(values, message):
    with pytest.raises(InputError, match=message):
        TextEncoderOptions(**values)
