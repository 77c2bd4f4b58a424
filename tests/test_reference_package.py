"""The reference package as a peer: a stand-in here, and itself where it can be imported.

    PYTHONPATH=third_party/NOVA python -m pytest tests/test_reference_package.py

It needs scipy and einops besides, and a checkout that still runs with the transformers installed.
"""

import numpy as np
import pytest
import reference_package
import torch
from PIL import Image
from random_model import RandomModelRun
from reference_package import ReferenceSampler, make_reference
from reference_stand_in import FlowMatchEulerDiscreteScheduler, StandInTransformer
from safetensors.torch import load_file

import nova
from nova.graph_recording import RecordingError
from nova.plain_sampling import generate_frames_plain
from nova.sampling import generate_frames
from nova.vae import VAEConfig

CALL = {
    "num_inference_steps": 5,
    "num_diffusion_steps": 4,
    "max_latent_length": 3,
    "output_type": "latent",
    "disable_progress_bar": True,
}
PROMPTS = ["a red ball moves to the left", "a star"]
CALLS = {
    "as it is": {},
    "one image": {"max_latent_length": 1},
    "longer than trained": {"max_latent_length": 5},
    "many steps": {"num_inference_steps": 64},
    "no guidance": {"guidance_scale": 1.0},
    "negative prompt": {"negative_prompt": "a circle"},
    "image guidance": {"image_guidance_scale": 1.5},
    "renorm and trunc": {"guidance_renorm": 0.3, "guidance_trunc": 500},
    "flow shift": {"flow_shift": 3.0},
    "motion": {"motion_flow": 9},
    "two of each": {"num_images_per_prompt": 2},
    "overlong prompt": {"prompt": ["word " * 600]},  # both cut it
    "embeddings": {"prompt": None, "prompt_embeds": [torch.ones(7, 32), torch.zeros(3, 32)]},
}


def make_run():
    sizes = {"num_frames": 2, "num_steps": 3, "num_diffusion_steps": 2}
    device = torch.device("cpu")
    return RandomModelRun("tiny-video", batch=1, device=device, dtype=torch.float32, **sizes)


@pytest.mark.filterwarnings("ignore:this call samples as before:UserWarning")
def test_what_is_left_to_the_reference_does_not_pass_for_accelerated(monkeypatch):
    run, made = make_run(), []

    def make(model):
        made.append(StandInTransformer(model, FlowMatchEulerDiscreteScheduler()))
        return made[-1]

    monkeypatch.setattr(reference_package, "import_reference", lambda: None)
    monkeypatch.setattr(reference_package, "make_reference", make)
    sampler = ReferenceSampler(accelerated=True)
    expected = run.sample(generate_frames)
    assert torch.equal(run.sample(sampler), expected)
    made[0].image_encoder.register_forward_hook(lambda *_: None)
    with pytest.raises(RecordingError, match="hook"):
        run.sample(sampler)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small checkpoint whose VAE the reference can open: it has 32 groups in all norms."""
    import make_tiny_checkpoint

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_tiny_checkpoint, "VAE_CONFIG", VAEConfig.tiny())
        return make_tiny_checkpoint.make_tiny_checkpoint(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def reference(folder):
    """The reference's own pipeline with the weights of the folder."""
    pytest.importorskip("diffnext", reason="the reference package is not here")
    from diffnext.models.autoencoders.autoencoder_kl_opensora import AutoencoderKLOpenSora
    from diffnext.models.text_encoders.phi import PhiEncoderModel
    from diffnext.pipelines import NOVAPipeline
    from diffnext.schedulers.scheduling_cfm import FlowMatchEulerDiscreteScheduler
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder / "text_encoder")
    # The reference reads them where transformers 4 has them.
    for name in ("partial_rotary_factor", "rope_theta"):
        setattr(config, name, config.rope_parameters[name])
    text_encoder = PhiEncoderModel(config).eval()
    text_encoder.model.load_state_dict(load_file(folder / "text_encoder" / "model.safetensors"))
    pipe = NOVAPipeline(
        transformer=make_reference(nova.NOVAPipeline.from_pretrained(folder).transformer),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=AutoencoderKLOpenSora.from_pretrained(folder / "vae").eval(),
        text_encoder=text_encoder,
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
    )
    return pipe.to("cpu")


def call(pipe, **options):
    generator = torch.Generator().manual_seed(3)
    output = pipe(**{"prompt": PROMPTS, **CALL, **options, "generator": generator})
    frames = getattr(output, "frames", None)
    return output.images if frames is None else frames


def without_time(latents):
    """Of one image the reference gives a frame axis, and this package none."""
    return latents[:, :, 0] if latents.dim() == 5 and latents.shape[2] == 1 else latents


@pytest.mark.filterwarnings("ignore::nova.text.PromptTruncationWarning")
@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_the_same_call_gives_the_same_video(folder, reference, options):
    reference.scheduler.set_shift(1.0)  # an earlier call's stays
    expected = without_time(call(reference, **options))
    ours = without_time(call(nova.NOVAPipeline.from_pretrained(folder), **options))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    reference.scheduler.set_shift(1.0)
    nova.accelerate(reference)
    try:
        accelerated = without_time(call(reference, **options))
        assert nova.report(reference).left_to_reference is None
    finally:
        nova.restore(reference)
    torch.testing.assert_close(accelerated, expected, rtol=1e-4, atol=1e-4)


def test_an_image_goes_on_and_is_decoded(folder, reference):
    height, width = reference.transformer.config.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    options = {"prompt": PROMPTS[:1], "image": pixels, "output_type": "np"}
    reference.scheduler.set_shift(1.0)
    expected = call(reference, **options)
    pipe = nova.NOVAPipeline.from_pretrained(folder)
    # This package's arrays are those of diffusers, from 0 to 1; the reference's are pixels.
    ours = 255 * call(pipe, **{**options, "image": Image.fromarray(pixels)})
    assert ours.shape == expected.shape == (1, 9, height, width, 3)
    assert np.abs(ours - expected).max() < 1.01


def test_spatiotemporal_guidance_is_left_to_the_reference(reference):
    reference.scheduler.set_shift(1.0)
    options = {"spatiotemporal_guidance_scale": 1.0}
    expected = call(reference, **options)
    nova.accelerate(reference)
    try:
        with pytest.warns(UserWarning, match="spatiotemporal_guidance_scale"):
            assert torch.equal(call(reference, **options), expected)
    finally:
        nova.restore(reference)


def test_the_reference_samples_what_plain_samples(reference):
    run = make_run()
    expected = run.sample(generate_frames_plain)
    for sampler in (ReferenceSampler(), ReferenceSampler(accelerated=True)):
        torch.testing.assert_close(run.sample(sampler), expected, rtol=1e-4, atol=1e-4)
