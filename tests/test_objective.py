"""The training objective beyond the recorded steps: draws, targets, gradients everywhere."""

import math

import pytest
import torch
from small_models import SMALL, SMALL_IMAGE, small_model, small_prompts

from nova.conditioning import Conditioning
from nova.guidance import Guidance
from nova.objective import TrainingDraws, add_noise, draw_training_noise, training_losses
from nova.schedule import DDPMConfig, FlowMatchConfig


def one_step(model, frames, scheduler, seed=0, mask_ratio=0.8):
    latents = torch.randn(2, 4, frames, 8, 8, generator=torch.Generator().manual_seed(seed))
    prompts = small_prompts(model.config, 2)
    prefix = Conditioning.from_text(model, prompts, None, Guidance(scale=1.0)).tokens
    generator = torch.Generator().manual_seed(seed)
    draws = draw_training_noise(
        latents, (16, 16), scheduler, mask_ratio=mask_ratio, repeats=2, generator=generator
    )
    return training_losses(model, latents, prefix, draws, scheduler)


@pytest.mark.parametrize("scheduler", [FlowMatchConfig(), DDPMConfig()])
@pytest.mark.parametrize("config, frames", [(SMALL, 3), (SMALL_IMAGE, 1)])
def test_every_parameter_gets_a_gradient(config, frames, scheduler):
    model = small_model(config).requires_grad_(True)
    losses = one_step(model, frames, scheduler)
    assert set(losses) == ({"loss_t2i", "loss_i2i"} if frames > 1 else {"loss"})
    sum(losses.values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # An image has no frame before it, so nothing reads frames or mixes their features.
    unused = () if frames > 1 else ("video_encoder.patch_embed", "video_encoder.mixer")
    expected = [name for name, _ in model.named_parameters() if name.startswith(unused)]
    assert without == expected


def test_draws():
    latents = torch.zeros(3, 4, 2, 8, 8)
    draws = draw_training_noise(latents, (16, 16), FlowMatchConfig(), mask_ratio=0.75, repeats=4)
    assert draws.visible.shape == (6, 4) and draws.noise.shape == (24, 16, 16)
    assert all(len(set(row.tolist())) == 4 for row in draws.visible)
    assert 0 <= draws.timestep_index.min() and draws.timestep_index.max() <= 999


@pytest.mark.parametrize(
    "scheduler, share",
    [(FlowMatchConfig(), math.erf(math.log(3) / math.sqrt(2))), (DDPMConfig(), 0.5)],
)
def test_distribution_of_timesteps(scheduler, share):
    """The middle half of the table: sigmoid(x), x normal, lies there for |x| < ln 3."""
    draws = draw_training_noise(
        torch.zeros(100, 4, 1, 8, 8),
        (16, 16),
        scheduler,
        mask_ratio=0.75,
        generator=torch.Generator().manual_seed(0),
    )
    index = draws.timestep_index
    assert abs(index.float().mean() - 499.5) < 4 * 289 / math.sqrt(index.numel())
    drawn = ((index >= 250) & (index < 750)).float().mean()
    assert abs(drawn - share) < 4 * 0.5 / math.sqrt(index.numel())


@pytest.mark.parametrize("config, frames", [(SMALL, 3), (SMALL_IMAGE, 1)])
def test_low_mask_ratios_leave_a_token_masked(config, frames):
    """A mean over no token would be NaN."""
    losses = one_step(small_model(config), frames, FlowMatchConfig(), mask_ratio=0.01)
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddpm_targets_give_back_the_sample(prediction):
    """Clean tokens follow from noisy ones and the target, as the sampler's formulas say."""
    scheduler = DDPMConfig(prediction_type=prediction)
    x, noise = torch.randn(2, 1, 5, 16)
    index = torch.full((1, 5), 400)
    noisy, times, target = add_noise(x, noise, index, scheduler)
    bar = scheduler.alphas_cumprod()[400]
    clean = {
        "epsilon": (noisy - (1 - bar).sqrt() * target) / bar.sqrt(),
        "sample": target,
        "v_prediction": bar.sqrt() * noisy - (1 - bar).sqrt() * target,
    }[prediction]
    torch.testing.assert_close(clean, x, rtol=1e-4, atol=1e-5)
    assert (times == 400).all()


def test_masked_tokens_alone_count():
    """With all tokens visible but one, the loss is that token's."""
    model = small_model(SMALL_IMAGE)
    latents = torch.randn(1, 4, 1, 8, 8)
    prompts = small_prompts(SMALL_IMAGE, 1)
    prefix = Conditioning.from_text(model, prompts, None, Guidance(scale=1.0)).tokens
    noise, index = torch.randn(1, 16, 16), torch.full((1, 16), 300)
    draws = TrainingDraws(torch.arange(15)[None], noise, index)
    loss = training_losses(model, latents, prefix, draws, FlowMatchConfig())["loss"]
    noise[:, :15] = 100.0  # other tokens' noise must not matter
    again = training_losses(model, latents, prefix, draws, FlowMatchConfig())["loss"]
    torch.testing.assert_close(loss, again)
