"""nova.accelerate, on a stand-in with the parameters and the interface of the reference."""

from types import SimpleNamespace

import pytest
import torch
from reference_stand_in import StandInPipeline
from small_models import SMALL, SMALL_ROTARY, small_model, small_prompts

import nova
from nova.acceleration import accelerated_sampling
from nova.graph_cache import weights_key

FAST = {"num_inference_steps": 4, "num_diffusion_steps": 3, "max_latent_length": 2}


class Adapted(torch.nn.Module):
    """A layer with what an adapter adds."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.added = torch.nn.Linear(base.in_features, base.out_features)

    def forward(self, x):
        return self.base(x) + self.added(x)


CALLS = [
    {},
    {"guidance_scale": 1.0},
    {"guidance_renorm": 0.3, "guidance_trunc": 400},
    {"image_guidance_scale": 1.5},
    {"flow_shift": 2.0},
]


@pytest.mark.parametrize("config", [SMALL, SMALL_ROTARY])
@pytest.mark.parametrize("options", CALLS)
def test_the_same_call_gives_the_same_video(config, options):
    prompts = small_prompts(config, 2)
    expected = StandInPipeline(config)(prompts, **FAST, **options).frames
    pipe = StandInPipeline(config)
    assert nova.accelerate(pipe) is pipe
    result = pipe(prompts, **FAST, **options).frames
    assert pipe.transformer.calls == 0
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_given_latents_go_on():
    prompts = small_prompts(SMALL, 2)
    given = torch.randn(2, *SMALL.latent_shape, generator=torch.Generator().manual_seed(5))
    expected = StandInPipeline()(prompts, **FAST, latents=[given]).frames
    pipe = nova.accelerate(StandInPipeline())
    result = pipe(prompts, **FAST, latents=[given]).frames
    assert torch.equal(result[:, :, 0], given)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    only = pipe(prompts, **{**FAST, "max_latent_length": 1}, latents=[given]).frames
    assert torch.equal(only[:, :, 0], given)


def test_weights_are_shared_and_stay_as_they_were():
    pipe = StandInPipeline()
    parameters = dict(pipe.transformer.named_parameters())
    pipe.transformer.video_encoder.norm.requires_grad_(True)
    flags = {name: p.requires_grad for name, p in parameters.items()}
    nova.accelerate(pipe)
    now = dict(pipe.transformer.named_parameters())
    assert all(now[name] is parameters[name] for name in parameters)
    assert {name: p.requires_grad for name, p in now.items()} == flags
    before = pipe(small_prompts(SMALL, 1), **FAST).frames
    for parameter in parameters.values():
        parameter.data.mul_(1.1)
    assert not torch.equal(pipe(small_prompts(SMALL, 1), **FAST).frames, before)
    pipe.transformer.to(torch.float64)
    assert pipe(small_prompts(SMALL, 1), **FAST).frames.dtype == torch.float64
    assert nova.report(pipe).dtype == "float64"


def test_weights_are_shared_wherever_they_start():
    pipe = StandInPipeline()
    weight = pipe.transformer.mask_embed.mask_token
    weight.data = torch.cat([weight.new_zeros(1, 1), weight.data], dim=1)[:, 1:]
    nova.accelerate(pipe)
    assert accelerated_sampling(pipe).model.mask_embed.mask_token is weight


def test_replaced_weights_are_taken_over():
    pipe = nova.accelerate(StandInPipeline())
    old = dict(pipe.transformer.named_parameters())
    old["image_decoder.head.weight"].requires_grad_(True)
    flags = {name: parameter.requires_grad for name, parameter in old.items()}
    key = weights_key(accelerated_sampling(pipe).model)
    other = small_model(SMALL, seed=7).double().state_dict()
    pipe.transformer.load_state_dict(other, assign=True)
    assert nova.report(pipe).dtype == "float64"
    frames = pipe(small_prompts(SMALL, 1), **FAST).frames
    assert pipe.transformer.calls == 0
    assert {name: parameter.requires_grad for name, parameter in old.items()} == flags
    # CUDA graphs go by it.
    assert weights_key(accelerated_sampling(pipe).model) != key
    nova.restore(pipe)
    expected = pipe(small_prompts(SMALL, 1), **FAST).frames
    torch.testing.assert_close(frames, expected, rtol=1e-4, atol=1e-4)


def test_tuning_takes_replaced_weights_too():
    pipe = nova.accelerate(StandInPipeline())
    pipe.transformer.load_state_dict(small_model(SMALL, seed=7).state_dict(), assign=True)
    shared = accelerated_sampling(pipe).model.image_decoder.head.weight
    assert shared is pipe.transformer.image_decoder.head.weight


def wrap(transformer, name):
    transformer.set_submodule(name, Adapted(transformer.get_submodule(name)))


def hook(transformer, name):
    transformer.get_submodule(name).register_forward_hook(lambda module, x, y: y + 1)


def hook_before(transformer, name):
    transformer.get_submodule(name).register_forward_pre_hook(lambda module, x: (x[0] + 1,))


def replace_forward(transformer, name):
    layer = transformer.get_submodule(name)
    forward = layer.forward
    layer.forward = lambda x: forward(x) + 1


CHANGES = [
    (wrap, "mlp.fc2.* Merge an adapter"),
    (hook, "mlp.fc2 has forward hooks"),
    (hook_before, "mlp.fc2 has forward hooks"),
    (replace_forward, "mlp.fc2 has .* a forward of its own"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_changed_layers_are_left_to_the_reference(change, message):
    pipe = nova.accelerate(StandInPipeline())
    prompts = small_prompts(SMALL, 1)
    before = pipe(prompts, **FAST).frames
    change(pipe.transformer, "image_encoder.blocks.0.mlp.fc2")
    with pytest.warns(UserWarning, match=message):
        frames = pipe(prompts, **FAST).frames
    assert "restore" in nova.report(pipe).left_to_reference
    with pytest.raises(nova.InputError, match=message):
        nova.tune(pipe)
    expected = nova.restore(pipe)(prompts, **FAST).frames
    assert torch.equal(frames, expected) and not torch.allclose(frames, before)


def test_layers_changed_back_are_sampled_again():
    pipe = nova.accelerate(StandInPipeline())
    mlp = pipe.transformer.image_encoder.blocks[0].mlp
    layer, mlp.fc2 = mlp.fc2, Adapted(mlp.fc2)
    with pytest.warns(UserWarning, match="Merge an adapter"):
        pipe(small_prompts(SMALL, 1), **FAST)
    mlp.fc2 = layer
    pipe(small_prompts(SMALL, 1), **FAST)
    assert pipe.transformer.calls == 1 and nova.report(pipe).left_to_reference is None


def test_hooks_of_what_the_reference_runs_stay():
    pipe = nova.accelerate(StandInPipeline())
    seen = []
    for module in (pipe.transformer, pipe.transformer.text_embed.proj):
        module.register_forward_hook(lambda *call: seen.append(call))
    pipe(small_prompts(SMALL, 1), **FAST)
    assert len(seen) == 2 and pipe.transformer.calls == 0


def test_restore():
    pipe = nova.accelerate(StandInPipeline())
    assert nova.report(pipe).accelerated
    assert nova.restore(pipe) is pipe and nova.restore(pipe) is pipe
    assert not nova.report(pipe).accelerated
    assert str(nova.report(pipe)) == "sampling: the reference's, float32 on cpu"
    pipe(small_prompts(SMALL, 1), **FAST)
    assert pipe.transformer.calls == 1


def test_a_method_of_the_users_own_stays():
    pipe = StandInPipeline()

    def own(inputs):
        inputs["latents"].append(torch.zeros(len(inputs["x"]), *SMALL.latent_shape))

    pipe.transformer.generate_video = own
    assert not nova.report(pipe).accelerated
    with pytest.raises(nova.InputError, match="call nova.accelerate"):
        nova.tune(pipe)
    nova.restore(pipe)
    assert pipe.transformer.generate_video is own
    nova.accelerate(nova.accelerate(pipe))
    assert nova.report(pipe).accelerated
    with pytest.warns(UserWarning, match="spatiotemporal_guidance_scale"):
        frames = pipe(small_prompts(SMALL, 1), **FAST, spatiotemporal_guidance_scale=1.0).frames
    assert frames.count_nonzero() == 0  # of their method
    nova.restore(pipe)
    assert pipe.transformer.generate_video is own


def test_what_is_not_covered_is_left_to_the_reference():
    pipe = nova.accelerate(StandInPipeline())
    with pytest.warns(UserWarning, match="spatiotemporal_guidance_scale"):
        pipe(small_prompts(SMALL, 1), **FAST, spatiotemporal_guidance_scale=1.0)
    assert pipe.transformer.calls == 1
    assert "spatiotemporal" in str(nova.report(pipe))
    pipe(small_prompts(SMALL, 1), **FAST)
    assert pipe.transformer.calls == 1 and nova.report(pipe).left_to_reference is None


def test_other_pipelines_are_refused():
    with pytest.raises(nova.InputError, match="not a pipeline of the reference"):
        nova.accelerate(SimpleNamespace(transformer=None))
    with pytest.raises(nova.InputError, match="has no sample_scheduler, generate_video"):
        nova.accelerate(SimpleNamespace(transformer=small_model()))
    pipe = StandInPipeline()
    del pipe.transformer.motion_embed
    with pytest.raises(nova.CheckpointError, match="missing: motion_embed"):
        nova.accelerate(pipe)
    with pytest.raises(ValueError, match="backend must be one of"):
        nova.accelerate(StandInPipeline(), backend="fast")


def test_report_of_this_packages_own_pipeline(tiny_video_folder):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_video_folder, backend="reference")
    assert str(nova.report(pipe)) == "sampling: nova, float32 on cpu, ops by backend='reference'"
