"""Whole training runs: losses, checkpoints, exact resuming, several processes."""

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
from small_models import SMALL, SMALL_IMAGE
from training_data import GradientSource, write_latents
from training_runs import (
    FLOW,
    GRADIENTS_OFF,
    Stop,
    assert_same_files,
    compiled,
    losses_of,
    run,
    run_vae,
    stop_after,
)
from typer.testing import CliRunner

from nova.checkpoint import CheckpointError, write_json
from nova.cli.app import app
from nova.codec import LatentCodec
from nova.errors import DeviceError, InputError, MediaError
from nova.generation_config import GenerationConfig
from nova.media import read_image
from nova.pipeline import NOVAPipeline
from nova.schedule import DDPMConfig
from nova.training import (
    DivergenceError,
    FrozenParts,
    TrainingOptions,
    VAETrainingOptions,
    new_model,
    new_vae,
    train,
    train_vae,
)
from nova.training import run as training_run
from nova.training.checkpoints import Checkpoints
from nova.training.metrics import MetricsFile, plot_metrics, read_metrics
from nova.training.options import OPTIMIZERS

pytestmark = pytest.mark.usefixtures("no_plots")
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_latents(tmp_path_factory.mktemp("latents"))


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
    with pytest.raises(Stop):
        run(tmp_path / "cut", data, steps=5, optimizer=optimizer, on_step=stop_after(3))
    assert [row[0] for row in losses_of(tmp_path / "cut")] == [1, 2, 3]
    resumed = run(tmp_path / "cut", data, steps=5, optimizer=optimizer, resume=True)
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    assert [row[0] for row in losses_of(tmp_path / "cut")] == [1, 2, 3, 4, 5]
    assert_same_files(whole, resumed)


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
    with pytest.raises(Stop):
        run(tmp_path / "cut", data, micro_batch_size=2, on_step=stop_after(2))
    run(tmp_path / "cut", data, micro_batch_size=1, resume=True)
    expected, found = (np.array(losses_of(tmp_path / n), float) for n in ("whole", "cut"))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_resuming_with_activation_checkpointing(tmp_path, data):
    whole = run(tmp_path / "whole", data)
    with pytest.raises(Stop):
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
    with pytest.raises(InputError, match="was started with optimizer='adamw'"):
        run(tmp_path, data, steps=6, optimizer="muon", resume=True)
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


def test_the_other_kind_of_run_does_not_go_on(tmp_path, data):
    source, message = GradientSource(4, num_frames=1), "another kind of run; nova train and"
    run_vae(tmp_path / "vae", source, steps=1)
    run(tmp_path / "model", data, steps=1)
    with pytest.raises(InputError, match=message):
        run(tmp_path / "vae", data, resume=True)
    with pytest.raises(InputError, match=message):
        run_vae(tmp_path / "model", source, resume=True)


def test_checkpoints_older_than_an_option_go_on(tmp_path, data):
    path = run(tmp_path, data, steps=1) / "training_state" / "progress.json"
    progress = json.loads(path.read_text())
    del progress["options"]["optimizer"]
    path.write_text(json.dumps(progress))
    run(tmp_path, data, steps=2, resume=True)


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


def test_sheets_that_the_scheduler_cannot_draw(tmp_path, data, tiny_video_folder):
    """Found before the first step, not at the first sheet."""
    options = {"parts": FrozenParts.of(tiny_video_folder), "scheduler": DDPMConfig(20)}
    with pytest.raises(InputError, match="num_diffusion_steps must be at most 20, got 25"):
        run(tmp_path, data, sample_diffusion_steps=25, sample_every=1, **options)
    assert not (tmp_path / "metrics.csv").exists()


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


def test_what_a_user_puts_beside_checkpoints_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    copy, file = (checkpoints.folder / f"step-00000001{suffix}" for suffix in ("-good", ".zip"))
    copy.mkdir(parents=True)
    file.write_text("")
    (checkpoints.folder / "step-00000009").write_text("")
    assert checkpoints.latest() is None
    for step in (99_999_999, 100_000_000):
        with checkpoints.writing(step) as folder:
            (folder / "x").write_text("whole")
        assert checkpoints.all() == [checkpoints.path(step)]
    assert copy.is_dir() and file.exists()


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
    assert list(checkpoints.folder.iterdir()) == [checkpoints.path(1)]
    with pytest.raises(KeyboardInterrupt), checkpoints.writing(2) as folder:
        (folder / "x").write_text("half")
        raise KeyboardInterrupt
    assert list(checkpoints.folder.iterdir()) == [checkpoints.path(1)]


def parts_in(folder):
    """Files of the parts that a checkpoint carries along."""
    names = ("vae", "text_encoder", "tokenizer")
    return {
        path.relative_to(folder): path.read_bytes()
        for name in names for path in (folder / name).rglob("*") if path.is_file()
    }  # fmt: skip


def test_parts_outlive_the_checkpoint_they_came_from(tmp_path, data, tiny_video_folder):
    """A run that goes on with its own older checkpoint as the model, which is then removed."""
    first = run(tmp_path, data, parts=FrozenParts.of(tiny_video_folder), steps=1, keep=1)
    expected = parts_in(first)
    assert {path.parts[0] for path in expected} == {"vae", "text_encoder", "tokenizer"}
    last = run(
        tmp_path, data, parts=FrozenParts.of(first), steps=4, save_every=1, keep=1, resume=True
    )
    assert not first.exists()
    assert parts_in(last) == expected


def test_parts_that_are_gone_lose_no_checkpoint(tmp_path, data, tiny_video_folder):
    """The last checkpoint of the run has them, or else none is written and none removed."""
    vae = Path(shutil.copytree(tiny_video_folder / "vae", tmp_path / "vae"))
    copied = list(vae.iterdir())
    first = run(
        tmp_path / "run", data, parts=FrozenParts(vae), steps=2, save_every=1, keep=1,
        on_step=lambda done, _: shutil.rmtree(vae) if done == 1 else None,
    )  # fmt: skip
    assert parts_in(first).keys() == {path.relative_to(tmp_path) for path in copied}
    parts = FrozenParts(Path(shutil.copytree(first / "vae", vae)))
    with pytest.raises(CheckpointError, match="vae lacks files that it had"):
        run(
            tmp_path / "run", data, parts=parts, steps=4, keep=1, resume=True,
            on_step=lambda done, _: next(vae.glob("*.safetensors")).unlink(),
        )  # fmt: skip
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == [first]


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


def test_parts_of_checkpoints_are_read_before_the_first_step(tiny_video_folder, tmp_path):
    for name, file in (("vae", "config.json"), ("tokenizer", "tokenizer_config.json")):
        folder = Path(shutil.copytree(tiny_video_folder / name, tmp_path / name))
        (folder / file).write_text("[1]")
        with pytest.raises(CheckpointError, match=f"{file} must hold a JSON object"):
            FrozenParts(**{name: folder})
    with pytest.raises(CheckpointError, match="absent is not a folder"):
        FrozenParts(vae=tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty is an empty folder"):
        FrozenParts(tokenizer=tmp_path / "empty")


def test_a_script_may_change_its_folder(tmp_path, data, tiny_video_folder, monkeypatch):
    shutil.copytree(tiny_video_folder / "vae", tmp_path / "vae")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    last = run(
        "run", data, parts=FrozenParts(vae=Path("vae")), save_every=1, steps=2,
        on_step=lambda *_: os.chdir(tmp_path / "other"),
    )  # fmt: skip
    assert last == tmp_path / "run" / "checkpoints" / "step-00000002"
    assert (last / "vae" / "config.json").exists()
    assert not any((tmp_path / "other").iterdir())


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
