"""Every option of the commands that make models reaches what it is for."""

from dataclasses import asdict, fields
from pathlib import Path

import pytest
from training_data import write_latents
from typer.testing import CliRunner

import nova.data
import nova.training.loop
import nova.training.text_encoder
import nova.training.vae_loop
from nova.cli import parts
from nova.cli.app import app
from nova.data import ClipFormat
from nova.training import TextEncoderOptions, TrainingOptions, VAETrainingOptions

RUN = {
    "--steps": ("steps", 7),
    "--batch-size": ("batch_size", 6),
    "--micro-batch-size": ("micro_batch_size", 3),
    "--lr": ("learning_rate", 0.125),
    "--warmup": ("warmup_steps", 5),
    "--schedule": ("schedule", "cosine"),
    "--weight-decay": ("weight_decay", 0.25),
    "--max-grad-norm": ("max_grad_norm", 0.75),
    "--ema": ("ema_decay", 0.5),
    "--precision": ("precision", "bfloat16"),
    "--seed": ("seed", 11),
    "--save-every": ("save_every", 13),
    "--keep": ("keep", 17),
    "--log-every": ("log_every", 19),
    "--sample-every": ("sample_every", 23),
    "--workers": ("workers", 2),
    "--resume": ("resume", True),
    "--device": ("device", "cpu"),
    "--quiet": ("progress", False),
}
TRAIN = RUN | {
    "--optimizer": ("optimizer", "muon"),
    "--loss-repeats": ("loss_repeats", 9),
    "--prompt-dropout": ("prompt_dropout", 0.375),
    "--mask-ratio-std": ("mask_ratio_std", 0.625),
    "--mask-ratio-min": ("mask_ratio_min", 0.0625),
    "--train-motion": ("freeze_motion", False),
    "--activation-checkpointing": ("activation_checkpointing", 3),
    "--sample-prompt": ("sample_prompts", ("a cat",)),
    "--sample-steps": ("sample_steps", 29),
    "--sample-diffusion-steps": ("sample_diffusion_steps", 31),
    "--sample-guidance": ("sample_guidance", 2.5),
}
TRAIN_VAE = RUN | {
    "--crop": ("crop", 16),
    "--freeze-encoder": ("freeze_encoder", True),
    "--kl-weight": ("kl_weight", 0.1),
    "--mse-weight": ("mse_weight", 0.2),
    "--edge-weight": ("edge_weight", 0.3),
}
TRAIN_TEXT_ENCODER = {
    "--width": ("hidden_size", 48),
    "--layers": ("num_layers", 3),
    "--heads": ("num_heads", 6),
    "--vocabulary": ("vocab_size", 300),
    "--steps": ("steps", 5),
    "--batch-size": ("batch_size", 7),
    "--lr": ("learning_rate", 0.125),
    "--seed": ("seed", 11),
}
# What has no flag.
OF_PYTHON = {
    TrainingOptions: {
        "min_learning_rate", "betas", "mask_ratio_mean", "freeze_text_norm", "num_samples",
    },
    VAETrainingOptions: {"min_learning_rate", "betas", "optimizer", "scale_clips", "num_samples"},
    TextEncoderOptions: {"max_length"},
}  # fmt: skip


class Calls(list):
    """What a function of the package was called with, in place of its work."""

    def __init__(self, monkeypatch, owner, name, result):
        super().__init__()

        def record(*args, **kwargs):
            self.append((args, kwargs))
            return result

        monkeypatch.setattr(owner, name, record)


def command(*arguments):
    result = CliRunner(env={"NO_COLOR": "1"}).invoke(app, [str(word) for word in arguments])
    assert result.exit_code == 0, (result.output, result.exception)


def flags(options):
    """The words of a command line: flags alone where a value is a truth value."""
    words = []
    for flag, (_, value) in options.items():
        value = value[0] if isinstance(value, tuple) else value
        words += [flag] if isinstance(value, bool) else [flag, value]
    return words


def assert_all_differ(given, options, kind):
    """Every option has the value of its flag, none its default; no option lacks a flag."""
    values = asdict(given)
    assert {name: values[name] for name, _ in options.values()} == dict(options.values())
    defaults = {field.name: field.default for field in fields(kind)}
    assert all(defaults[name] != value for name, value in options.values())
    assert {name for name, _ in options.values()} == defaults.keys() - OF_PYTHON[kind] - {"out"}


@pytest.fixture(scope="module")
def fresh():
    return parts.fresh_model("small-video", None, None, ddpm=False, seed=0)


@pytest.fixture
def data(tmp_path):
    return write_latents(tmp_path / "data").folder


def test_train(tmp_path, data, fresh, monkeypatch):
    calls = Calls(monkeypatch, nova.training.loop, "train", tmp_path)
    models = Calls(monkeypatch, parts, "fresh_model", fresh)
    command("train", data, "--config", "small-video", "--vae", "a", "--text-encoder", "b",
            "--ddpm", "--max-latent-length", 2, "--out", tmp_path / "run",
            *flags(TRAIN))  # fmt: skip
    ((_, _, dataset, options, _), _), *others = calls
    assert not others and options.out == tmp_path / "run" and dataset.latent_shape[1] == 2
    assert_all_differ(options, TRAIN, TrainingOptions)
    assert models == [(("small-video", Path("a"), Path("b")), {"ddpm": True, "seed": 11})]


@pytest.mark.parametrize(
    "words, frozen", [([], True), (["--train-motion"], False), (["--freeze-motion"], True)]
)
def test_train_a_checkpoint(tmp_path, data, fresh, monkeypatch, words, frozen):
    calls = Calls(monkeypatch, nova.training.loop, "train", tmp_path)
    models = Calls(monkeypatch, parts, "released_model", fresh)
    command("train", data, "--model", "m", "--text-encoder", "t", "--out", tmp_path / "r", *words)
    assert models == [(("m", Path("t"), 0), {})]
    assert calls[0][0][3].freeze_motion == frozen


SHAPES = ("--clips", 4, "--shapes-seed", 3)


def test_train_vae(tmp_path, monkeypatch):
    calls = Calls(monkeypatch, nova.training.vae_loop, "train_vae", tmp_path)
    command("train-vae", "shapes", *SHAPES, "--config", "tiny", "--size", 32, 48, "--frames", 5,
            "--out", tmp_path / "run", *flags(TRAIN_VAE))  # fmt: skip
    ((_, source, options), _), *others = calls
    assert not others and options.out == tmp_path / "run"
    assert_all_differ(options, TRAIN_VAE, VAETrainingOptions)
    assert source.describe() == nova.data.ShapesSource(4, ClipFormat(5, 32, 48), 3).describe()


def test_train_text_encoder(tmp_path, monkeypatch):
    made = Calls(monkeypatch, nova.training.text_encoder, "make_text_encoder", ("a", "b"))
    command("train-text-encoder", "shapes", *SHAPES, "--labels", "--quiet", "--out", tmp_path,
            *flags(TRAIN_TEXT_ENCODER))  # fmt: skip
    ((captions, folder, options), others) = made[0]
    source = nova.data.ShapesSource(4, ClipFormat(1, 64, 64), 3)
    assert captions == [source.caption(index) for index in range(4)] and folder == tmp_path
    assert_all_differ(options, TRAIN_TEXT_ENCODER, TextEncoderOptions)
    assert others["labels"].answers.tolist() == [list(source.labels(index)) for index in range(4)]
    assert others["show_progress"] is False


def test_encode(tmp_path, monkeypatch):
    index = nova.data.shards.ShardIndex({}, (4, 2, 4, 6), 32, scaling_factor=1.0, shift_factor=0.0)
    encoded = Calls(monkeypatch, nova.data, "encode_clips", index)
    opened = Calls(monkeypatch, parts, "load_encoders", ("codec", "text encoder", None))
    command(
        "encode", "shapes", *SHAPES, "--vae", "v", "--text-encoder", "t", "--text-length", 9,
        "--size", 32, 48, "--frames", 5, "--out", tmp_path, "--shard-size", 2, "--dtype", "float32",
        "--batch-size", 3, "--precision", "bfloat16", "--workers", 2, "--device", "cpu", "--quiet",
    )  # fmt: skip
    (model, vae, text_encoder, length, device, precision), _ = opened[0]
    assert (model, vae, text_encoder, length) == (None, Path("v"), Path("t"), 9)
    assert (str(device), precision) == ("cpu", "bfloat16")
    (source, *given), options = encoded[0]
    assert source.describe() == nova.data.ShapesSource(4, ClipFormat(5, 32, 48), 3).describe()
    assert given == [tmp_path, "codec", "text encoder"]
    assert options == {
        "shard_size": 2, "batch_size": 3, "dtype": "float32", "workers": 2, "show_progress": False,
    }  # fmt: skip
