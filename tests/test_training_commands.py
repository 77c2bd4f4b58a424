"""The commands that make models: whole ones, where models begin, what each option is for."""

import shutil
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from calls import Calls
from make_tiny_checkpoint import VAE_CONFIG
from safetensors.torch import load_file
from small_models import SMALL, small_image_codec
from training_data import GradientSource, write_latents
from typer.testing import CliRunner

import nova.data
import nova.training.loop
import nova.training.text_encoder
import nova.training.vae_loop
from nova.checkpoint import write_json
from nova.cli import parts
from nova.cli.app import app
from nova.codec import LatentCodec
from nova.config import named_config
from nova.data import ClipFormat
from nova.errors import CheckpointError, InputError
from nova.generation_config import GenerationConfig
from nova.media import write_video
from nova.pipeline import NOVAPipeline
from nova.schedule import DDPMConfig
from nova.training import (
    TextEncoderOptions,
    TrainingOptions,
    VAETrainingOptions,
    make_text_encoder,
    new_vae,
)

pytestmark = pytest.mark.usefixtures("no_plots")

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


def command(*arguments, exit_code=0):
    result = CliRunner(env={"NO_COLOR": "1"}).invoke(app, [str(word) for word in arguments])
    assert result.exit_code == exit_code, (result.output, result.exception)
    return result


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
    hidden = Calls(monkeypatch, nova.cli.model, "hide_loading_bars", None)
    command("train-text-encoder", "shapes", *SHAPES, "--labels", "--quiet", "--out", tmp_path,
            *flags(TRAIN_TEXT_ENCODER))  # fmt: skip
    ((captions, folder, options), others) = made[0]
    source = nova.data.ShapesSource(4, ClipFormat(1, 64, 64), 3)
    assert captions == [source.caption(index) for index in range(4)] and folder == tmp_path
    assert_all_differ(options, TRAIN_TEXT_ENCODER, TextEncoderOptions)
    assert others["labels"].answers.tolist() == [list(source.labels(index)) for index in range(4)]
    assert others["show_progress"] is False and len(hidden) == 1


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


# Whole commands, and where models begin -------------------------------------------------------


def test_commands_from_clips_to_a_sample(tmp_path, tiny_video_folder):
    """encode, train, generate, on a folder with a broken file."""
    clips = tmp_path / "clips"
    source = GradientSource(3, height=64, width=96)
    for index in range(3):
        write_video(clips / f"{index}.mp4", source[index].frames, 12)
        (clips / f"{index}.txt").write_text(f"a gradient {index}")
    (clips / "1.mp4").write_bytes(b"no video")
    data, out = tmp_path / "data", tmp_path / "run"
    result = command("encode", clips, "--model", tiny_video_folder, "--frames", 5, "--out", data,
                     "--device", "cpu", "--quiet")  # fmt: skip
    assert "2 clips, latents of 4 x 2 x 8 x 12" in result.stdout
    assert "skipped.txt: 1 clips" in result.stdout
    assert "1.mp4" in (data / "skipped.txt").read_text()
    result = command("train", data, "--model", tiny_video_folder, "--out", out, "--steps", 2,
                     "--batch-size", 2, "--device", "cpu", "--quiet", "--sample-every", 2,
                     "--sample-steps", 1, "--sample-diffusion-steps", 1)  # fmt: skip
    checkpoint = out / "checkpoints" / "step-00000002"
    assert f"wrote {checkpoint}" in result.stdout
    # Fine-tuning leaves the motion embedding as it was.
    before, after = (
        load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        for folder in (tiny_video_folder, checkpoint)
    )
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert "motion_embed" not in changed and "image_encoder" in changed
    command("generate", "a gradient", "--model", checkpoint, "--out", tmp_path / "x.png",
            "--steps", 1, "--diffusion-steps", 1, "--device", "cpu", "--quiet")  # fmt: skip


def test_commands_from_nothing(tmp_path):
    """A VAE and a text encoder of shapes, then a model on their encodings."""
    command("train-text-encoder", "shapes", "--clips", 20, "--width", 32, "--layers", 1,
            "--labels", "--steps", 2, "--out", tmp_path / "text", "--quiet")  # fmt: skip
    command("train-vae", "shapes", "--clips", 4, "--size", 64, 64, "--frames", 5, "--config",
            "tiny", "--steps", 1, "--batch-size", 1, "--sample-every", 0, "--device", "cpu",
            "--crop", 32, "--out", tmp_path / "vae", "--quiet")  # fmt: skip
    vae = tmp_path / "vae" / "checkpoints" / "step-00000001" / "vae"
    command("encode", "shapes", "--clips", 3, "--size", 64, 64, "--frames", 5, "--vae", vae,
            "--text-encoder", tmp_path / "text", "--text-length", SMALL.text_token_len,
            "--device", "cpu", "--quiet", "--precision", "bfloat16",
            "--out", tmp_path / "data")  # fmt: skip
    write_json(tmp_path / "config.json", SMALL.to_dict())
    command("train", tmp_path / "data", "--config", tmp_path / "config.json", "--vae", vae,
            "--text-encoder", tmp_path / "text", "--steps", 1, "--batch-size", 2, "--ddpm",
            "--sample-every", 0, "--device", "cpu", "--out", tmp_path / "run",
            "--quiet")  # fmt: skip
    pipeline = NOVAPipeline.from_pretrained(tmp_path / "run" / "checkpoints" / "step-00000001")
    assert isinstance(pipeline.scheduler, DDPMConfig)
    assert pipeline.text_encoder.hidden_size == 32


def test_another_text_encoder_for_a_model(tiny_video_folder, tiny_class_folder, tmp_path):
    """What reads prompts starts anew, everything else stays, and checkpoints have the new one."""
    options = TextEncoderOptions(hidden_size=48, num_heads=3, num_layers=1, steps=0)
    make_text_encoder(["a red circle"], tmp_path / "text", options, show_progress=False)
    before = parts.released_model(tiny_video_folder).model.state_dict()
    renewed = parts.released_model(tiny_video_folder, tmp_path / "text", seed=3)
    assert renewed.model.config.text_token_dim == 48
    after = renewed.model.state_dict()
    assert set(after) == set(before)
    for name, value in after.items():
        if not name.startswith(("text_embed.", "video_encoder.")):
            assert torch.equal(value, before[name].float()), name
    name = "video_encoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(after[name], before[name].float())
    assert renewed.parts.folders == {
        "vae": tiny_video_folder / "vae",
        "text_encoder": tmp_path / "text" / "text_encoder",
        "tokenizer": tmp_path / "text" / "tokenizer",
    }
    with pytest.raises(InputError, match="takes class labels"):
        parts.released_model(tiny_class_folder, tmp_path / "text")
    with pytest.raises(CheckpointError, match="config.json is missing"):
        parts.released_model(tiny_video_folder, tmp_path)
    write_json(tmp_path / "text" / "text_encoder" / "config.json", {"model_type": "phi"})
    with pytest.raises(CheckpointError, match="has no hidden_size; it is no text encoder's config"):
        parts.released_model(tiny_video_folder, tmp_path / "text")


def test_where_models_begin(tmp_path):
    """By name, from a configuration, from a folder."""
    named = parts.fresh_model("tiny-video", None, None, ddpm=False, seed=0)
    assert named.model.config == named_config("tiny-video")
    with pytest.raises(InputError, match="big is neither a file nor one of the sizes nova-d48"):
        parts.fresh_model("big", None, None, ddpm=False, seed=0)
    LatentCodec(new_vae(VAE_CONFIG, 3)).save(tmp_path)
    opened = parts.open_vae(None, tmp_path, 0)
    assert torch.equal(opened.encoder.conv_in.weight, new_vae(VAE_CONFIG, 3).encoder.conv_in.weight)
    fresh = parts.open_vae(str(tmp_path / "config.json"), None, 5)
    assert torch.equal(fresh.encoder.conv_in.weight, new_vae(VAE_CONFIG, 5).encoder.conv_in.weight)
    small_image_codec().save(tmp_path / "image")
    with pytest.raises(InputError, match="holds an image VAE; only video VAEs are trained here"):
        parts.open_vae(None, tmp_path / "image", 0)


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["train", "absent", "--config", "tiny-video"], 1, "make encoded data with: nova encode"),
        (["train", "x", "--config", "a", "--model", "b"], 2, "Give one of --model and --config"),
        (["train", "x", "--model", "b", "--ddpm"], 2, "go with --config"),
        (["train", "x", "--config", "a", "--precision", "half"], 1, "precision must be one of"),
        (["encode", "absent", "--vae", "v"], 2, "Give --size"),
        (["encode", "x", "--vae", "v", "--precision", "half"], 2, "must be one of float32"),
        (["train-text-encoder", "absent", "--labels"], 2, "known of shapes alone"),
        (["encode", "x", "--model", "m", "--vae", "v"], 2, "Give one of --model and --vae"),
        (
            ["train-vae", "x", "--size", "8", "8", "--config", "tiny", "--vae", "v"],
            2,
            "Give one of --config and --vae",
        ),
        (["train-vae", "absent", "--size", "64", "64", "--config", "tiny"], 1, "is not a folder"),
        (["train-vae", "shapes", "--size", "64", "64", "--config", "no"], 1, "neither a file nor"),
    ],
)
def test_bad_usage(tmp_path, arguments, code, message):
    result = command(*arguments, "--out", tmp_path / "out", exit_code=code)
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_a_fine_tuned_model_keeps_its_recommendations(tiny_video_folder, tmp_path):
    shutil.copytree(tiny_video_folder, tmp_path / "model")
    recommended = GenerationConfig(num_inference_steps=16, guidance_scale=2.5)
    recommended.write(tmp_path / "model")
    found = parts.released_model(tmp_path / "model").parts
    assert found.generation_config == recommended


def test_quiet_commands_show_no_bars_of_loading(tmp_path, tiny_video_folder):
    transformers = pytest.importorskip("transformers", minversion="5")  # shows none before
    logging = transformers.utils.logging
    logging.enable_progress_bar()
    arguments = ("encode", "shapes", "--clips", 1, "--frames", 5, "--model", tiny_video_folder,
                 "--device", "cpu", "--out")  # fmt: skip
    assert "Loading weights" in command(*arguments, tmp_path / "loud").stderr
    result = command(*arguments, tmp_path / "quiet", "--quiet")
    assert "Loading weights" not in result.stderr
