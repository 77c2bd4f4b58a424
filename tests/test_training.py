"""The parts of a training step: draws, schedules, averages, freezing, checkpointing."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import SMALL, SMALL_IMAGE, SMALL_ROTARY, small_model
from torch.distributions import Normal, kl_divergence
from training_data import write_latents

from nova.conditioning import Conditioning
from nova.data import loading
from nova.errors import InputError
from nova.guidance import Guidance
from nova.objective import TrainingDraws, training_losses
from nova.schedule import DDPMConfig, FlowMatchConfig
from nova.training import (
    DivergenceError,
    TrainingOptions,
    VAETrainingOptions,
    new_model,
    new_vae,
    speed,
)
from nova.training.activation_checkpointing import activation_checkpointing
from nova.training.divergence import LossWatch
from nova.training.ema import EMA
from nova.training.objective import NOVAObjective
from nova.training.options import OPTIMIZERS
from nova.training.parameters import freeze, make_optimizers
from nova.training.samples import StepSampler, TrainingSamples, collate, load_batches
from nova.training.schedule import draw_mask_ratio, learning_rate
from nova.training.vae_loop import VAEObjective
from nova.vae import VAEConfig

FLOW = FlowMatchConfig()
SMALL_CLASS = replace(SMALL_IMAGE, text_token_dim=None, text_token_len=None)


def options(**values):
    return TrainingOptions(out="unused", **values)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_latents(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def image_data(tmp_path_factory):
    return write_latents(tmp_path_factory.mktemp("images"), shape=(4, 1, 8, 8))


@pytest.fixture(scope="module")
def class_data(tmp_path_factory):
    return write_latents(tmp_path_factory.mktemp("classes"), shape=(4, 1, 8, 8), text_dim=None)


def batch_of(data, config, positions, scheduler=FLOW, step=0, **values):
    samples = TrainingSamples(data, config, scheduler, options(**values))
    return collate([samples[step, position] for position in positions])


def trainable(config=SMALL):
    return small_model(config).requires_grad_(True)


def gradients(objective, *batches):
    """Gradients by name of the mean loss of batches."""
    objective.zero_grad()
    for batch in batches:
        (objective(**batch)["loss"] / len(batches)).backward()
    return {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


# Random draws ---------------------------------------------------------------------------------


def test_mask_ratio_follows_the_truncated_normal():
    """Kolmogorov-Smirnov distance to the analytic distribution, at the 1 % level."""
    generator = torch.Generator().manual_seed(0)
    draws = sorted(draw_mask_ratio(generator) for _ in range(4000))

    def normal(x):
        return 0.5 * (1 + math.erf((x - 1.0) / 0.25 / math.sqrt(2)))

    low, high = normal(0.7), normal(1.0)
    expected = [(normal(x) - low) / (high - low) for x in draws]
    distance = max(max(abs((i + 1) / 4000 - e), abs(i / 4000 - e)) for i, e in enumerate(expected))
    assert distance < 1.63 / math.sqrt(4000)
    assert draws[0] >= 0.7 and draws[-1] <= 1.0


def test_prompts_are_dropped_at_the_rate(data):
    samples = TrainingSamples(data, SMALL, FLOW, options(prompt_dropout=0.1, loss_repeats=1))
    lengths = [samples[0, position]["prompt_length"].item() for position in range(1000)]
    # Prompts of the data have two tokens at least. Four standard deviations of the binomial.
    assert abs(lengths.count(0) - 100) < 4 * math.sqrt(1000 * 0.1 * 0.9)


def test_classes_are_dropped(class_data):
    labels = batch_of(class_data, SMALL_CLASS, range(20), prompt_dropout=1.0)["label"]
    assert labels.tolist() == [1000] * 20
    labels = batch_of(class_data, SMALL_CLASS, range(8), prompt_dropout=0.0)["label"]
    assert sorted(labels) == sorted(class_data[i].label for i in range(8))


def test_draws_depend_on_seed_step_and_position_alone(data):
    samples = TrainingSamples(data, SMALL, FLOW, options())
    once, again = samples[3, 17], samples[3, 17]
    assert all(torch.equal(once[name], again[name]) for name in once)
    other = samples[3, 17 + len(data)]
    assert not torch.equal(once["noise"], other["noise"])
    others = TrainingSamples(data, SMALL, FLOW, options(seed=1))[3, 17]
    assert not torch.equal(once["noise"], others["noise"])
    # One share of visible tokens for all samples of a step.
    assert samples[3, 0]["visible"].shape == once["visible"].shape
    assert len({samples.mask_ratio(step) for step in range(5)}) == 5


def test_latents_are_draws_from_the_posterior(data):
    batch = batch_of(data, SMALL, range(64), loss_repeats=1)
    samples = TrainingSamples(data, SMALL, FLOW, options())
    means = torch.stack([data[samples.order[k]].mean for k in range(64)])
    # logvar is -6, the scaling factor 0.5.
    deviation = (batch["latents"] / 0.5 - means).std().item()
    assert deviation == pytest.approx(math.exp(-3), rel=0.05)


# The step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [FLOW, DDPMConfig()], ids=["flow", "ddpm"])
def test_losses_are_those_of_the_objective(data, scheduler):
    """The batch's layout, and the prefix made of padded prompts, are what the model expects."""
    model = trainable()
    batch = batch_of(data, SMALL, range(3), scheduler, prompt_dropout=0.5, loss_repeats=2)
    assert 0 in batch["prompt_length"] and max(batch["prompt_length"]) > 0
    losses = NOVAObjective(model, scheduler)(**batch)
    prompts = [
        prompt[:n] for prompt, n in zip(batch["prompt"], batch["prompt_length"], strict=True)
    ]
    prefix = Conditioning.from_text(
        model,
        model.text_embed.pad(prompts),
        None,
        Guidance(scale=1.0),
        motion_flow=batch["motion_flow"].tolist(),
        fps=batch["fps"].tolist(),
    ).tokens
    draws = TrainingDraws(batch["visible"], batch["noise"], batch["timestep_index"])
    expected = training_losses(model, batch["latents"], prefix, draws, scheduler)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss)
    torch.testing.assert_close(losses["loss"], sum(expected.values()))


@pytest.mark.parametrize("scheduler", [FLOW, DDPMConfig()], ids=["flow", "ddpm"])
@pytest.mark.parametrize("config", [SMALL, SMALL_ROTARY], ids=["absolute", "rotary"])
def test_a_step_does_not_wait_for_its_device(data, config, scheduler):
    """It makes its tensors where the model is, and reads no value: the meta device has none."""
    objective = NOVAObjective(trainable(config), scheduler).to("meta")
    batch = {key: x.to("meta") for key, x in batch_of(data, config, range(2), scheduler).items()}
    objective(**batch)["loss"].backward()
    assert all(p.grad.is_meta for p in objective.parameters() if p.grad is not None)


def test_every_sample_keeps_its_own_draws(data):
    """A batch holds at [r, b] what its sample b has at [r]."""
    samples = TrainingSamples(data, SMALL, FLOW, options(loss_repeats=2))
    parts = [samples[0, k] for k in range(3)]
    batch = collate(parts)
    noise = batch["noise"].unflatten(0, (2, 3, 3))
    index = batch["timestep_index"].unflatten(0, (2, 3, 3))
    visible = batch["visible"].unflatten(0, (3, 3))
    for b, part in enumerate(parts):
        assert torch.equal(noise[:, b], part["noise"])
        assert torch.equal(index[:, b], part["timestep_index"])
        assert torch.equal(visible[b], part["visible"])


@pytest.mark.parametrize("config, kind", [(SMALL_IMAGE, "image_data"), (SMALL_CLASS, "class_data")])
def test_images(config, kind, request):
    model = freeze(trainable(config), 1, text_norm=True, motion=True)
    objective = NOVAObjective(model, FLOW)
    losses = objective(**batch_of(request.getfixturevalue(kind), config, range(2)))
    assert set(losses) == {"loss"}
    losses["loss"].backward()
    # What a second process would wait for: trained, but without a gradient.
    without = [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_micro_batches_give_the_gradients_of_the_batch(data):
    objective = NOVAObjective(trainable(), FLOW)
    whole = gradients(objective, batch_of(data, SMALL, range(4)))
    parts = gradients(
        objective, batch_of(data, SMALL, range(2)), batch_of(data, SMALL, range(2, 4))
    )
    assert set(whole) == set(parts)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)


def test_activation_checkpointing_changes_memory_and_nothing_else(data):
    model = trainable()
    objective, batch = NOVAObjective(model, FLOW), batch_of(data, SMALL, range(2))
    expected = gradients(objective, batch)
    saved = []
    for level in range(4):
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x
        )
        with activation_checkpointing(model, level):
            with hooks:
                loss = objective(**batch)["loss"]
            loss.backward()
            saved.append(sum(sizes))
            found = gradients(objective, batch)
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), (level, name)
    assert saved[0] > saved[1] > saved[2] > saved[3]
    # Outside, blocks are as they were.
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_activation_checkpointing_leaves_compiled_blocks_as_they_were(data, fresh_compiler):
    model = trainable()
    objective, batch = NOVAObjective(model, FLOW), batch_of(data, SMALL, range(2))
    expected = gradients(objective, batch)
    for part in (model.video_encoder, model.image_encoder, model.image_decoder):
        part.blocks[0] = torch.compile(part.blocks[0], backend="eager")
    with activation_checkpointing(model, 3):
        inside = gradients(objective, batch)
    for found in (inside, gradients(objective, batch)):
        # By order: torch.compile adds to the names.
        torch.testing.assert_close(list(found.values()), list(expected.values()))


def test_mixed_precision_is_close(data):
    objective, batch = NOVAObjective(trainable(), FLOW), batch_of(data, SMALL, range(4))
    exact = objective(**batch)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = objective(**batch)["loss"]
    assert half.dtype == torch.float32
    assert half.item() != exact.item()
    torch.testing.assert_close(half, exact, rtol=0.02, atol=0)


# Parameters -----------------------------------------------------------------------------------


def test_frozen_parts():
    def frozen(config, frames, **parts):
        model = freeze(trainable(config), frames, **parts)
        names = [n for n, p in model.named_parameters() if not p.requires_grad]
        return {".".join(name.split(".")[:2]) for name in names}

    assert frozen(SMALL, 3, text_norm=False, motion=False) == set()
    assert frozen(SMALL, 3, text_norm=True, motion=True) == {
        "text_embed.norm", "motion_embed.flow_proj", "motion_embed.fps_proj",
    }  # fmt: skip
    images = {"video_encoder.patch_embed", "video_encoder.mixer"}
    times = {"video_pos_embed.time_proj", "video_pos_embed.norm"}
    assert frozen(SMALL, 1, text_norm=False, motion=False) == images | times
    # Without a mixer, and without a time embedding.
    assert frozen(SMALL_ROTARY, 1, text_norm=False, motion=False) == {"video_encoder.patch_embed"}
    of_classes = {"label_embed.norm"} | images | times
    assert frozen(SMALL_CLASS, 1, text_norm=True, motion=True) == of_classes


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_matrices_alone_decay(optimizer):
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = trainable()
    optimizers = make_optimizers(model, options(weight_decay=0.02, optimizer=optimizer))
    groups = [group for each in optimizers for group in each.param_groups]
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in groups) == len(names)
    assert set(decay.values()) == {0.02, 0.0}
    spared = {name for name, value in decay.items() if value == 0}
    assert {"mask_embed.bos_token", "mask_embed.mask_token", "image_encoder.norm.weight"} <= spared
    assert all(name.endswith((".bias", "_token")) or "norm" in name for name in spared)
    assert not any(name.endswith(".bias") for name in set(decay) - spared)
    if optimizer == "muon":
        by_muon = {names[id(p)] for group in optimizers[0].param_groups for p in group["params"]}
        assert "video_encoder.blocks.0.attn.qkv.weight" in by_muon
        assert all(".blocks." in name for name in by_muon)


def test_fresh_models_start_by_predicting_zero(data):
    """So the first loss is the mean square of the target: noise - x for flow matching."""
    state = torch.random.get_rng_state()
    model = new_model(SMALL)
    assert torch.equal(torch.random.get_rng_state(), state)
    batch = batch_of(data, SMALL, range(8), mask_ratio_min=0.99)
    losses = NOVAObjective(model, FLOW)(**batch)
    expected = 1 + batch["latents"][:, :, 0].square().mean().item()
    assert losses["loss_t2i"].item() == pytest.approx(expected, rel=0.05)
    assert any(not torch.equal(a, b) for a, b in zip(
        model.parameters(), new_model(SMALL, seed=1).parameters(), strict=True
    ))  # fmt: skip


def test_ema_arithmetic():
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    ema = EMA(layer, decay=0.3)
    expected = 1.0
    for step, value in enumerate((2.0, 5.0, -3.0, 4.0)):
        layer.weight.data.fill_(value)
        ema.update(step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert ema.shadow[0].item() == pytest.approx(expected, rel=1e-6)
    with ema.swapped_in():
        assert layer.weight.item() == pytest.approx(expected, rel=1e-6)
    assert layer.weight.item() == 4.0
    assert ema.shadow[0].item() == pytest.approx(expected, rel=1e-6)


def test_ema_follows_trained_parameters_in_float32():
    model = freeze(trainable(), 3, text_norm=True, motion=True).to(torch.bfloat16)
    ema = EMA(model, decay=0.9)
    assert len(ema.shadow) == sum(p.requires_grad for p in model.parameters())
    assert {shadow.dtype for shadow in ema.shadow} == {torch.float32}


# Schedules and the watch ----------------------------------------------------------------------


def test_learning_rates():
    constant = options(learning_rate=1.0, warmup_steps=4, steps=8)
    assert [learning_rate(s, constant) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    cosine = replace(constant, schedule="cosine", min_learning_rate=0.2)
    assert learning_rate(4, cosine) == pytest.approx(1.0)
    assert learning_rate(6, cosine) == pytest.approx(0.6)
    assert learning_rate(8, cosine) == pytest.approx(0.2)  # one after the last
    assert learning_rate(0, replace(constant, warmup_steps=0)) == 1.0


def test_a_diverging_loss_is_noticed():
    watch = LossWatch(warmup_steps=5)
    watch.check(0, 1e6, 1.0)  # warming up
    for step in range(5, 45):
        watch.check(step, 1.0, 1.0)
    for step, loss in enumerate((11.0, 12.0, 9.0, 11.0, 11.0), start=45):
        watch.check(step, loss, 1.0)
    assert watch.suspicious == 2
    with pytest.raises(DivergenceError, match="step 50: the loss is 20, more than 10 times"):
        watch.check(50, 20.0, 1.0)


@pytest.mark.parametrize("loss, grad_norm", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_values_that_are_not_finite_are_noticed_at_once(loss, grad_norm):
    with pytest.raises(DivergenceError, match="step 0: the loss is"):
        LossWatch(warmup_steps=100).check(0, loss, grad_norm)


def test_training_on_a_cpu_leaves_the_gpu_alone(data, monkeypatch):
    """Pinned memory is the GPU's driver's, which would come up in every process for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading, "DataLoader", lambda *_, pin_memory, **__: [pin_memory])
    samples = TrainingSamples(data, SMALL, FLOW, options())
    sampler = StepSampler(options(), 0, 0, 0, 1)
    for device, pinned in (("cpu", False), ("cuda", True)):
        assert list(load_batches(samples, sampler, collate, 0, torch.device(device))) == [pinned]


# A VAE's objective -----------------------------------------------------------------------------


def test_losses_of_a_vae():
    vae, generator = new_vae(VAEConfig.tiny()), torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 5, 16, 24, generator=generator) * 2 - 1
    mean, logvar = vae.encode_moments(pixels)
    noise = torch.randn(mean.shape, generator=generator)
    posterior = Normal(mean, (logvar / 2).exp())
    output = vae.decode_unscaled(posterior.mean + posterior.stddev * noise)
    error = output - pixels
    edges = [error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]]
    expected = {
        "l1": error.abs().mean(),
        "mse": error.square().mean(),
        "edge": sum(edge.abs().mean() for edge in edges),
        "kl": kl_divergence(posterior, Normal(0, 1)).sum() / pixels.numel(),
    }
    expected["loss"] = sum(
        weight * expected[name] for name, weight in (("l1", 1), ("mse", 2), ("edge", 3), ("kl", 4))
    )
    # The range from -1 to 1 is 2 wide; what is shown is cut to it.
    shown = [error.square().mean() for error in output.clamp(-1, 1) - pixels]
    expected["psnr"] = sum(20 * torch.log10(2 / error.sqrt()) for error in shown) / 2
    weights = {"mse_weight": 2, "edge_weight": 3, "kl_weight": 4}
    losses = VAEObjective(vae, VAETrainingOptions(out="unused", **weights))(pixels, noise)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)


# Speed -----------------------------------------------------------------------------------------


def test_rate_of_work_without_what_is_left_out(monkeypatch):
    times = iter((10.0, 14.0, 15.0, 20.0, 22.0))
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    stopwatch = speed.Stopwatch()
    assert stopwatch.rate(8) == 2.0
    assert stopwatch.rate(8) == 8.0
    stopwatch.skip()
    assert stopwatch.rate(8) == 4.0


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [{"steps": 0}, {"seed": -1}, {"betas": (0.9, 1.0)}, {"learning_rate": math.nan},
     {"max_grad_norm": 0.0}, {"schedule": "linear"}, {"precision": "float16"},
     {"device": "cuda"}, {"prompt_dropout": 1.5}, {"mask_ratio_min": 0.0},
     {"activation_checkpointing": 4}, {"loss_repeats": 0}, {"keep": 0},
     {"micro_batch_size": 0}, {"steps": 1.5}, {"learning_rate": "1e-4"},
     {"max_grad_norm": math.nan}, {"sample_guidance": math.nan}, {"mask_ratio_mean": math.nan},
     {"mask_ratio_std": math.inf}, {"mask_ratio_mean": 9.0},
     {"mask_ratio_mean": 0.0, "mask_ratio_std": 0.01}, {"betas": None}, {"betas": ("a", "b")},
     {"betas": (0.9,)}, {"seed": 2**63}, {"sample_prompts": "a cat"}, {"sample_prompts": (1,)},
     {"sample_prompts": None}, {"resume": "no"}, {"freeze_motion": None},
     {"activation_checkpointing": True}],
    ids=str,
)  # fmt: skip
def test_options_out_of_range(values):
    with pytest.raises(InputError):
        options(**values)


def test_numbers_of_numpy_become_those_of_files():
    values = {"steps": np.int64(7), "learning_rate": np.float32(0.5), "max_grad_norm": np.inf}
    given = options(**values)
    assert json.loads(json.dumps(vars(given) | {"out": None}))["steps"] == 7
    assert (given.learning_rate, given.max_grad_norm) == (0.5, math.inf)
    for betas in (np.array([0.5, 0.75]), [0.5, np.float32(0.75)]):
        assert json.dumps(options(betas=betas).betas) == "[0.5, 0.75]"


def test_other_values_of_numpy_become_those_of_files():
    flags = ("resume", "progress", "freeze_text_norm", "freeze_motion")
    given = options(
        **dict.fromkeys(flags, np.bool_(True)),
        sample_prompts=np.array(["a cat", "a dog"]),
        activation_checkpointing=np.int64(2),
    )
    assert all(getattr(given, name) is True for name in flags)
    assert given.sample_prompts == ("a cat", "a dog")
    json.dumps(vars(given) | {"out": None})
    vae = VAETrainingOptions(out="unused", freeze_encoder=np.bool_(False))
    assert vae.freeze_encoder is False


def test_data_that_does_not_fit_the_model(data, class_data, tmp_path):
    with pytest.raises(InputError, match="this is an image model"):
        TrainingSamples(data, SMALL_IMAGE, FLOW, options())
    with pytest.raises(InputError, match="has class labels, the model takes text embeddings of"):
        TrainingSamples(class_data, SMALL_IMAGE, FLOW, options())
    wide = write_latents(tmp_path, shape=(4, 3, 8, 12), count=2)
    with pytest.raises(InputError, match="latents of 4 x 8 x 12, the model takes 4 x 8 x 8"):
        TrainingSamples(wide, SMALL, FLOW, options())
    message = "captions of up to 6 tokens, the model takes 5; encode again, .* --text-length 5"
    with pytest.raises(InputError, match=message):
        TrainingSamples(data, replace(SMALL, text_token_len=5), FLOW, options())
    TrainingSamples(data, replace(SMALL, text_token_len=6), FLOW, options())
    with pytest.raises(InputError, match="cannot be split into micro-batches of 3"):
        StepSampler(options(batch_size=8, micro_batch_size=3), 0, 0, 0, 1)
