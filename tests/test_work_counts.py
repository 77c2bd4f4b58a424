"""benchmarks/work_counts.py: counts against torch's own counter on real runs, and by hand."""

from dataclasses import replace

import pytest
import torch
from fps_stages import STAGES, StageClock, TimedSampler, measure_stages
from random_model import RandomModelRun
from small_models import SMALL, SMALL_IMAGE, SMALL_ROTARY, sample, small_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from work_counts import (
    DENOISE,
    IMAGE_ENCODER,
    VIDEO_ENCODER,
    Work,
    counted_operations,
    encoder_weights,
    sampling_work,
    total,
    vae_work,
)

from nova.config import EncoderConfig, named_config
from nova.guidance import Guidance
from nova.layers import Block
from nova.schedule import DDPMConfig, FlowMatchConfig, set_sizes
from nova.vae import CausalVideoVAE, VAEConfig

CPU = torch.device("cpu")


def test_stages_of_the_sampler_are_what_torch_counts():
    run = RandomModelRun(
        "tiny-video",
        batch=2,
        num_frames=3,
        num_steps=5,
        num_diffusion_steps=4,
        device=CPU,
        dtype=torch.float32,
        backend="reference",  # torch does not see into kernels
    )
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        counted = measure_stages(run, counter.get_total_flops)
    assert counted == {name: work.operations for name, work in run.work().items()}
    assert tuple(counted) == STAGES and min(counted.values()) > 0


@pytest.mark.parametrize(
    "config, num_frames, guidance, schedule",
    [
        (SMALL, 1, Guidance(scale=1.0), FlowMatchConfig()),
        (SMALL, 3, Guidance(scale=3.0, image_scale=1.5), FlowMatchConfig()),
        (SMALL, 2, Guidance(scale=3.0, trunc=600.0), FlowMatchConfig()),
        (SMALL, 2, Guidance(scale=3.0), DDPMConfig()),
        (SMALL_ROTARY, 3, Guidance(scale=3.0), FlowMatchConfig()),
        (replace(SMALL, video_mixer_rank=-1), 3, Guidance(scale=3.0), FlowMatchConfig()),
        (SMALL_IMAGE, 1, Guidance(scale=3.0), FlowMatchConfig()),
        (
            replace(SMALL, image_encoder=EncoderConfig(3, 64, 2)),
            2,
            Guidance(scale=3.0),
            FlowMatchConfig(),
        ),
    ],
    ids=["plain", "image-guidance", "trunc", "ddpm", "rotary", "full-mixer", "image", "odd-depth"],
)
def test_all_kinds_of_runs(config, num_frames, guidance, schedule):
    model, schedule = small_model(config), schedule.schedule(5)
    model.set_backend("reference")
    options = {"num_frames": num_frames, "schedule": schedule, "guidance": guidance}
    # What stands in front of the frames is made before sampling.
    whole = counted_operations(lambda: sample(model, batch=2, steps=4, **options))
    before = counted_operations(lambda: sample(model, _no_frames, batch=2, steps=4, **options))
    work = sampling_work(
        config,
        batch=2,
        set_sizes=set_sizes(config.num_image_tokens, 4),
        dtype=torch.float32,
        **options,
    )
    assert total(work.values()).operations == whole - before > 0


def _no_frames(model, conditioning, **_):
    return [torch.zeros(1)[:, None]]


def test_bytes_by_hand():
    config, guidance = named_config("tiny-video"), Guidance(scale=5.0)
    work = sampling_work(
        config,
        batch=1,
        num_frames=2,
        set_sizes=[7, 17],
        schedule=FlowMatchConfig().schedule(3),
        guidance=guidance,
        dtype=torch.bfloat16,
    )
    model = RandomModelRun(
        "tiny-video",
        batch=1,
        num_frames=2,
        num_steps=2,
        num_diffusion_steps=3,
        device=CPU,
        dtype=torch.float32,
    )._model
    # Two frames of two sets read the blocks.
    blocks = sum(p.numel() for p in model.image_encoder.blocks.parameters())
    assert work[IMAGE_ENCODER].bytes == 4 * blocks * 2
    # The second frame reads keys and values of 18 + 6 tokens, 64 wide, in two blocks, two passes.
    blocks = sum(p.numel() for p in model.video_encoder.blocks.parameters())
    mixer = 3 * 8 * 64
    assert work[VIDEO_ENCODER].bytes == (2 * blocks + mixer + 2 * 2 * 2 * 24 * 64) * 2
    in_loop = {
        name: p
        for name, p in model.image_decoder.named_parameters()
        if p.dim() > 1 and "timestep" not in name
    }
    assert work[DENOISE].bytes == 4 * sum(p.numel() for p in in_loop.values()) * 2


def test_weights_of_an_encoder():
    encoder = EncoderConfig(3, 64, 2)
    assert encoder_weights(encoder) == 3 * sum(p.numel() for p in Block(64, 2).parameters())


def test_work_of_the_vae(monkeypatch):
    config, shape = VAEConfig.tiny(), (6, 2, 3)
    vae = CausalVideoVAE(config).eval()
    latents = torch.randn(2, 4, *shape)
    # Torch's counter does not know oneDNN's convolution.
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with torch.no_grad():
        operations = counted_operations(lambda: vae.decode(latents))
    work = vae_work(config, shape, 2, torch.float32)
    weights = sum(p.numel() for p in vae.decoder.parameters())
    # Six latents are two tiles.
    assert work == Work(operations, 2 * 2 * weights * 4)


def test_sum():
    assert total([Work(1, 2), Work(3, 4)]) == Work(4, 6) and total([]) == Work()


def test_the_timed_sampler_is_the_exact_one():
    run = RandomModelRun(
        "tiny-video",
        batch=1,
        num_frames=2,
        num_steps=3,
        num_diffusion_steps=2,
        device=CPU,
        dtype=torch.float32,
    )
    ticks = iter(range(10**6))
    clock = StageClock(lambda: next(ticks))
    assert torch.equal(run.sample(TimedSampler(clock)), run.sample())
    # Every tick belongs to a stage: together they are all that passed, but for the first.
    assert sum(clock.totals.values()) == next(ticks) - 1
