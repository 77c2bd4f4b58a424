"""torch.autocast and torch's default dtype and device do not change a video."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from make_tiny_checkpoint import VAE_CONFIG
from PIL import Image
from reference_stand_in import StandInPipeline
from small_models import SMALL, small_prompts
from training_data import write_latents

import nova
from nova import inputs
from nova.devices import torch_defaults
from nova.inputs import InputWarning
from nova.schedule import DDPMConfig, FlowMatchConfig
from nova.training import TrainingOptions, new_model, new_vae
from nova.training.samples import TrainingSamples
from nova.vae.tiles import SpatialTiling, blend_tiles
from nova_kernels.self_check import largest_error, self_checks

FAST = {"num_inference_steps": 3, "num_diffusion_steps": 2, "disable_progress_bar": True}


@contextmanager
def autocast():
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        yield


SETTINGS = {
    "autocast": autocast,
    "bfloat16": lambda: torch_defaults(torch.bfloat16, "cpu"),
    "float64": lambda: torch_defaults(torch.float64, "cpu"),
    # Whatever is made on the default device in place of the model's has no values here.
    "device": lambda: torch.device("meta"),
}


@pytest.fixture(params=SETTINGS)
def setting(request):
    """Makes a context manager, under which torch is set otherwise."""
    return SETTINGS[request.param]


def call(pipe, prompt, **options):
    generator = torch.Generator().manual_seed(0)
    output = pipe(prompt, generator=generator, output_type="pt", **FAST, **options)
    return output.latents, output.images if output.frames is None else output.frames


def assert_unchanged(setting, work):
    expected = work()
    with setting():
        result = work()
    for one, other in zip(result, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("options", [{}, {"image": Image.new("RGB", (96, 64), "red")}])
def test_clips(setting, options, tiny_video_folder):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_video_folder)
    assert_unchanged(setting, lambda: call(pipe, "a red circle", max_latent_length=3, **options))


@pytest.mark.parametrize("scheduler", [None, DDPMConfig(beta_schedule="squaredcos_cap_v2")])
def test_images(setting, scheduler, tiny_image_folder):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_image_folder)
    pipe.scheduler = scheduler or pipe.scheduler
    assert_unchanged(setting, lambda: call(pipe, "a red circle"))


def test_classes(setting, tiny_class_folder):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_class_folder)
    assert_unchanged(setting, lambda: call(pipe, [1, 2]))


def test_streams(setting, tiny_video_folder):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_video_folder)

    def stream():
        generator = torch.Generator().manual_seed(0)
        options = {"generator": generator, "output_type": "pt", "max_latent_length": 3, **FAST}
        state = torch.is_autocast_enabled("cpu"), torch.get_default_dtype()
        for piece in pipe.stream("a red circle", **options):
            assert (torch.is_autocast_enabled("cpu"), torch.get_default_dtype()) == state
            yield piece.frames

    assert_unchanged(setting, lambda: list(stream()))


def test_embeddings_given_as_lists(setting, tiny_image_folder):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_image_folder)
    embeds = [pipe.encode_prompt(["a red circle"])[0].tolist()]
    assert_unchanged(setting, lambda: call(pipe, None, prompt_embeds=embeds))


def test_opened_with_another_default_dtype(tiny_video_folder):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_video_folder)
    with torch_defaults(torch.bfloat16, "cpu"):
        opened = nova.NOVAPipeline.from_pretrained(tiny_video_folder)
    assert opened.dtype == torch.float32
    assert all(map(torch.equal, call(opened, "a red circle"), call(pipe, "a red circle")))


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_tables_of_ddpm(setting, schedule):
    config = DDPMConfig(beta_schedule=schedule)
    expected = config.schedule(25), config.alphas_cumprod().tolist()
    with setting():
        assert (config.schedule(25), config.alphas_cumprod().tolist()) == expected


def test_tables_of_flow_matching(setting):
    assert_unchanged(setting, FlowMatchConfig(shift=2.0).training_tables)


def test_blended_tiles(setting):
    x = torch.randn(1, 2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    tiling = SpatialTiling((8, 8), (3, 3))
    assert_unchanged(setting, lambda: [blend_tiles(x, lambda tile: 2 * tile, tiling, 1, 1)])


def test_fresh_weights(setting):
    assert_unchanged(setting, lambda: new_model(SMALL).state_dict().values())
    assert_unchanged(setting, lambda: new_vae(VAE_CONFIG).state_dict().values())


@pytest.mark.parametrize("scheduler", [DDPMConfig(), FlowMatchConfig()])
@pytest.mark.parametrize("name", ["autocast", "bfloat16", "float64"])
def test_samples_of_training(scheduler, name, tmp_path):
    data = write_latents(tmp_path)

    def first_sample():
        return TrainingSamples(data, SMALL, scheduler, TrainingOptions(out=tmp_path))[0, 0].values()

    assert_unchanged(SETTINGS[name], first_sample)


@pytest.mark.parametrize("name", ["bfloat16", "float64", "device"])
def test_checks_of_ops(name):
    def errors():
        return [largest_error(c, "reference", "cpu", torch.float32) for c in self_checks()]

    expected = errors()
    with SETTINGS[name]():
        assert errors() == expected


def test_autocast_to_another_dtype_is_told(tiny_image_folder):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_image_folder)
    message = r"sampling computes in torch.float32, .* pipe.to\(torch.bfloat16\)"
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(InputWarning, match=message) as told:
        call(pipe, "a red circle")
    assert len(told) == 1
    pipe.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        call(pipe, "a red circle")


def test_half_precision_with_too_few_threads_is_told(tiny_image_folder, monkeypatch):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_image_folder)
    monkeypatch.setattr(inputs, "gives_all_threads", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(pipe, "a red circle")
    pipe.to(torch.bfloat16)
    with pytest.warns(InputWarning, match=r"OMP_THREAD_LIMIT .* Unset it, or use torch.float32"):
        call(pipe, "a red circle")


OF_REFERENCE = {"num_inference_steps": 4, "num_diffusion_steps": 3, "max_latent_length": 2}


def test_accelerated_in_the_dtype_of_autocast():
    prompts = small_prompts(SMALL, 2)
    pipe = nova.accelerate(StandInPipeline())
    pipe.transformer.to(torch.bfloat16)
    expected = pipe(prompts.bfloat16(), **OF_REFERENCE).frames
    with torch.autocast("cpu", torch.bfloat16):
        frames = pipe(prompts.bfloat16(), **OF_REFERENCE).frames
    assert pipe.transformer.calls == 0
    assert frames.dtype == torch.bfloat16
    # The prompts are embedded by the reference, under autocast.
    torch.testing.assert_close(frames, expected, rtol=0.1, atol=0.1)


def test_accelerated_in_the_dtype_of_the_weights():
    prompts = small_prompts(SMALL, 2)
    pipe = nova.accelerate(StandInPipeline())
    expected = pipe(prompts, **OF_REFERENCE).frames
    message = r"sampling computes in torch.float32, .* pipe.to\(torch.bfloat16\)"
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(InputWarning, match=message):
        frames = pipe(prompts, **OF_REFERENCE).frames
    assert pipe.transformer.calls == 0 and frames.dtype == torch.float32
    # The prompts are embedded by the reference, under autocast.
    torch.testing.assert_close(frames, expected, rtol=0.1, atol=0.1)
