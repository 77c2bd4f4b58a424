"""One switch for the whole model: every backend samples and trains alike."""

import pytest
import torch
from kernel_testing import DEVICE, needs_triton
from small_models import SMALL, SMALL_ROTARY, sample, small_model, small_prompts

import nova
from nova.guidance import Guidance
from nova.objective import draw_training_noise, training_losses
from nova.schedule import DDPMConfig, FlowMatchConfig
from nova_kernels import BackendError
from nova_kernels.dispatch import Op

# Head dims of 32, which the attention kernel takes.
RUNS = [
    (SMALL, {"guidance": Guidance(scale=3.0)}),
    (SMALL_ROTARY, {"guidance": Guidance(scale=3.0, image_scale=1.5, renorm=0.5)}),
    (SMALL, {"guidance": Guidance(scale=3.0, renorm=0.5), "schedule": DDPMConfig().schedule(3)}),
]


@pytest.mark.parametrize("config, options", RUNS)
@needs_triton
def test_samples_do_not_depend_on_the_backend(config, options):
    model = small_model(config).to(DEVICE)
    model.set_backend("reference")
    expected = sample(model, batch=1, num_frames=2, steps=2, **options)
    model.set_backend("triton")
    result = sample(model, batch=1, num_frames=2, steps=2, **options)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("config", [SMALL, SMALL_ROTARY])
@needs_triton
def test_training_does_not_depend_on_the_backend(config):
    model, scheduler = small_model(config).to(DEVICE).requires_grad_(), FlowMatchConfig()
    latents = torch.randn(1, config.image_dim, 3, *config.latent_size).to(DEVICE)
    shape = (config.num_image_tokens, config.token_dim)
    draws = draw_training_noise(latents, shape, scheduler, mask_ratio=0.8, repeats=1)
    results = []
    for backend in ("reference", "triton"):
        model.set_backend(backend)
        model.zero_grad()
        prefix = model.text_embed(small_prompts(config, 1).to(DEVICE))
        losses = training_losses(model, latents, prefix, draws, scheduler)
        sum(losses.values()).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((losses, gradients))
    (losses, gradients), (by_triton, gradients_by_triton) = results
    torch.testing.assert_close(by_triton, losses, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == gradients_by_triton.keys()
    for name, gradient in gradients.items():
        difference = (gradients_by_triton[name] - gradient).norm()
        assert difference <= 1e-3 * gradient.norm() + 1e-6, name


@needs_triton
def test_the_kernels_are_what_runs(monkeypatch):
    """With a backend by name, no op is left to its reference."""
    called = set()
    module = Op.module

    def counted(op, backend):
        called.add(op.name)
        return module(op, backend)

    monkeypatch.setattr(Op, "module", counted)
    model = small_model(SMALL).to(DEVICE)
    model.set_backend("triton")
    sample(model, batch=1, num_frames=2, steps=2)
    ours = {"scale_shift", "residual_norm", "linear_gelu", "frame_scale_shift", "diffusion_step"}
    assert called >= ours


def test_a_backend_that_cannot_run_says_so(monkeypatch, tiny_video_folder):
    with pytest.raises(ValueError, match="backend must be one of"):
        nova.NOVAPipeline.from_pretrained(tiny_video_folder, backend="fast")
    pipeline = nova.NOVAPipeline.from_pretrained(tiny_video_folder, backend="cuda")
    with pytest.raises(BackendError, match="needs tensors on a GPU"):
        pipeline("a red circle", num_inference_steps=2, output_type="latent")
