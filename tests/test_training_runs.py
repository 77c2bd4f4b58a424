"""Whole training runs: losses, checkpoints, exact resuming, several processes, commands."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from make_tiny_checkpoint import VAE_CONFIG
from safetensors.torch import load_file, save_file
from small_models import SMALL, SMALL_IMAGE, small_image_codec
from training_data import GradientSource, write_latents
from typer.testing import CliRunner

from nova.checkpoint import CheckpointError, write_json
from nova.cli import parts
from nova.cli.app import app
from nova.codec import LatentCodec, to_pixels
from nova.config import named_config
from nova.errors import DeviceError, InputError, MediaError
from nova.generation_config import GenerationConfig
from nova.media import read_image, write_video
from nova.pipeline import NOVAPipeline
from nova.schedule import DDPMConfig, FlowMatchConfig
from nova.training import (
    DivergenceError,
    FrozenParts,
    TextEncoderOptions,
    TrainingOptions,
    VAETrainingOptions,
    make_text_encoder,
    new_model,
    new_vae,
    train,
    train_vae,
)
from nova.training import run as training_run
from nova.training.checkpoints import Checkpoints
from nova.training.metrics import MetricsFile, plot_metrics, read_metrics
from nova.training.options import OPTIMIZERS
from nova.training.vae_loop import ClipSamples, detailed_crop

FLOW = FlowMatchConfig()
TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """A plot takes longer than a few steps; one test asks for it."""
    monkeypatch.setattr(training_run, "plot_metrics", lambda folder: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_latents(tmp_path_factory.mktemp("latents"))


def run(
    out, data, *, config=SMALL, scheduler=FLOW, parts=None, on_step=None, change=None, **values
):
    """Train a fresh model, or what `change` makes of it; returns the last checkpoint."""
    given = {
        "steps": 4, "batch_size": 4, "save_every": 2, "log_every": 1, "sample_every": 0,
        "warmup_steps": 2, "freeze_motion": False, "device": "cpu", "progress": False,
    }  # fmt: skip
    options = TrainingOptions(out=out, **{**given, **values})
    model = new_model(config)
    model = model if change is None else change(model)
    return train(model, scheduler, data, options, parts, on_step)


class _Stop(BaseException):
    pass


def stop_after(step):
    def on_step(done, _):
        if done == step:
            raise _Stop

    return on_step


def losses_of(folder):
    columns = ("step", "loss", "loss_t2i", "grad_norm", "learning_rate", "mask_ratio")
    return [tuple(row.get(name) for name in columns) for row in read_metrics(folder)]


def assert_same_files(first, second, trained="transformer/diffusion_pytorch_model"):
    """Two checkpoints hold the same bits."""
    for name in (trained, "training_state/weights", "training_state/optimizer"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (first, second))
        assert set(a) == set(b)
        assert all(torch.equal(a[key], b[key]) for key in a), name


# Learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [FLOW, DDPMConfig()], ids=["flow", "ddpm"])
def test_the_loss_falls_on_one_clip(tmp_path, scheduler):
    data = write_latents(tmp_path / "data", shape=(4, 2, 8, 8), count=1, shards=1)
    losses = []
    run(
        tmp_path / "run", data, scheduler=scheduler, steps=60, learning_rate=3e-3,
        prompt_dropout=0.0, warmup_steps=10, save_every=100,
        on_step=lambda _, result: losses.append(result["loss"]),
    )  # fmt: skip
    first, last = np.mean(losses[:5]), np.mean(losses[-5:])
    assert last < 0.5 * first, (first, last)


GRADIENTS_OFF = pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])


@GRADIENTS_OFF
def test_where_gradients_are_turned_off(tmp_path, data, off):
    models = new_model(SMALL), new_model(SMALL)
    on = run(tmp_path / "on", data, steps=2, change=lambda _: models[0])
    with off():
        found = run(tmp_path / "off", data, steps=2, change=lambda _: models[1])
    assert_same_files(on, found)


# Resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_stopped_run_goes_on_exactly(tmp_path, data, optimizer):
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    whole = run(tmp_path / "whole", data, steps=5, optimizer=optimizer)
    # Between two checkpoints: step 3 is done twice.
    with pytest.raises(_Stop):
        run(tmp_path / "cut", data, steps=5, optimizer=optimizer, on_step=stop_after(3))
    assert [row[0] for row in losses_of(tmp_path / "cut")] == [1, 2, 3]
    resumed = run(tmp_path / "cut", data, steps=5, optimizer=optimizer, resume=True)
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    assert [row[0] for row in losses_of(tmp_path / "cut")] == [1, 2, 3, 4, 5]
    assert_same_files(whole, resumed)


def compiled(module, name=""):
    """The module with a part, or all of it, by torch.compile."""
    part = torch.compile(module.get_submodule(name), backend="eager")
    if not name:
        return part
    module.set_submodule(name, part)
    return module


@pytest.mark.parametrize("part", ["", "image_encoder.blocks.0", "image_decoder"])
def test_a_compiled_model_trains_as_another(tmp_path, data, part, fresh_compiler):
    whole = run(tmp_path / "whole", data)
    for steps in (2, 4):
        cut = run(
            tmp_path / "cut", data, steps=steps, resume=steps == 4,
            change=lambda model: compiled(model, part),
        )  # fmt: skip
    assert_same_files(whole, cut)


def test_worker_processes_change_nothing(tmp_path, data):
    alone, beside = (run(tmp_path / str(n), data, workers=n, steps=2) for n in (0, 2))
    assert_same_files(alone, beside)


def test_resuming_with_other_micro_batches(tmp_path, data):
    """What a step computes does not depend on how it is divided, up to rounding."""
    run(tmp_path / "whole", data)
    with pytest.raises(_Stop):
        run(tmp_path / "cut", data, micro_batch_size=2, on_step=stop_after(2))
    run(tmp_path / "cut", data, micro_batch_size=1, resume=True)
    expected, found = (np.array(losses_of(tmp_path / n), float) for n in ("whole", "cut"))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_resuming_with_activation_checkpointing(tmp_path, data):
    whole = run(tmp_path / "whole", data)
    with pytest.raises(_Stop):
        run(tmp_path / "cut", data, activation_checkpointing=3, on_step=stop_after(2))
    resumed = run(tmp_path / "cut", data, activation_checkpointing=2, resume=True)
    assert_same_files(whole, resumed)


def test_what_a_run_does_not_go_on_with(tmp_path, data):
    run(tmp_path, data)
    with pytest.raises(InputError, match="has checkpoints already; go on with --resume"):
        run(tmp_path, data)
    with pytest.raises(InputError, match="has 4 steps already"):
        run(tmp_path, data, resume=True)
    with pytest.raises(InputError, match="was started with seed=0"):
        run(tmp_path, data, steps=6, seed=1, resume=True)
    with pytest.raises(InputError, match="was started with freeze_motion=False"):
        run(tmp_path, data, steps=6, freeze_motion=True, resume=True)
    state = tmp_path / "checkpoints/step-00000004/training_state"
    weights, moments = (load_file(state / f"{n}.safetensors") for n in ("weights", "optimizer"))
    damaged = {**weights, "model.mask_embed.bos_token": torch.zeros(1, 7)}
    save_file(damaged, state / "weights.safetensors")
    with pytest.raises(CheckpointError, match="training_state does not fit this model: "):
        run(tmp_path, data, steps=6, resume=True)
    save_file(weights, state / "weights.safetensors")
    kept = {name: value for name, value in moments.items() if "bos_token" not in name}
    save_file(kept, state / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match="trained other parameters, such as .*bos_token"):
        run(tmp_path, data, steps=6, resume=True)
    (state / "optimizer.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        run(tmp_path, data, steps=6, resume=True)


def test_a_killed_command_goes_on_exactly(tmp_path, data):
    """SIGKILL, at whatever step: the losses are those of a run that was left alone."""
    write_json(tmp_path / "config.json", SMALL.to_dict())
    arguments = [
        "train", str(data.folder), "--config", str(tmp_path / "config.json"), "--steps", "400",
        "--batch-size", "2", "--save-every", "2", "--log-every", "1", "--sample-every", "0",
        "--warmup", "3", "--device", "cpu", "--quiet",
    ]  # fmt: skip
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "nova", *arguments, "--out", str(out)]
    process = subprocess.Popen(command, cwd=TESTS.parent)
    try:
        deadline = time.monotonic() + 120
        while not Checkpoints(out, 3).all():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed_at = losses_of(out)[-1][0]
    assert killed_at < 400
    # The command's number of steps has no influence with a constant learning rate.
    arguments[arguments.index("400")] = str(killed_at + 2)
    for folder, flags in ((out, ["--resume"]), (tmp_path / "whole", [])):
        result = CliRunner().invoke(app, [*arguments, "--out", str(folder), *flags])
        assert result.exit_code == 0, result.output
    assert losses_of(out) == losses_of(tmp_path / "whole")
    assert not list((out / "checkpoints").glob(".partial*"))


# Checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_samples(tmp_path, data, tiny_video_folder, monkeypatch):
    monkeypatch.setattr(training_run, "plot_metrics", plot_metrics)
    parts = FrozenParts.of(tiny_video_folder)
    sheets = {"sample_every": 2, "num_samples": 2, "sample_steps": 2, "sample_diffusion_steps": 2}
    checkpoint = run(tmp_path, data, parts=parts, steps=2, **sheets)
    pipeline = NOVAPipeline.from_pretrained(checkpoint)
    output = pipeline(
        "a red square",
        num_inference_steps=2,
        num_diffusion_steps=2,
        max_latent_length=2,
        output_type="uint8",
        disable_progress_bar=True,
    )
    assert output.frames.shape == (1, 5, 64, 64, 3)
    index = json.loads((checkpoint / "model_index.json").read_text())
    assert index["vae"] == ["nova", "AutoencoderKLOpenSora"]
    assert index["text_encoder"] == ["transformers", "PhiModel"]
    # The averaged weights, not the last ones.
    last = load_file(checkpoint / "training_state" / "weights.safetensors")
    name = "image_decoder.head.weight"
    assert not torch.equal(pipeline.transformer.state_dict()[name], last[f"model.{name}"])
    # Two rows of five frames, of captions of the data.
    assert read_image(tmp_path / "samples" / "step-00000002.png").shape[1] > 2 * 64
    assert (tmp_path / "metrics.png").stat().st_size > 1000


def test_sheets_of_sentences(tmp_path, data, tiny_video_folder):
    sheets = {"sample_every": 1, "sample_steps": 1, "sample_diffusion_steps": 1}
    run(tmp_path / "a", data, parts=FrozenParts.of(tiny_video_folder), steps=1,
        sample_prompts=("a red square",), **sheets)  # fmt: skip
    assert (tmp_path / "a" / "samples" / "step-00000001.png").exists()
    with pytest.raises(InputError, match="sample_prompts need a text encoder"):
        run(tmp_path / "b", data, parts=FrozenParts(tiny_video_folder / "vae"), steps=1,
            sample_prompts=("a red square",), **sheets)  # fmt: skip


def test_another_vae_than_the_datas(tmp_path, data):
    LatentCodec(new_vae(replace(VAE_CONFIG, scaling_factor=0.7))).save(tmp_path / "vae")
    with pytest.raises(InputError, match="scaling factor 0.5, .*vae has 0.7"):
        run(tmp_path / "run", data, parts=FrozenParts(tmp_path / "vae"))
    LatentCodec(new_vae(replace(VAE_CONFIG, shift_factor=0.2))).save(tmp_path / "shifted")
    with pytest.raises(InputError, match="shift factor 0.0, .*shifted has 0.2"):
        run(tmp_path / "run", data, parts=FrozenParts(tmp_path / "shifted"))


def test_the_newest_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 9, 10):
        with checkpoints.writing(step) as folder:
            (folder / "x").write_text("whole")
    assert sorted(checkpoints.folder.iterdir()) == [checkpoints.path(9), checkpoints.path(10)]
    assert checkpoints.latest() == checkpoints.path(10)


def test_a_failed_checkpoint_leaves_no_folder(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    with checkpoints.writing(1) as folder:
        (folder / "x").write_text("whole")
    with (
        pytest.raises(CheckpointError, match="cannot be written"),
        checkpoints.writing(2) as folder,
    ):
        (folder / "x").write_text("half")
        raise OSError("no space left")
    assert checkpoints.all() == [checkpoints.path(1)]
    checkpoints.clean()
    assert list(checkpoints.folder.iterdir()) == [checkpoints.path(1)]


def test_nan_stops_the_run_and_keeps_the_checkpoint(tmp_path, data):
    options = TrainingOptions(
        out=tmp_path, steps=10, batch_size=2, save_every=2, sample_every=0, device="cpu",
        progress=False,
    )  # fmt: skip
    model = new_model(SMALL)

    def damage(done, _):
        if done == 3:
            model.image_encoder.norm.weight.data.fill_(float("nan"))

    with pytest.raises(DivergenceError, match="step 3: the loss is nan"):
        train(model, FLOW, data, options, on_step=damage)
    assert Checkpoints(tmp_path, 3).all() == [tmp_path / "checkpoints" / "step-00000002"]
    weights = load_file(tmp_path / "checkpoints/step-00000002/training_state/weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_half_written_rows_are_dropped(tmp_path):
    metrics = MetricsFile(tmp_path, 0)
    for step in (1, 2, 3):
        metrics.write({"step": step, "loss": 1 / step})
    with metrics.path.open("a") as file:
        file.write("4")
    MetricsFile(tmp_path, 2)
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]


def test_images_train(tmp_path):
    data = write_latents(tmp_path / "data", shape=(4, 1, 8, 8))
    checkpoint = run(tmp_path / "run", data, config=SMALL_IMAGE, steps=2)
    assert NOVAPipeline.from_pretrained(checkpoint).config == SMALL_IMAGE


def test_images_leave_the_times_of_a_video_model(tmp_path):
    data = write_latents(tmp_path / "data", shape=(4, 1, 8, 8))
    checkpoint = run(tmp_path / "run", data, steps=2)
    after = load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    before = new_model(SMALL).state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert "video_pos_embed" not in changed and "video_encoder" in changed


# Settings of accelerate -----------------------------------------------------------------------


@pytest.fixture
def fresh_accelerate():
    """accelerate reads its environment once a process; the fixture makes it forget that."""
    from accelerate.state import AcceleratorState

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)

    forget()
    yield forget
    forget()


@pytest.mark.parametrize(
    "name, value",
    [("ACCELERATE_MIXED_PRECISION", "bf16"), ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")],
)
def test_settings_of_accelerate_change_no_step(
    tmp_path, data, monkeypatch, fresh_accelerate, name, value
):
    """`accelerate launch` exports those of the user's configuration."""
    monkeypatch.setenv(name, value)
    run(tmp_path / "set", data, steps=2)
    monkeypatch.delenv(name)
    fresh_accelerate()
    run(tmp_path / "plain", data, steps=2)
    assert losses_of(tmp_path / "set") == losses_of(tmp_path / "plain")


def test_an_accelerator_of_another_precision(tmp_path, data, fresh_accelerate):
    from accelerate import Accelerator

    Accelerator(mixed_precision="bf16", cpu=True)
    with pytest.raises(InputError, match="accelerate cannot be set up for training: .*'no'"):
        run(tmp_path, data)


# Several processes ----------------------------------------------------------------------------

_SCRIPT = """
import os, sys
import torch
from safetensors.torch import save_file
from small_models import SMALL
from nova.data import LatentDataset
from nova.schedule import FlowMatchConfig
from nova.training import TrainingOptions, new_model, train

torch.set_num_threads(1)
folder, data = sys.argv[1:]
for steps in (2, 3):
    options = TrainingOptions(
        out=folder + "/run", steps=steps, batch_size=4, micro_batch_size=1, save_every=2,
        log_every=1, sample_every=0, warmup_steps=2, freeze_motion=False, device="cpu",
        progress=False, resume=steps == 3,
    )
    model = new_model(SMALL)
    train(model, FlowMatchConfig(), LatentDataset(data), options)
save_file(model.state_dict(), f"{folder}/rank{os.environ['RANK']}.safetensors")
"""


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="needs torch.distributed with gloo",
)
def test_two_processes_train_as_one(tmp_path, data):
    """Ranks end with equal weights, and with the losses of a run in one process; resumed once."""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
        "--master_port", str(port), str(script), str(tmp_path), str(data.folder),
    ]  # fmt: skip
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": paths}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=180, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr[-2000:]
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    run(tmp_path / "one", data, steps=3, save_every=3, batch_size=4)
    expected, found = (np.array(losses_of(tmp_path / n), float) for n in ("one", "run"))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


# VAE ------------------------------------------------------------------------------------------


def run_vae(out, source, on_step=None, change=None, **values):
    given = {
        "steps": 4, "batch_size": 2, "save_every": 2, "log_every": 1, "sample_every": 0,
        "warmup_steps": 2, "scale_clips": 4, "device": "cpu", "progress": False,
    }  # fmt: skip
    options = VAETrainingOptions(out=out, **{**given, **values})
    vae = new_vae(VAE_CONFIG)
    return train_vae(vae if change is None else change(vae), source, options, on_step)


def test_vae_learns_and_sets_its_scale(tmp_path):
    source = GradientSource(4, broken=(2,))
    results = []
    checkpoint = run_vae(
        tmp_path, source, steps=20, save_every=100, sample_every=20, learning_rate=2e-3,
        ema_decay=0.5, on_step=lambda _, result: results.append(result),
    )  # fmt: skip
    assert results[-1]["loss"] < 0.6 * results[0]["loss"]
    assert results[-1]["psnr"] > results[0]["psnr"] + 2
    codec = LatentCodec.load(checkpoint / "vae")
    pixels = to_pixels([source[i].frames for i in (0, 1, 3)])
    assert codec.encode(pixels, sample=False).std().item() == pytest.approx(1.0, rel=0.05)
    # The averaged weights reconstruct about as well as the last ones.
    error = (codec.decode(codec.encode(pixels, sample=False)) - pixels).clamp(-2, 2)
    assert 10 * np.log10(4 / error.square().mean().item()) > results[0]["psnr"] + 2
    assert read_image(tmp_path / "samples" / "step-00000020.png").ndim == 3


@GRADIENTS_OFF
def test_vaes_where_gradients_are_turned_off(tmp_path, off):
    source = GradientSource(4, num_frames=1)
    vaes = new_vae(VAE_CONFIG), new_vae(VAE_CONFIG)
    on = run_vae(tmp_path / "on", source, steps=2, change=lambda _: vaes[0])
    with off():
        found = run_vae(tmp_path / "off", source, steps=2, change=lambda _: vaes[1])
    assert_same_files(on, found, "vae/diffusion_pytorch_model")


def test_a_stopped_vae_run_goes_on_exactly(tmp_path):
    source = GradientSource(4, num_frames=1)
    whole = run_vae(tmp_path / "whole", source)
    with pytest.raises(_Stop):
        run_vae(tmp_path / "cut", source, on_step=stop_after(3))
    resumed = run_vae(tmp_path / "cut", source, resume=True)
    assert_same_files(whole, resumed, "vae/diffusion_pytorch_model")
    assert [row[1] for row in losses_of(tmp_path / "whole")] == [
        row[1] for row in losses_of(tmp_path / "cut")
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_vaes_when_nothing_can_be_read(tmp_path, workers):
    source = GradientSource(200, broken=range(200))
    with pytest.raises(InputError, match=r"^100 clips in a row cannot be read.*is damaged$"):
        run_vae(tmp_path, source, workers=workers)


def test_a_compiled_vae_trains_as_another(tmp_path, fresh_compiler):
    source = GradientSource(4, num_frames=1)
    whole = run_vae(tmp_path / "whole", source)
    for steps in (2, 4):
        cut = run_vae(
            tmp_path / "cut", source, steps=steps, resume=steps == 4,
            change=lambda vae: compiled(vae, "decoder"),
        )  # fmt: skip
    assert_same_files(whole, cut, "vae/diffusion_pytorch_model")


def test_a_frozen_encoder_keeps_its_latents(tmp_path):
    source = GradientSource(4)
    first = run_vae(tmp_path / "first", source, steps=2)
    start = LatentCodec.load(first / "vae")
    options = VAETrainingOptions(
        out=tmp_path / "second", steps=3, batch_size=2, sample_every=0, ema_decay=0.0,
        freeze_encoder=True, device="cpu", progress=False,
    )  # fmt: skip
    again = train_vae(LatentCodec.load(first / "vae").module, source, options)
    codec = LatentCodec.load(again / "vae")
    pixels = to_pixels([source[0].frames])
    latents = start.encode(pixels, sample=False)
    assert torch.equal(codec.encode(pixels, sample=False), latents)
    assert not torch.equal(codec.decode(latents), start.decode(latents))


def test_vae_on_crops(tmp_path):
    source = GradientSource(4)
    height, width = source.format.height, source.format.width
    sample = ClipSamples(source, VAE_CONFIG, seed=0, crop=16)[0, 0]
    assert sample["pixels"].shape == (3, source.format.num_frames, 16, 16)
    assert sample["noise"].shape[2:] == (2, 2)
    again = ClipSamples(source, VAE_CONFIG, seed=0, crop=16)[0, 0]
    assert torch.equal(sample["pixels"], again["pixels"])
    whole = ClipSamples(source, VAE_CONFIG, seed=0)[0, 0]["pixels"]
    windows = whole.unfold(2, 16, 1).unfold(3, 16, 1)  # (3, T, rows, columns, 16, 16)
    same = (windows == sample["pixels"][:, :, None, None]).all(-1).all(-1).all(0).all(0)
    assert same.any()
    run_vae(tmp_path, source, steps=1, crop=16)
    for crop in (12, 8 * (1 + max(height, width) // 8)):
        with pytest.raises(InputError, match="crop must be a multiple of 8"):
            run_vae(tmp_path / "wrong", source, crop=crop)


def test_crops_show_what_is_there():
    """A small square on plain ground: in two thirds of the crops, in a quarter by chance."""
    pixels = torch.zeros(3, 1, 64, 64)
    pixels[:, :, 20:30, 40:50] = 1
    crops = [detailed_crop(pixels, 16, torch.Generator().manual_seed(k)) for k in range(200)]
    assert sum(bool(crop.any()) for crop in crops) > 120
    plain = (pixels[0, 0].unfold(0, 16, 1).unfold(1, 16, 1).sum((-1, -2)) > 0).float().mean()
    assert plain < 0.35


def test_a_source_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="cannot be read, the last one because: clip"):
        run_vae(tmp_path, GradientSource(3, broken=range(3)))
    with pytest.raises(InputError, match="multiples of 8 for this VAE, got 36 x 32"):
        run_vae(tmp_path, GradientSource(3, height=36))


# Commands -------------------------------------------------------------------------------------


def nova(*arguments):
    result = CliRunner(env={"NO_COLOR": "1"}).invoke(app, [str(text) for text in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_commands_from_clips_to_a_sample(tmp_path, tiny_video_folder):
    """encode, train, generate, on a folder with a broken file."""
    clips = tmp_path / "clips"
    source = GradientSource(3, height=64, width=96)
    for index in range(3):
        write_video(clips / f"{index}.mp4", source[index].frames, 12)
        (clips / f"{index}.txt").write_text(f"a gradient {index}")
    (clips / "1.mp4").write_bytes(b"no video")
    data, out = tmp_path / "data", tmp_path / "run"
    result = nova("encode", clips, "--model", tiny_video_folder, "--frames", 5, "--out", data,
                  "--device", "cpu", "--quiet")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "2 clips, latents of 4 x 2 x 8 x 12" in result.stdout
    assert "skipped.txt: 1 clips" in result.stdout
    assert "1.mp4" in (data / "skipped.txt").read_text()
    result = nova("train", data, "--model", tiny_video_folder, "--out", out, "--steps", 2,
                  "--batch-size", 2, "--device", "cpu", "--quiet", "--sample-every", 2,
                  "--sample-steps", 1, "--sample-diffusion-steps", 1)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    checkpoint = out / "checkpoints" / "step-00000002"
    assert f"wrote {checkpoint}" in result.stdout
    # Fine-tuning leaves the motion embedding as it was.
    before, after = (
        load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        for folder in (tiny_video_folder, checkpoint)
    )
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert "motion_embed" not in changed and "image_encoder" in changed
    result = nova("generate", "a gradient", "--model", checkpoint, "--out", tmp_path / "x.png",
                  "--steps", 1, "--diffusion-steps", 1, "--device", "cpu", "--quiet")  # fmt: skip
    assert result.exit_code == 0, result.stderr


def test_commands_from_nothing(tmp_path):
    """A VAE and a text encoder of shapes, then a model on their encodings."""
    result = nova("train-text-encoder", "shapes", "--clips", 20, "--width", 32, "--layers", 1,
                  "--labels", "--steps", 2, "--out", tmp_path / "text", "--quiet")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    result = nova("train-vae", "shapes", "--clips", 4, "--size", 64, 64, "--frames", 5, "--config",
                  "tiny", "--steps", 1, "--batch-size", 1, "--sample-every", 0, "--device", "cpu",
                  "--crop", 32, "--out", tmp_path / "vae", "--quiet")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    vae = tmp_path / "vae" / "checkpoints" / "step-00000001" / "vae"
    result = nova("encode", "shapes", "--clips", 3, "--size", 64, 64, "--frames", 5, "--vae", vae,
                  "--text-encoder", tmp_path / "text", "--text-length", SMALL.text_token_len,
                  "--device", "cpu", "--quiet", "--precision", "bfloat16",
                  "--out", tmp_path / "data")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    write_json(tmp_path / "config.json", SMALL.to_dict())
    result = nova("train", tmp_path / "data", "--config", tmp_path / "config.json", "--vae", vae,
                  "--text-encoder", tmp_path / "text", "--steps", 1, "--batch-size", 2, "--ddpm",
                  "--sample-every", 0, "--device", "cpu", "--out", tmp_path / "run",
                  "--quiet")  # fmt: skip
    assert result.exit_code == 0, result.stderr
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


def test_parts_of_checkpoints_are_read_before_the_first_step(tiny_video_folder, tmp_path):
    for name, file in (("vae", "config.json"), ("tokenizer", "tokenizer_config.json")):
        folder = Path(shutil.copytree(tiny_video_folder / name, tmp_path / name))
        (folder / file).write_text("[1]")
        with pytest.raises(CheckpointError, match=f"{file} must hold a JSON object"):
            FrozenParts(**{name: folder})
    with pytest.raises(CheckpointError, match="absent is not a folder"):
        FrozenParts(vae=tmp_path / "absent")


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
    result = nova(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == code
    assert message in " ".join(result.stderr.replace("│", " ").split())


# What a run is found out about before it begins ---------------------------------------------------


def test_a_run_goes_on_with_its_scheduler(tmp_path, data):
    run(tmp_path, data, steps=2, scheduler=DDPMConfig(beta_end=0.01))
    with pytest.raises(InputError, match=r"was started with DDPM \(--ddpm\), not flow matching"):
        run(tmp_path, data, resume=True)
    with pytest.raises(InputError, match="a scheduler of beta_end=0.01; go on with the same"):
        run(tmp_path, data, scheduler=DDPMConfig(), resume=True)
    run(tmp_path, data, scheduler=DDPMConfig(beta_end=0.01), resume=True)


def test_checkpoints_recommend_what_the_model_did(tmp_path, data):
    recommended = GenerationConfig(num_inference_steps=16, guidance_scale=2.5)
    checkpoint = run(tmp_path, data, parts=FrozenParts(generation_config=recommended))
    assert GenerationConfig.read(checkpoint) == recommended


def test_a_fine_tuned_model_keeps_its_recommendations(tiny_video_folder, tmp_path):
    shutil.copytree(tiny_video_folder, tmp_path / "model")
    recommended = GenerationConfig(num_inference_steps=16, guidance_scale=2.5)
    recommended.write(tmp_path / "model")
    found = parts.released_model(tmp_path / "model").parts
    assert found.generation_config == recommended


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_in_half_precision_are_not_trained(tmp_path, data, precision):
    """Even where mixed precision would run with them."""
    out, message = tmp_path / "run", "training keeps weights in float32, and these are .*bfloat16"
    model, vae = new_model(SMALL).bfloat16(), new_vae(VAE_CONFIG).bfloat16()
    with pytest.raises(InputError, match=message):
        train(model, FLOW, data, TrainingOptions(out=out, precision=precision))
    with pytest.raises(InputError, match=message):
        train_vae(vae, GradientSource(4), VAETrainingOptions(out=out, precision=precision))
    assert not out.exists()


def wrapped(module):
    """As an adapter wraps a layer."""
    name = next(
        name for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)
    )
    module.set_submodule(name, torch.nn.Sequential(module.get_submodule(name)))
    return module


@pytest.mark.parametrize("start", [run, run_vae])
def test_what_checkpoints_have_no_place_for_is_not_trained(tmp_path, data, start):
    """It would be found when the first checkpoint is due, and what was learned would be lost."""
    source = data if start is run else GradientSource(4)
    with pytest.raises(CheckpointError, match="to train has layers that were wrapped"):
        start(tmp_path / "run", source, change=wrapped)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("start", [run, run_vae])
def test_short_memory_loses_no_checkpoint(tmp_path, data, start):
    def fail(step, _):
        if step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    source = data if start is run else GradientSource(4)
    message = r"out of GPU memory while training.* Use a smaller micro_batch_size \(--micro-batch"
    with pytest.raises(DeviceError, match=message):
        start(tmp_path, source, on_step=fail)
    assert start(tmp_path, source, micro_batch_size=1, resume=True).name == "step-00000004"


@pytest.mark.parametrize("start", [run, run_vae])
def test_a_folder_that_cannot_be_made(tmp_path, data, start):
    (tmp_path / "file").write_text("")
    source = data if start is run else GradientSource(4)
    with pytest.raises(MediaError, match="cannot be made, or not be written into"):
        start(tmp_path / "file", source)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"kl_weight": -1.0}, "kl_weight must be a finite number of at least 0, got -1.0"),
        (
            {"edge_weight": float("nan")},
            "edge_weight must be a finite number of at least 0, got nan",
        ),
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1, got 0"),
        ({"crop": 32.0}, "crop must be a whole number of at least 1, got 32.0"),
        ({"crop": 0}, "crop must be a whole number of at least 1, got 0"),
    ],
)
def test_numbers_that_no_vae_run_takes(tmp_path, values, message):
    with pytest.raises(InputError, match=message):
        VAETrainingOptions(out=tmp_path, **values)


def test_quiet_commands_show_no_bars_of_loading(tmp_path, tiny_video_folder):
    transformers = pytest.importorskip("transformers", minversion="5")  # shows none before
    logging = transformers.utils.logging
    logging.enable_progress_bar()
    arguments = ("encode", "shapes", "--clips", 1, "--frames", 5, "--model", tiny_video_folder,
                 "--device", "cpu", "--out")  # fmt: skip
    assert "Loading weights" in nova(*arguments, tmp_path / "loud").stderr
    result = nova(*arguments, tmp_path / "quiet", "--quiet")
    assert result.exit_code == 0 and "Loading weights" not in result.stderr
