"""The exact sampler: equal to the plain loops, each saving alone, and what goes beyond them."""

import gc

import pytest
import torch
from small_models import (
    SMALL,
    SMALL_IMAGE,
    SMALL_ROTARY,
    sample,
    sample_frames,
    small_model,
    small_prompts,
)

import nova_kernels
from nova.conditioning import Conditioning
from nova.errors import InputError
from nova.guidance import Guidance
from nova.head import PreparedHead
from nova.noise import NoiseSource, PinnedTransfer
from nova.plain_sampling import generate_frames_plain
from nova.sampling import generate_frames
from nova.schedule import DDPMConfig, FlowMatchConfig, set_sizes
from nova.token_order import TokenOrder
from nova.video_context import VideoContext

CONFIGS = {"absolute": SMALL, "rotary": SMALL_ROTARY}
GUIDANCES = {
    "none": Guidance(scale=1.0),
    "constant": Guidance(scale=3.0),
    "growing": Guidance(scale=3.0, min_scale=0.5),
    "truncated": Guidance(scale=3.0, trunc=500),
    "renormalised": Guidance(scale=3.0, renorm=0.5),
    "image": Guidance(scale=3.0, image_scale=1.5),
    "all": Guidance(scale=3.0, min_scale=2.0, trunc=300, renorm=0.6, image_scale=1.2),
}
SCHEDULES = {
    "flow": FlowMatchConfig().schedule(3, shift=2.0),
    "ddpm": DDPMConfig(prediction_type="sample").schedule(3),
}


def assert_same(a, b, tolerance=2e-5):
    assert a.shape == b.shape
    assert torch.isfinite(a).all()
    assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("config", CONFIGS)
def test_exact_equals_plain(config, guidance, schedule):
    model = small_model(CONFIGS[config])
    options = {"guidance": GUIDANCES[guidance], "schedule": SCHEDULES[schedule]}
    assert_same(sample(model, **options), sample(model, generate_frames_plain, **options))


def test_float64_with_renormalised_guidance():
    model = small_model().double()
    options = {"guidance": Guidance(scale=3.0, renorm=0.5), "generator": None}
    exact, plain = (sample(model, s, **options) for s in (generate_frames, generate_frames_plain))
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, plain, rtol=1e-5, atol=1e-5)


def test_exact_equals_plain_for_images_and_more_steps_than_tokens():
    model = small_model(SMALL_IMAGE)
    options = {"num_frames": 1, "steps": 50}
    assert_same(sample(model, **options), sample(model, generate_frames_plain, **options))


# The savings, one by one ---------------------------------------------------------------------


def prepared(model, schedule=SCHEDULES["flow"]):
    return PreparedHead(model.image_decoder, torch.tensor(schedule.timesteps))


@torch.inference_mode()
def test_packed_head_with_precomputed_modulation_equals_the_layer():
    """Savings 1 to 3: set tokens only, condition once a set, timesteps once a run, one GEMM."""
    model, schedule = small_model(), SCHEDULES["flow"]
    head = prepared(model)
    cond, x = torch.randn(2, 5, 64), torch.randn(2, 5, 16)
    step = [nova_kernels.StepCoefficients(0.0, 1.0)]  # the prediction takes x's place
    for d, timestep in enumerate(schedule.timesteps):
        time = head.time_embeddings[d : d + 1]
        packed = nova_kernels.denoise(x, head.condition(cond)[None], time, head.weights, step)
        assert_same(packed, model.image_decoder(x, torch.tensor([timestep]), cond))


def test_modulation_in_chunks_changes_nothing(monkeypatch):
    model = small_model()
    whole = sample(model)
    monkeypatch.setattr("nova_kernels.ops.denoise.MODULATION_BUDGET", 1)
    assert_same(sample(model), whole)


@torch.inference_mode()
@pytest.mark.parametrize("config", CONFIGS)
def test_last_block_for_the_set_alone(config):
    """Saving 4: only the set's rows leave the last block."""
    model = small_model(CONFIGS[config])
    noise = NoiseSource(None, 2, dtype=torch.float32, device=torch.device("cpu"))
    order = TokenOrder.draw(model, noise, passes=1)
    tokens = torch.randn(2, 16, 64)
    arguments = (torch.randn(2, 4, 64), tokens[:, :6], tokens[:, 6:])
    every = model.encode_image(*arguments, rotary=order.rotary)
    some = model.encode_image(*arguments, rotary=order.rotary, rows=slice(6, 9))
    assert_same(some, every[:, 6:9])


@torch.inference_mode()
@pytest.mark.parametrize("config", CONFIGS)
def test_token_order_carries_positions(config):
    """Saving 6: tables are made once, and tokens kept in the order of their revealing."""
    model = small_model(CONFIGS[config])
    noise = NoiseSource(None, 2, dtype=torch.float32, device=torch.device("cpu"))
    order = TokenOrder.draw(model, noise, passes=2)
    raster = torch.randn(2, 16, 5)
    in_order = order.select(raster, 0, 16)
    assert torch.equal(order.to_raster(in_order), raster)
    inside, outside = order.select(raster, 3, 7), order.outside(raster, 3, 7)
    joined = torch.cat([inside, outside], dim=1)
    assert torch.equal(joined.sort(dim=1).values, raster.sort(dim=1).values)
    table = model.image_positions()
    if table is not None:
        assert torch.equal(order.positions[1, 4], table[order.order[1, 4]])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("guidance", ["renormalised", "all"])
@pytest.mark.parametrize("config", CONFIGS)
def test_no_host_synchronisation_in_the_loops(config, guidance, schedule):
    """Nothing between the loops' start and end reads a value, or lies on another device.

    Tensors of the meta device have no values, and do not mix with those of others.
    """
    model = small_model(CONFIGS[config]).to("meta")
    options = {"guidance": GUIDANCES[guidance], "schedule": SCHEDULES[schedule]}
    options |= {"num_frames": 2, "steps": 2}
    for sampler in (generate_frames, generate_frames_plain):
        assert sample(model, sampler, **options).device == model.device


class Adapter(torch.nn.Module):
    """A layer wrapped as PEFT does, with the inner one's weights as its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

    def forward(self, x):
        return self.inner(x) + x.sum()


def test_adapters_of_the_diffusion_mlp_are_not_passed_over():
    model = small_model()
    projector = model.image_decoder.blocks[1].proj
    projector.fc2 = Adapter(projector.fc2)
    with pytest.raises(InputError, match="type Adapter, does more .* merge adapters"):
        sample(model)
    assert torch.isfinite(sample(model, generate_frames_plain)).all()


@pytest.mark.parametrize(
    "name", ["", "patch_embed", "patch_embed.proj", "blocks.1", "blocks.0.proj", "norm.proj"]
)
def test_hooks_of_the_diffusion_mlp_are_not_passed_over(name):
    model = small_model()
    hook = model.image_decoder.get_submodule(name).register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="remove hooks"):
        sample(model)
    hook.remove()
    assert torch.isfinite(sample(model)).all()


def test_hooks_of_what_embeds_the_condition_are_called():
    model, calls = small_model(), []
    projector = model.image_decoder.time_cond_embed.condition_proj
    projector.register_forward_hook(lambda *_: calls.append(1))
    sample(model)
    assert calls


# Generators ----------------------------------------------------------------------------------


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_same_seed_same_video():
    model = small_model()
    assert torch.equal(sample(model), sample(model))
    other = sample(model, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(sample(model), other)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_sample_does_not_depend_on_its_batch(schedule):
    model = small_model()
    prompts = small_prompts(SMALL, 3)
    options = {"schedule": SCHEDULES[schedule], "guidance": GUIDANCES["renormalised"]}
    together = sample(model, batch=3, prompts=prompts, generator=generators(5, 6, 7), **options)
    alone = sample(model, batch=1, prompts=prompts[1:2], generator=generators(6), **options)
    assert_same(together[1:2], alone)


def test_draws_on_their_way_to_a_gpu_are_few(monkeypatch):
    class Event:
        def __init__(self):
            self.number = len(events)
            events.append(self)

        def record(self, stream):
            assert stream == "of the device"

        def synchronize(self):
            waited.append(self.number)

    events, waited = [], []
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: "of the device")
    monkeypatch.setattr("nova.noise.MAX_BYTES_ON_THE_WAY", 100)
    transfer = PinnedTransfer(torch.device("cpu"))
    for size in (10, 10, 5, 30, 1):
        x = torch.randn(size)
        assert torch.equal(transfer.send(x), x)
    assert len(events) == 5 and waited == [0, 1, 2, 3]  # 120 bytes alone are too many


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 3])
def test_draws_for_a_gpu_do_not_wait_for_it(count):
    device = torch.device("cuda", 0)
    sources = [
        NoiseSource(generators(*range(count)), count, dtype=torch.bfloat16, device=place)
        for place in (torch.device("cpu"), device)
    ]
    busy = torch.zeros(2048, 2048, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        busy = busy @ busy
        drawn = [sources[1].normal(4, 32) for _ in range(50)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for x in drawn:
        assert torch.equal(x.cpu(), sources[0].normal(4, 32))


def test_generators_must_be_one_a_sample():
    with pytest.raises(InputError, match="one for each of the 2 samples"):
        sample(small_model(), generator=generators(1, 2, 3))


# Continuation --------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", ["constant", "image"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("given", [1, 2, 4])
def test_prefill_equals_feeding_one_by_one(config, given, guidance):
    """The plain sampler feeds given frames one after the other through the cache."""
    model = small_model(CONFIGS[config])
    clip = torch.randn(2, 4, given, 8, 8)
    options = {"num_frames": given + 2, "guidance": GUIDANCES[guidance], "given_latents": clip}
    assert_same(sample(model, **options), sample(model, generate_frames_plain, **options))


def test_continuing_a_generated_clip_equals_generating_it():
    """Given the frames that a run made and its remaining draws, the rest of the run comes out."""
    model = small_model()
    whole_generator, rest_generator = generators(0, 0)
    whole = sample(model, num_frames=4, generator=whole_generator)
    noise = NoiseSource(rest_generator, 2, dtype=torch.float32, device=torch.device("cpu"))
    order = noise.uniform(16, 1)
    for _ in range(2 * len(set_sizes(16, 4))):
        noise.normal(4, 8, 8)

    class Continued(NoiseSource):
        """Gives the order that was drawn before, then goes on with the generator."""

        def uniform(self, *shape):
            return order

    guidance = Guidance(scale=3.0)
    frames = generate_frames(
        model,
        Conditioning.from_text(model, small_prompts(SMALL, 2), None, guidance),
        num_frames=4,
        set_sizes=set_sizes(16, 4),
        schedule=FlowMatchConfig().schedule(3),
        guidance=guidance,
        noise=Continued(rest_generator, 2, dtype=torch.float32, device=torch.device("cpu")),
        given_latents=whole[:, :, :2],
    )
    assert_same(torch.stack(list(frames), dim=2), whole[:, :, 2:])


@pytest.mark.parametrize("config", CONFIGS)
def test_longer_than_trained(config):
    """Beyond the time base (3), with all frames seen and with a sliding window."""
    model = small_model(CONFIGS[config])
    assert sample(model, num_frames=7).shape[2] == 7
    windowed = sample(model, num_frames=7, context_frames=3)
    assert torch.isfinite(windowed).all() and windowed.shape[2] == 7
    # The first window is a whole run of that length.
    assert_same(windowed[:, :, :3], sample(model, num_frames=3))


def test_a_window_forgets_what_it_will_not_see_again():
    def count_latents():
        shape = (2, 4, 8, 8)
        return sum(type(x) is torch.Tensor and x.shape == shape for x in gc.get_objects())

    frames = sample_frames(small_model(), num_frames=11, context_frames=3)
    counts = [count_latents() for _ in frames]
    assert max(counts[:4]) == max(counts)


def test_window_sees_the_later_half_of_the_last_one():
    """Frames 4, 5 of a windowed run: continuing frames 2, 3 with positions from 0 again."""
    model = small_model()
    clip = torch.randn(2, 4, 4, 8, 8)
    windowed = sample(model, num_frames=5, context_frames=4, given_latents=clip)
    continued = sample(model, num_frames=4, given_latents=clip[:, :, 2:])
    assert_same(windowed[:, :, 0], continued[:, :, 0])


@torch.inference_mode()
def test_prefill_reads_each_frame_once():
    """One pass over [prefix, bos, given frames], whatever their number."""
    model = small_model()
    guidance = Guidance(scale=3.0)
    conditioning = Conditioning.from_text(model, small_prompts(SMALL, 2), None, guidance)
    calls = []
    hook = model.video_encoder.norm.register_forward_hook(
        lambda module, args, out: calls.append(out.shape[1])
    )
    VideoContext(model, conditioning, guidance, 6).start(list(torch.randn(4, 2, 4, 8, 8)))
    hook.remove()
    assert calls == [conditioning.tokens.shape[1] + 5 * 4]


# Hooks ---------------------------------------------------------------------------------------


def test_hook_sees_every_step_and_the_frame_so_far():
    model, steps = small_model(), []
    latents = sample(model, on_set_end=lambda step: steps.append(step))
    sets = len(set_sizes(16, 4))
    assert [(s.frame, s.set_index) for s in steps] == [
        (t, i) for t in range(3) for i in range(sets)
    ]
    assert_same(steps[-1].latents, latents[:, :, -1], tolerance=1e-7)
    revealed = [(s.latents != 0).float().mean().item() for s in steps[:sets]]
    assert revealed == sorted(revealed) and revealed[-1] > 0.99


def test_hook_may_replace_latents():
    model = small_model()
    same = sample(model, on_set_end=lambda step: step.latents.clone())
    assert_same(same, sample(model), tolerance=1e-5)
    doubled = sample(model, on_set_end=lambda step: 2 * step.latents)
    assert not torch.allclose(doubled, same)


# Wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_frames": 0}, "at least 1"),
        ({"given_latents": torch.zeros(2, 4, 1, 8, 9)}, "must have the shape"),
        ({"given_latents": torch.zeros(2, 4, 3, 8, 8)}, "raise max_latent_length"),
        ({"given_latents": torch.full((2, 4, 1, 8, 8), float("nan"))}, "NaN"),
        ({"context_frames": 1}, "at least 2"),
    ],
)
def test_wrong_input(options, message):
    with pytest.raises(InputError, match=message):
        sample(small_model(), **options)


def test_image_models_have_one_frame():
    with pytest.raises(InputError, match="image model"):
        sample(small_model(SMALL_IMAGE), num_frames=2)


# Half precision and GPU ----------------------------------------------------------------------


def test_bfloat16_is_close_to_float32():
    model = small_model()
    noise = torch.Generator().manual_seed(3)
    exact = sample(model.bfloat16(), generator=noise)
    plain = sample(model, generate_frames_plain, generator=torch.Generator().manual_seed(3))
    assert exact.dtype == torch.bfloat16
    assert (exact - plain).float().norm() < 0.1 * plain.float().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("guidance", GUIDANCES)
def test_gpu_equals_cpu_with_a_cpu_generator(guidance):
    model = small_model()
    on_cpu = sample(model, guidance=GUIDANCES[guidance])
    on_gpu = sample(model.cuda(), guidance=GUIDANCES[guidance])
    assert_same(on_gpu.cpu(), on_cpu, tolerance=1e-3)
