"""Small training runs, of models and of VAEs, and what is compared of two of them."""

import pytest
import torch
from make_tiny_checkpoint import VAE_CONFIG
from safetensors.torch import load_file
from small_models import SMALL

from nova.schedule import FlowMatchConfig
from nova.training import (
    TrainingOptions,
    VAETrainingOptions,
    new_model,
    new_vae,
    train,
    train_vae,
)
from nova.training.metrics import read_metrics

FLOW = FlowMatchConfig()
GRADIENTS_OFF = pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])


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


def run_vae(out, source, on_step=None, change=None, **values):
    """Train a fresh VAE, or what `change` makes of it; returns the last checkpoint."""
    given = {
        "steps": 4, "batch_size": 2, "save_every": 2, "log_every": 1, "sample_every": 0,
        "warmup_steps": 2, "scale_clips": 4, "device": "cpu", "progress": False,
    }  # fmt: skip
    options = VAETrainingOptions(out=out, **{**given, **values})
    vae = new_vae(VAE_CONFIG)
    return train_vae(vae if change is None else change(vae), source, options, on_step)


class Stop(BaseException):
    pass


def stop_after(step):
    def on_step(done, _):
        if done == step:
            raise Stop

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


def compiled(module, name=""):
    """The module with a part, or all of it, by torch.compile."""
    part = torch.compile(module.get_submodule(name), backend="eager")
    if not name:
        return part
    module.set_submodule(name, part)
    return module
