"""Every row of docs/errors.md, through the Python API and, where it gets there, the command line.

An error has the right type and names the remedy; the command prints it as one line, exits with 1
and leaves no file.
"""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from make_tiny_checkpoint import VAE_CONFIG
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nova import (
    CheckpointError,
    ConfigError,
    DeviceError,
    InputError,
    MediaError,
    NOVAPipeline,
)
from nova import pipeline as pipeline_module
from nova.cli.app import app
from nova.codec import LatentCodec
from nova.devices import check_device
from nova.inputs import InputWarning
from nova.media import MediaWarning, read_video, save, write_image, write_video
from nova.outputs import convert_pixels
from nova.request import COUNTS, OPTIONAL_COUNTS
from nova.text import PromptTruncationWarning
from nova.training import TextEncoderOptions, make_text_encoder, new_vae
from nova_kernels.errors import BackendError

PROMPT = "a red square"
FAST = ["--steps", "2", "--diffusion-steps", "2", "--latents", "2", "--quiet"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def command(*arguments, out, device="cpu"):
    """Run `nova generate`; an error may come out of it only as a line."""
    arguments = ["generate", *arguments, "--out", out, "--device", device, *FAST]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def check_refusal(result, message, out):
    """One line on stderr that holds the message, exit code 1, and no file."""
    lines = result.stderr.splitlines()
    assert result.exit_code == 1, result.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert message in lines[0]
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


@pytest.fixture(scope="module")
def pipeline(tiny_video_folder):
    return NOVAPipeline.from_pretrained(tiny_video_folder)


@pytest.fixture
def sample(pipeline):
    """Calls the pipeline with few steps, for latents."""

    def call(prompt=PROMPT, **options):
        defaults = {
            "num_inference_steps": 2,
            "num_diffusion_steps": 2,
            "max_latent_length": 2,
            "output_type": "latent",
            "disable_progress_bar": True,
        }
        return pipeline(prompt, **{**defaults, **options})

    return call


@pytest.fixture
def out(tmp_path):
    """Output file in a folder of its own."""
    return tmp_path / "out" / "x.mp4"


# Checkpoints ----------------------------------------------------------------------------------


def edit_json(path, **changes):
    """Change entries; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_config(**changes):
    return lambda folder: edit_json(folder / "transformer" / "config.json", **changes)


def edit_arch(folder, **changes):
    path = folder / "transformer" / "config.json"
    video, *others = json.loads(path.read_text())["arch_dims"]
    edit_json(path, arch_dims=[{**video, **changes}, *others])


def edit_weights(edit):
    def damage(folder):
        path = folder / "transformer" / WEIGHTS
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    return damage


def truncate(folder):
    path = folder / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def make_pickle(folder):
    path = folder / "transformer" / WEIGHTS
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def fill_with_nan(tensors):
    tensors["image_encoder.norm.weight"][:] = float("nan")


def reshape(tensors):
    tensors["image_encoder.norm.weight"] = torch.ones(3)


def quantise(tensors):
    tensors["image_encoder.norm.weight"] = tensors["image_encoder.norm.weight"].to(torch.int8)


def rename(tensors):
    tensors["image_encoder.norm.scale"] = tensors.pop("image_encoder.norm.weight")


def deeper(folder):
    path = folder / "transformer" / "config.json"
    arch_dims = json.loads(path.read_text())["arch_dims"]
    arch_dims[0]["depth"] += 1
    edit_json(path, arch_dims=arch_dims)


DAMAGES = {
    "no weights": (
        lambda folder: (folder / "transformer" / WEIGHTS).unlink(),
        CheckpointError,
        f"has no {WEIGHTS}; is the download complete?",
    ),
    "truncated weights": (truncate, CheckpointError, "is truncated or damaged"),
    "pickle": (make_pickle, CheckpointError, "pass allow_pickle=True (--allow-pickle)"),
    "unknown arch": (
        edit_config(arch_dims=None, arch=["resnet_50", "vit_d4w64", "mlp_d2w64"]),
        ConfigError,
        "such as ['vit_d16w1024', 'vit_d32w1024', 'mlp_d3w1280']",
    ),
    "other arch than the weights": (deeper, CheckpointError, "12 missing: video_encoder.blocks.2."),
    "weights of another shape": (
        edit_weights(reshape),
        CheckpointError,
        "1 mis-shaped: image_encoder.norm.weight (3,) instead of (64,)",
    ),
    "weights under other names": (
        edit_weights(rename),
        CheckpointError,
        "1 missing: image_encoder.norm.weight; 1 unexpected: image_encoder.norm.scale",
    ),
    "NaN weights": (
        edit_weights(fill_with_nan),
        CheckpointError,
        "hold NaN or infinite values in image_encoder.norm.weight; download them again",
    ),
    "quantised weights": (
        edit_weights(quantise),
        CheckpointError,
        "got image_encoder.norm.weight torch.int8; take a checkpoint that is not quantised",
    ),
    "config with unknown keys": (
        edit_config(hidden_size=64),
        ConfigError,
        "unknown keys ['hidden_size']; known keys are",
    ),
    "config without a key": (
        edit_config(image_size=None),
        ConfigError,
        "lacks ['image_size']; add them to config.json",
    ),
    "config that is no JSON": (
        lambda folder: (folder / "transformer" / "config.json").write_text("{"),
        CheckpointError,
        "cannot be read as JSON",
    ),
    "config with text for a number": (
        edit_config(text_token_dim="32"),
        ConfigError,
        "`text_token_dim` must be an integer, got '32'",
    ),
    "config with half a block": (
        lambda folder: edit_arch(folder, depth=2.5),
        ConfigError,
        "`arch_dims`: depth must be an integer, got 2.5",
    ),
    "size that patches do not divide": (
        edit_config(image_size=[60, 96]),
        ConfigError,
        "must be divisible by 32",
    ),
    "scheduler with a shift below zero": (
        lambda folder: edit_json(folder / "scheduler" / "scheduler_config.json", shift=-1),
        ConfigError,
        "scheduler config: shift must be a number above 0, got -1",
    ),
    "unknown scheduler": (
        lambda folder: edit_json(
            folder / "scheduler" / "scheduler_config.json", _sample_class_name="HeunScheduler"
        ),
        ConfigError,
        "scheduler class must be one of ['DDPMScheduler', 'FlowMatchEulerDiscreteScheduler']",
    ),
}


@pytest.fixture
def damaged(request, tiny_video_folder, tmp_path):
    """A damaged copy of the checkpoint, the error that it causes, and part of the message."""
    damage, error, message = DAMAGES[request.param]
    folder = Path(shutil.copytree(tiny_video_folder, tmp_path / "damaged"))
    damage(folder)
    return folder, error, message


@pytest.mark.parametrize("damaged", DAMAGES, indirect=True)
def test_damaged_checkpoint(damaged):
    folder, error, message = damaged
    with pytest.raises(error) as raised:
        NOVAPipeline.from_pretrained(folder)
    assert message in str(raised.value)


@pytest.mark.parametrize("damaged", DAMAGES, indirect=True)
def test_damaged_checkpoint_on_the_command_line(damaged, out):
    folder, _, message = damaged
    check_refusal(command(PROMPT, "--model", folder, out=out), message, out)


def test_folder_of_something_else(tmp_path, out):
    (tmp_path / "photos").mkdir()
    with pytest.raises(CheckpointError, match="is it a NOVA checkpoint in diffusers layout"):
        NOVAPipeline.from_pretrained(tmp_path / "photos")
    result = command(PROMPT, "--model", tmp_path / "photos", out=out)
    check_refusal(result, "is it a NOVA checkpoint in diffusers layout?", out)


@pytest.mark.parametrize("name", ["nothing/at/all", "config.json"])
def test_not_a_folder(tmp_path, out, name):
    path = tmp_path / name
    if name == "config.json":
        path.write_text("{}")
    advice = "give a checkpoint folder, a hub id such as BAAI/nova-d48w1024-osp480, or shapes for"
    message = advice if name != "config.json" else "is a file; give the checkpoint's folder"
    with pytest.raises(CheckpointError) as raised:
        NOVAPipeline.from_pretrained(path)
    assert message in str(raised.value)
    check_refusal(command(PROMPT, "--model", path, out=out), message, out)


@pytest.mark.parametrize("name", ["a" * 300, "~nosuchuser/model"])
def test_names_that_are_no_path(tiny_video_folder, out, name):
    check_refusal(command(PROMPT, "--model", name, out=out), "is no path", out)
    arguments = ["export", str(tiny_video_folder), "--out", name]
    result = CliRunner().invoke(app, arguments)
    # Behind the progress bar of the text encoder's weights.
    assert result.exit_code == 1 and "\nerror: " in f"\n{result.stderr}", result.exception


def test_a_relative_path_is_no_hub_id():
    with pytest.raises(CheckpointError, match="is not a folder; give a checkpoint folder"):
        NOVAPipeline.from_pretrained("./shapes")


class OpensAFile:
    """Unpickling this writes a file: what a hostile checkpoint could do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickle_that_runs_code(tiny_video_folder, tmp_path, out):
    folder = Path(shutil.copytree(tiny_video_folder, tmp_path / "damaged"))
    (folder / "transformer" / WEIGHTS).unlink()
    trace = tmp_path / "trace"
    torch.save({"weight": OpensAFile(trace)}, folder / "transformer" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        NOVAPipeline.from_pretrained(folder, allow_pickle=True)
    result = command(PROMPT, "--model", folder, "--allow-pickle", out=out)
    check_refusal(result, "holds more than tensors", out)
    assert not trace.exists()


def test_parts_of_different_models(tiny_video_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_video_folder, tmp_path / "mixed"))
    LatentCodec(new_vae(replace(VAE_CONFIG, latent_channels=8))).save(folder / "vae")
    with pytest.raises(CheckpointError, match="the VAE has 8 latent channels, the transformer"):
        NOVAPipeline.from_pretrained(folder)
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "text_encoder")
    shutil.rmtree(folder / "tokenizer")
    options = TextEncoderOptions(hidden_size=48, num_heads=3, num_layers=1, steps=0)
    make_text_encoder(["a red circle"], folder, options, show_progress=False)
    with pytest.raises(CheckpointError, match="the text encoder gives 48 values a token, the"):
        NOVAPipeline.from_pretrained(folder)


def test_no_text_encoder_and_no_embeddings(pipeline, tiny_video_folder, tmp_path, out):
    without = NOVAPipeline(pipeline.transformer, pipeline.scheduler, pipeline.vae)
    message = "this pipeline has no text encoder: give prompt_embeds"
    with pytest.raises(InputError, match=message):
        without(PROMPT)
    folder = Path(shutil.copytree(tiny_video_folder, tmp_path / "damaged"))
    shutil.rmtree(folder / "text_encoder")
    check_refusal(command(PROMPT, "--model", folder, out=out), message, out)


# Prompts and numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_empty_prompt(sample, tiny_video_folder, out, prompt):
    with pytest.raises(InputError, match="prompt is empty; write a sentence"):
        sample(prompt)
    result = command(prompt, "--model", tiny_video_folder, out=out)
    check_refusal(result, "prompt is empty; write a sentence", out)


@pytest.mark.parametrize("prompt", [5, {"a": 1}, ["a", 5], b"a"])
def test_prompts_that_are_no_text(sample, prompt):
    with pytest.raises(InputError, match="prompt must be a sentence or a list of them, got"):
        sample(prompt)


def test_every_prompt_has_its_negative_prompt(sample, pipeline):
    prompts, negative = [PROMPT, "a"], ["a blue circle", ""]
    generators = {"generator": [torch.Generator().manual_seed(0) for _ in prompts]}
    together = sample(prompts, negative_prompt=negative, **generators).latents
    for row in range(2):
        generator = torch.Generator().manual_seed(0)
        alone = sample(prompts[row], negative_prompt=negative[row], generator=generator).latents
        torch.testing.assert_close(together[row : row + 1], alone)
    embeds = pipeline.encode_prompt(["a"]) * 3
    with pytest.raises(InputError, match="negative_prompt_embeds needs one entry for each of 2"):
        sample(prompts, negative_prompt_embeds=embeds)


@pytest.mark.parametrize("prompts", [["a", "b"], [], 5])
def test_negative_prompts_of_another_number(sample, prompts):
    with pytest.raises(InputError, match="one sentence, or one for each of 1 prompts"):
        sample(negative_prompt=prompts)


def test_overlong_prompt_is_truncated(sample, tiny_video_folder, out):
    long_prompt = "a red square moves to the left " * 5
    with pytest.warns(PromptTruncationWarning, match="prompts may have 16 tokens; ignored are"):
        sample(long_prompt)
    result = command(long_prompt, "--model", tiny_video_folder, out=out)
    assert result.exit_code == 0
    assert result.stderr.startswith("note: prompts may have 16 tokens; ignored are")


@pytest.mark.parametrize("steps", [0, -3, 2.5, "3", True])
@pytest.mark.parametrize("name", [*COUNTS, *OPTIONAL_COUNTS])
def test_counts_below_one(sample, name, steps):
    with pytest.raises(InputError, match=f"{name} must be a whole number of at least 1, got"):
        sample(**{name: steps})


@pytest.mark.parametrize("flag", ["--steps", "--diffusion-steps", "--latents"])
def test_steps_below_one_on_the_command_line(tiny_video_folder, out, flag):
    arguments = ["generate", PROMPT, "--model", tiny_video_folder, "--out", out, flag, "0"]
    result = CliRunner(env={"NO_COLOR": "1"}).invoke(app, [str(text) for text in arguments])
    assert result.exit_code == 2
    assert f"'{flag}'" in result.stderr
    assert not out.exists()


def test_counts_and_numbers_of_numpy(sample):
    sample(num_inference_steps=np.int64(1), guidance_scale=np.float32(2), fps=np.float64(12))


NUMBERS = ("guidance_scale", "guidance_trunc", "image_guidance_scale", "flow_shift", "motion_flow")


@pytest.mark.parametrize("value", [float("nan"), "5", 10**400], ids=["nan", "text", "too large"])
@pytest.mark.parametrize("name", [*NUMBERS, "fps"])
def test_numbers_that_are_not_finite(sample, name, value):
    with pytest.raises(InputError, match=f"must be a finite number, got {value!r}"):
        sample(**{name: value})


@pytest.mark.parametrize("fps", [0, -3.0, [0.0]])
def test_rates_that_are_not_above_zero(sample, fps):
    with pytest.raises(InputError, match="fps must be above 0, got"):
        sample(fps=fps)


@pytest.mark.parametrize("name", ["image", "video"])
def test_empty_list_of_pictures(sample, name):
    with pytest.raises(InputError, match=f"{name} is an empty list; give"):
        sample(**{name: []})


@pytest.mark.parametrize("generator", [5, [5]])
def test_seed_in_place_of_a_generator(sample, generator):
    with pytest.raises(InputError, match=r"must be a torch.Generator, such as .* got 5"):
        sample(generator=generator)


def test_what_a_callback_may_return(sample):
    with pytest.raises(InputError, match="must return a dict, .* got int"):
        sample(callback_on_step_end=lambda *_: 5)


@pytest.mark.parametrize("embeds", [["a"], [None]])
def test_embeddings_that_hold_no_numbers(sample, embeds):
    with pytest.raises(InputError, match="prompt_embeds must be a tensor"):
        sample(None, prompt_embeds=embeds)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_embeddings_that_are_not_finite(sample, pipeline, name, value):
    embeds = [torch.zeros(2, pipeline.config.text_token_dim)]
    sample(None, prompt_embeds=embeds, negative_prompt_embeds=embeds)
    damaged = {"prompt_embeds": embeds, name: [torch.full_like(embeds[0], value)]}
    with pytest.raises(InputError, match=f"^{name} holds NaN or infinite values"):
        sample(None, **damaged)


@pytest.mark.parametrize(
    "name, shape, dtype",
    [
        ("image", (64, 64, 3), np.float32),
        ("image", (64, 64), np.uint8),
        ("image", (64, 64, 4), np.uint8),
        ("image", (0, 64, 3), np.uint8),
        ("video", (64, 64, 3), np.uint8),
        ("video", (5, 3, 64, 64), np.uint8),
    ],
)
def test_arrays_that_are_no_pictures(sample, name, shape, dtype):
    with pytest.raises(InputError, match=f"{name} must be a path, PIL images, or a uint8 array"):
        sample(**{name: np.zeros(shape, dtype)})


def test_lists_of_frames(sample):
    frames = [np.zeros((64, 64, 3), np.uint8), np.zeros((32, 64, 3), np.uint8)]
    with pytest.raises(InputError, match="frames of a video must be of one size"):
        sample(video=frames)
    with pytest.raises(InputError, match="image is no array"):
        sample(image=[[[[0, 0, 0]], [[0, 0]]]])
    latents = [torch.zeros(1, 4, 8, 12), torch.zeros(2, 4, 8, 12)]
    given = sample([PROMPT] * 2, latents=latents, max_latent_length=3).latents
    assert given.shape == (2, 4, 3, 8, 12) and not given[:, :, :2].any()
    with pytest.raises(InputError, match="must be of one shape"):
        sample(latents=[latents[0], latents[0][..., :4]])


def test_motion_of_other_samples(sample):
    for name in ("motion_flow", "fps"):
        with pytest.raises(InputError, match=f"a list of {name} needs 1 values, got 2"):
            sample(**{name: [5.0, 6.0]})


@pytest.mark.parametrize("output_type", ["pt", "np", "pil", "uint8"])
def test_pixels_that_are_not_finite(output_type):
    pixels = torch.zeros(1, 3, 2, 8, 8)
    convert_pixels(pixels, output_type)
    pixels[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="1 of 384 pixel values are NaN or .* try bfloat16"):
        convert_pixels(pixels, output_type)


def test_pictures_without_a_vae(pipeline):
    without = NOVAPipeline(pipeline.transformer, pipeline.scheduler, None, pipeline.text_encoder)
    with pytest.raises(InputError, match="has no VAE to encode pictures with: give latents"):
        without(PROMPT, image=np.zeros((64, 64, 3), np.uint8), output_type="latent")


def test_callback_that_is_no_function(sample):
    with pytest.raises(InputError, match="callback_on_step_end must be a function"):
        sample(callback_on_step_end=5)


def test_generator_list_of_the_wrong_length(sample):
    with pytest.raises(InputError, match="one for each of the 1 samples .* got 3"):
        sample(generator=[torch.Generator() for _ in range(3)])


def test_class_models_take_classes(tiny_class_folder, out):
    pipeline = NOVAPipeline.from_pretrained(tiny_class_folder)
    with pytest.raises(InputError, match=r"must be class ids in 0\.\.1000, got 'a red square'"):
        pipeline(PROMPT)
    with pytest.raises(InputError, match=r"must be class ids in 0\.\.1000, got 1001"):
        pipeline(1001)
    with pytest.raises(InputError, match="image_guidance_scale is for text-conditioned models"):
        pipeline(7, image_guidance_scale=1.5)
    with pytest.raises(InputError, match="negative_prompt needs one class id, or 3"):
        pipeline(torch.tensor([7, 8, 9]), negative_prompt=[1, 2])
    out = out.with_suffix(".png")
    arguments = ["generate", PROMPT, "--model", tiny_class_folder, "--out", out, "--device", "cpu"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    check_refusal(result, "give --class-id in place of a prompt", out)


# Pictures and latents to go on from -----------------------------------------------------------


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 4, 1, 8, 8), "must have the shape (1, 4, frames, 8, 12), got (1, 4, 1, 8, 8)"),
        ((1, 3, 1, 8, 12), "must have the shape (1, 4, frames, 8, 12), got (1, 3, 1, 8, 12)"),
        ((4, 8, 12), "must be a tensor (batch, channels, frames, h, w) or a list of frames"),
        ((3, 4, 1, 8, 12), "3 given for a batch of 1"),
    ],
)
def test_latents_of_another_shape(sample, shape, message):
    with pytest.raises(InputError) as raised:
        sample(latents=torch.zeros(shape))
    assert message in str(raised.value)


def test_more_given_frames_than_wanted(sample, tiny_video_folder, tmp_path, out):
    with pytest.raises(InputError, match="3 latent frames are given.*raise max_latent_length"):
        sample(latents=torch.zeros(1, 4, 3, 8, 12))
    write_video(tmp_path / "clip.mp4", np.zeros((9, 64, 96, 3), np.uint8), 12)
    result = command(
        PROMPT, "--model", tiny_video_folder, "--video", tmp_path / "clip.mp4", out=out
    )
    check_refusal(result, "raise --latents to at least 4", out)


def test_image_models_go_on_from_nothing(tiny_image_folder, tmp_path, out):
    message = "this is an image model, which goes on from nothing: no"
    pipeline = NOVAPipeline.from_pretrained(tiny_image_folder)
    black = np.zeros((64, 64, 3), np.uint8)
    for given in ({"image": black}, {"video": black[None]}, {"latents": torch.zeros(1)}):
        with pytest.raises(InputError, match=f"{message} {next(iter(given))}"):
            pipeline(PROMPT, **given)
    image = write_image(tmp_path / "black.png", black)
    out = out.with_suffix(".png")
    arguments = ["generate", PROMPT, "--model", tiny_image_folder, "--image", image, "--out", out]
    result = CliRunner().invoke(app, [str(a) for a in [*arguments, "--device", "cpu", "--quiet"]])
    check_refusal(result, "image model", out)


def test_image_of_another_size_is_fitted(sample, tiny_video_folder, tmp_path, out):
    message = "the image of 100 x 40 pixels is resized and cropped to the model's 64 x 96"
    with pytest.warns(InputWarning, match=message):
        sample(image=np.zeros((100, 40, 3), np.uint8))
    image = write_image(tmp_path / "tall.png", np.zeros((100, 40, 3), np.uint8))
    result = command(PROMPT, "--model", tiny_video_folder, "--image", image, out=out)
    assert result.exit_code == 0
    assert result.stderr == f"note: {message}\n"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.png", None, "does not exist"),
        ("text.png", b"not a picture", "it is damaged, or not an image"),
        ("empty.png", b"", "is empty (0 bytes)"),
    ],
)
def test_broken_image(sample, tiny_video_folder, tmp_path, out, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError) as raised:
        sample(image=path)
    assert message in str(raised.value)
    result = command(PROMPT, "--model", tiny_video_folder, "--image", path, out=out)
    check_refusal(result, message, out)


def test_unreadable_video(sample, tiny_video_folder, tmp_path, out):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"not a video" * 100)
    message = "cannot be read as a video: it is damaged, truncated, or not a video"
    with pytest.raises(MediaError, match=message):
        sample(video=path)
    result = command(PROMPT, "--model", tiny_video_folder, "--video", path, out=out)
    check_refusal(result, message, out)


def test_image_and_video_at_once(sample, tiny_video_folder, tmp_path, out):
    black = np.zeros((64, 96, 3), np.uint8)
    with pytest.raises(InputError, match="give one of image, video and latents"):
        sample(image=black, video=black[None])
    image = write_image(tmp_path / "black.png", black)
    result = command(
        PROMPT, "--model", tiny_video_folder, "--image", image, "--video", image, out=out
    )
    check_refusal(result, "give one of --image and --video, not both", out)


def test_image_models_make_no_videos(tiny_image_folder, out):
    pipeline = NOVAPipeline.from_pretrained(tiny_image_folder)
    with pytest.raises(InputError, match="this is an image model: max_latent_length must be 1"):
        pipeline(PROMPT, max_latent_length=2, output_type="latent", disable_progress_bar=True)
    arguments = ["generate", PROMPT, "--model", tiny_image_folder, "--out", out, "--device", "cpu"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    check_refusal(result, f"name an image file such as {out.with_suffix('.png')}", out)


# Outputs --------------------------------------------------------------------------------------


def test_odd_output_size_is_padded(tmp_path):
    frames = np.zeros((2, 33, 47, 3), np.uint8)
    with pytest.warns(MediaWarning, match="47 x 33 is written as 48 x 34"):
        save(tmp_path / "odd.mp4", frames, 12)
    assert read_video(tmp_path / "odd.mp4")[0].shape == (2, 34, 48, 3)


@pytest.mark.parametrize(
    "name, message",
    [
        ("file/x.mp4", "file cannot be made"),
        ("x.xyz", "the name must end in one of .mp4"),
        ("folder.mp4", "is a folder; name a file in it"),
    ],
)
def test_unwritable_output(tiny_video_folder, tmp_path, name, message):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.mp4").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MediaError) as raised:
        save(tmp_path / name, np.zeros((2, 32, 32, 3), np.uint8), 12)
    assert message in str(raised.value)
    result = command(PROMPT, "--model", tiny_video_folder, out=tmp_path / name)
    assert result.exit_code == 1
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_output_is_checked_before_the_model(tmp_path):
    result = command(PROMPT, "--model", tmp_path / "nothing", out=tmp_path / "x.xyz")
    assert "the name must end in one of" in result.stderr


# Devices --------------------------------------------------------------------------------------


def test_cuda_is_absent(pipeline, tiny_video_folder, out, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="CUDA was asked for, but .* use --device cpu"):
        pipeline.to("cuda")
    result = command(PROMPT, "--model", tiny_video_folder, out=out, device="cuda")
    check_refusal(result, "use --device cpu, see nova doctor", out)


def test_unknown_device(pipeline, tiny_video_folder, out):
    message = "'gpu' is no device; use cpu, cuda, cuda:1 or mps"
    with pytest.raises(DeviceError, match=message):
        pipeline.to("gpu")
    check_refusal(
        command(PROMPT, "--model", tiny_video_folder, out=out, device="gpu"), message, out
    )


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert check_device("cuda:1") == torch.device("cuda", 1)
    for device, message in (
        ("cuda:2", "there is no cuda:2: 2 GPUs are visible, from cuda:0 on"),
        ("mps", "MPS was asked for, but it is not available; use --device cpu"),
        ("vulkan", "vulkan is not supported; use cpu, cuda, cuda:1 or mps"),
    ):
        with pytest.raises(DeviceError, match=message):
            check_device(device)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_backend_that_cannot_run(tiny_video_folder, out, monkeypatch, backend):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # else Triton runs on CPUs too
    pipeline = NOVAPipeline.from_pretrained(tiny_video_folder, backend=backend)
    with pytest.raises(BackendError, match="backend '.*' cannot run: "):
        pipeline(PROMPT, num_inference_steps=2, num_diffusion_steps=2, max_latent_length=2)
    result = command(PROMPT, "--model", tiny_video_folder, "--backend", backend, out=out)
    check_refusal(result, "cannot run: ", out)
    assert result.stdout == ""  # before weights are loaded
    monkeypatch.setenv("NOVA_KERNELS_BACKEND", backend)
    result = command(PROMPT, "--model", tiny_video_folder, out=out)
    check_refusal(result, "(NOVA_KERNELS_BACKEND asks for it)", out)


def test_out_of_memory(sample, tiny_video_folder, out, monkeypatch):
    def allocate_a_petabyte(*_, **__):
        yield torch.empty(2**50, dtype=torch.uint8)

    monkeypatch.setattr(pipeline_module, "generate_frames", allocate_a_petabyte)
    with pytest.raises(DeviceError, match="out of memory while sampling. Use fewer latent frames"):
        sample()
    result = command(PROMPT, "--model", tiny_video_folder, out=out)
    check_refusal(result, "out of memory while sampling. Use fewer latent frames", out)


@pytest.mark.parametrize(
    "message, gpu",
    [
        ("CUDA out of memory.", None),
        ("CUDA out of memory. Tried to allocate 2 GiB. GPU 1 has a total capacity of 16 GiB", 1),
    ],
)
def test_out_of_gpu_memory(sample, monkeypatch, message, gpu):
    def fail(*_, **__):
        raise torch.OutOfMemoryError(message)
        yield

    def mem_get_info(device):
        assert device == gpu
        return 2**30, 2**34

    monkeypatch.setattr(pipeline_module, "generate_frames", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    with pytest.raises(DeviceError, match=r"1\.0 of 16\.0 GiB free.*enable_model_cpu_offload"):
        sample()


def test_good_input_warns_of_nothing(sample):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sample().latents.shape == (1, 4, 2, 8, 12)
