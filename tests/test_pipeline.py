"""NOVAPipeline on small checkpoint folders: opening, saving, every way of sampling, outputs."""

import gc
import json
import shutil
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import Repeated, small_image_codec
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nova
from nova.codec import LatentCodec, to_pixels
from nova.config import named_config
from nova.engine import SamplingGraphs
from nova.errors import CheckpointError, InputError
from nova.inputs import InputWarning
from nova.model import NOVATransformer
from nova.schedule import FlowMatchConfig
from nova.text import PromptTruncationWarning
from nova.training.checkpoints import FrozenParts
from nova.vae import CausalVideoVAE, VAEConfig, framewise

PROMPT = "a red circle moving right"
FAST = {"num_inference_steps": 3, "num_diffusion_steps": 2, "disable_progress_bar": True}


@pytest.fixture(scope="module")
def pipe(tiny_video_folder):
    return nova.NOVAPipeline.from_pretrained(tiny_video_folder)


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(seeds) > 1 else generators[0]


def latents_of(pipe, prompt=PROMPT, **options):
    options = {"generator": seeded(0), "output_type": "latent", **FAST, **options}
    return pipe(prompt, **options).latents


# Opening and saving --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", torch.int8, torch.float8_e4m3fn])
def test_dtypes_that_no_model_computes_in(pipe, tiny_video_folder, dtype):
    with pytest.raises(InputError, match="torch_dtype must be a floating point torch.dtype"):
        nova.NOVAPipeline.from_pretrained(tiny_video_folder, torch_dtype=dtype)
    with pytest.raises(InputError, match="dtype must be a floating point torch.dtype"):
        pipe.to(dtype=dtype)


def test_home_folders_are_written_to(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pipe.save_pretrained("~/model")
    assert (tmp_path / "model" / "generation_config.json").exists()
    assert nova.NOVAPipeline.from_pretrained("~/model").config == pipe.config
    with pytest.raises(CheckpointError, match="~nosuchuser/model is no path"):
        pipe.save_pretrained("~nosuchuser/model")


def test_save_and_open_again(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "copy")
    again = nova.NOVAPipeline.from_pretrained(tmp_path / "copy")
    assert again.config == pipe.config and again.scheduler == pipe.scheduler
    assert torch.equal(latents_of(again), latents_of(pipe))


def released_like(folder, source):
    """The same weights laid out as the released folders are: other class names, shards, fp16."""
    shutil.copytree(source, folder)
    index = {
        "_class_name": "NOVAPipeline",
        "_diffusers_version": "0.31.0",
        "scheduler": [
            "diffnext.schedulers.scheduling_cfm",
            "FlowMatchEulerDiscreteScheduler",
        ],
        "text_encoder": ["diffnext.models.text_encoders.phi", "PhiEncoderModel"],
        "tokenizer": ["transformers", "CodeGenTokenizerFast"],
        "transformer": [
            "diffnext.models.transformers.transformer_nova",
            "NOVATransformer3DModel",
        ],
        "vae": [
            "diffnext.models.autoencoders.autoencoder_kl_opensora",
            "AutoencoderKLOpenSora",
        ],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    whole = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {key: tensor.half() for key, tensor in load_file(whole).items()}
    whole.unlink()
    keys, weight_map = sorted(tensors), {}
    for part, chosen in enumerate((keys[::2], keys[1::2]), start=1):
        name = f"diffusion_pytorch_model-0000{part}-of-00002.safetensors"
        save_file({key: tensors[key] for key in chosen}, folder / "transformer" / name)
        weight_map.update(dict.fromkeys(chosen, name))
    shards = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (whole.parent / f"{whole.name}.index.json").write_text(json.dumps(shards))
    return folder


def test_a_folder_forgets_parts_that_a_later_pipeline_lacks(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    nova.NOVAPipeline(pipe.transformer, pipe.scheduler).save_pretrained(tmp_path)
    opened = nova.NOVAPipeline.from_pretrained(tmp_path)
    assert opened.vae is None and opened.text_encoder is None
    assert FrozenParts.of(tmp_path).folders == {}


def test_an_image_vae_decodes_no_video(pipe):
    images = nova.NOVAPipeline(pipe.transformer, pipe.scheduler, small_image_codec())
    options = {"prompt_embeds": pipe.encode_prompt([PROMPT]), "max_latent_length": 2, **FAST}
    for run in (images, images.stream):
        with pytest.raises(InputError, match="VAE is of images: ask for max_latent_length=1"):
            run(**options)
    assert images(**{**options, "output_type": "latent"}).latents.shape[2] == 2


def test_a_folder_as_released_opens_as_it_is(pipe, tiny_video_folder, tmp_path):
    folder = released_like(tmp_path / "released", tiny_video_folder)
    released = nova.NOVAPipeline.from_pretrained(folder)
    assert released.dtype == torch.float32
    expected = {k: v.half().float() for k, v in pipe.transformer.state_dict().items()}
    for key, tensor in released.transformer.state_dict().items():
        assert torch.equal(tensor, expected[key])
    half = nova.NOVAPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert half.dtype == half.vae.module.dtype == half.text_encoder.dtype == torch.bfloat16


def test_optional_parts_may_be_missing(tiny_video_folder, tmp_path, pipe):
    folder = tmp_path / "bare"
    shutil.copytree(tiny_video_folder, folder)
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
    bare = nova.NOVAPipeline.from_pretrained(folder)
    assert bare.vae is None and bare.text_encoder is None
    embeds = pipe.encode_prompt([PROMPT])
    assert torch.equal(latents_of(bare, None, prompt_embeds=embeds), latents_of(pipe))
    with pytest.raises(InputError, match="prompt_embeds"):
        bare(PROMPT, output_type="latent")
    with pytest.raises(InputError, match="no VAE"):
        bare(prompt_embeds=embeds)


def test_parts_can_be_left_out_or_replaced(tiny_video_folder, pipe):
    other = nova.NOVAPipeline.from_pretrained(tiny_video_folder, text_encoder=None, vae=pipe.vae)
    assert other.text_encoder is None and other.vae is pipe.vae


def test_parts_that_do_not_belong_together(tiny_video_folder, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(tiny_video_folder, folder)
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "text_token_dim": 48}))
    with pytest.raises(CheckpointError, match="text_embed.proj.weight"):
        nova.NOVAPipeline.from_pretrained(folder)


def test_variant(tiny_video_folder, tmp_path, pipe):
    folder = tmp_path / "variant"
    shutil.copytree(tiny_video_folder, folder)
    whole = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    whole.rename(whole.with_name("diffusion_pytorch_model.fp16.safetensors"))
    variant = nova.NOVAPipeline.from_pretrained(folder, variant="fp16")
    assert torch.equal(latents_of(variant), latents_of(pipe))


def test_pickled_weights_of_every_part(tiny_video_folder, tmp_path, pipe):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_video_folder, folder)
    for path in folder.glob("*/*.safetensors"):
        name = "pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()
    with pytest.raises(CheckpointError, match="allow_pickle"):
        nova.NOVAPipeline.from_pretrained(folder)
    pickled = nova.NOVAPipeline.from_pretrained(folder, allow_pickle=True)
    assert torch.equal(latents_of(pickled, image=picture()), latents_of(pipe, image=picture()))


# Ways of sampling ----------------------------------------------------------------------------


def test_text_to_video(pipe):
    output = pipe([PROMPT, "a blue square"], generator=seeded(0), output_type="uint8", **FAST)
    assert output.images is None and output.frames.shape == (2, 9, 64, 96, 3)
    assert output.latents.shape == (2, 4, 3, 8, 12)


def test_text_to_image(tiny_image_folder):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_image_folder)
    output = pipe(PROMPT, generator=seeded(0), **FAST)
    assert output.frames is None and output.images[0].size == (64, 64)
    with pytest.raises(InputError, match="image model"):
        pipe(PROMPT, max_latent_length=2, **FAST)
    for name, given in (("image", picture()), ("latents", output.latents)):
        with pytest.raises(InputError, match=f"goes on from nothing: no {name}"):
            pipe(PROMPT, **{name: given}, **FAST)


@pytest.mark.parametrize("key", ["motion_flow", "fps"])
def test_class_to_video_follows_motion(key):
    """As prompts do, and as in training."""
    torch.manual_seed(0)
    config = replace(named_config("tiny-video"), text_token_dim=None)
    pipe = nova.NOVAPipeline(NOVATransformer(config), FlowMatchConfig())
    slow, fast = (latents_of(pipe, 3, max_latent_length=2, **{key: x}) for x in (1.0, 30.0))
    assert not torch.equal(slow, fast)


def test_class_to_image(tiny_class_folder):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_class_folder)
    output = pipe([7, 207], generator=seeded(0), output_type="uint8", **FAST)
    assert output.images.shape == (2, 64, 64, 3)
    same = pipe([7, 207], negative_prompt=1000, generator=seeded(0), output_type="uint8", **FAST)
    assert np.array_equal(same.images, output.images)
    numpys = [np.int64(7), np.int64(207)]
    same = pipe(numpys, negative_prompt=np.int64(1000), generator=seeded(0), output_type="uint8",
                **FAST)  # fmt: skip
    assert np.array_equal(same.images, output.images)
    for wrong in (1001, "a cat", [], None, [True]):
        with pytest.raises(InputError, match="class ids"):
            pipe(wrong, **FAST)


def test_first_frame_of_a_video_model(pipe):
    output = pipe(PROMPT, max_latent_length=1, output_type="uint8", **FAST)
    assert output.frames is None and output.images.shape == (1, 64, 96, 3)


def picture(height=64, width=96, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_image_to_video(pipe, tmp_path):
    image = picture()
    expected = latents_of(pipe, image=image)
    given = pipe.vae.encode(torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1, seeded(0))
    torch.testing.assert_close(expected[:, :, 0], given, rtol=1e-4, atol=1e-5)
    Image.fromarray(image).save(tmp_path / "first.png")
    for same in (Image.fromarray(image), tmp_path / "first.png", [image]):
        assert torch.equal(latents_of(pipe, image=same), expected)


def test_image_of_another_size_is_resized_and_said_so(pipe):
    with pytest.warns(InputWarning, match="50 x 200 pixels is resized and cropped"):
        latents_of(pipe, image=picture(50, 200))


def test_continuing_a_clip(pipe):
    clip = np.stack([picture(seed=s) for s in range(6)])
    with pytest.warns(InputWarning, match="last 5"):
        longer = latents_of(pipe, video=clip, max_latent_length=4)
    same = latents_of(pipe, video=[Image.fromarray(f) for f in clip[1:]], max_latent_length=4)
    assert longer.shape[2] == 4 and torch.equal(longer, same)


def test_continuing_a_clip_with_a_vae_that_keeps_the_frame_rate(pipe, monkeypatch, recwarn):
    config = {
        **pipe.vae.module.config.to_dict(),
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    codec = LatentCodec(CausalVideoVAE(VAEConfig.from_dict(config)))
    assert codec.temporal_factor == 1 and pipe.vae.temporal_factor == 4
    monkeypatch.setattr(pipe, "vae", codec)
    clip = np.stack([picture(seed=s) for s in range(4)])
    longer = latents_of(pipe, video=clip, max_latent_length=5)
    assert longer.shape[2] == 5 and not recwarn.list
    given = codec.encode(to_pixels([clip]), seeded(0))
    assert torch.equal(longer[:, :, :4], given)


def test_latents_in_and_out(pipe):
    whole = latents_of(pipe)
    listed = latents_of(pipe, latents=[whole[:, :, 0], whole[:, :, 1]])
    assert torch.equal(listed[:, :, :2], whole[:, :, :2])
    assert torch.equal(listed, latents_of(pipe, latents=whole[:, :, :2]))
    for wrong in (whole[0], torch.zeros(3, 4, 1, 8, 12), [whole], []):
        with pytest.raises(InputError, match="latents"):
            latents_of(pipe, latents=wrong)
    with pytest.raises(InputError, match="give one of"):
        latents_of(pipe, latents=whole, image=picture())


def test_prompt_embeddings_with_and_without_guidance(pipe):
    embeds = pipe.encode_prompt([PROMPT])
    for scale in (1.0, 4.0):
        expected = latents_of(pipe, guidance_scale=scale)
        given = latents_of(pipe, None, prompt_embeds=embeds, guidance_scale=scale)
        assert torch.equal(given, expected)
    padded = torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True)
    assert torch.equal(latents_of(pipe, None, prompt_embeds=padded), latents_of(pipe))
    with pytest.warns(PromptTruncationWarning):
        latents_of(pipe, None, prompt_embeds=torch.zeros(1, 40, 32))
    with pytest.raises(InputError, match="not both"):
        latents_of(pipe, prompt_embeds=embeds)
    with pytest.raises(InputError, match="prompt_embeds must be"):
        latents_of(pipe, None, prompt_embeds=torch.zeros(1, 4, 31))


def test_negative_prompts(pipe):
    plain = latents_of(pipe)
    assert torch.equal(latents_of(pipe, negative_prompt=""), plain)
    negative = latents_of(pipe, negative_prompt="a blue square")
    assert not torch.allclose(negative, plain)
    embeds = pipe.encode_prompt(["a blue square"])
    # Not bit for bit: alone, the prompt went through the text encoder in another batch.
    given = latents_of(pipe, negative_prompt_embeds=embeds)
    torch.testing.assert_close(given, negative, rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="negative_prompt"):
        latents_of(pipe, negative_prompt=["a", "b"])


def test_several_images_a_prompt(pipe):
    together = latents_of(
        pipe, [PROMPT, "a blue square"], num_images_per_prompt=2, generator=seeded(1, 2, 3, 4)
    )
    third = latents_of(pipe, "a blue square", generator=seeded(3))
    torch.testing.assert_close(together[2:3], third, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"min_guidance_scale": 1.5},
        {"guidance_trunc": 600.0},
        {"guidance_renorm": 0.5},
        {"image_guidance_scale": 1.5},
        {"flow_shift": 3.0},
        {"motion_flow": 9.0},
        {"fps": 24.0},
        {"context_frames": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_option_reaches_the_sampler(pipe, options):
    assert not torch.allclose(latents_of(pipe, **options), latents_of(pipe))


def test_motion_one_a_sample(pipe):
    two = latents_of(pipe, [PROMPT] * 2, motion_flow=[1.0, 9.0], generator=seeded(0, 1))
    one = latents_of(pipe, motion_flow=9.0, generator=seeded(1))
    torch.testing.assert_close(two[1:], one, rtol=1e-3, atol=1e-4)


# Outputs, stream, callbacks ------------------------------------------------------------------


def test_output_types(pipe):
    def run(output_type):
        return pipe(PROMPT, generator=seeded(0), output_type=output_type, **FAST).frames

    uint8 = run("uint8")
    assert uint8.dtype == np.uint8
    assert np.array_equal(np.stack([np.asarray(frame) for frame in run("pil")[0]]), uint8[0])
    floats = run("np")
    assert floats.dtype == np.float32 and np.allclose(floats, uint8 / 255)
    tensor = run("pt")
    assert tensor.shape == (1, 9, 3, 64, 96) and 0 <= tensor.min() and tensor.max() <= 1
    assert np.abs(tensor.permute(0, 1, 3, 4, 2).numpy() - floats).max() <= 1 / 255
    assert run("latent").shape == (1, 4, 3, 8, 12)
    with pytest.raises(InputError, match="output_type"):
        run("jpeg")


def test_output_is_indexed_as_diffusers_has_it(pipe):
    output = pipe(PROMPT, generator=seeded(0), output_type="latent", **FAST)
    assert output[0] is output.frames is output["frames"]


@pytest.mark.parametrize("tile_latents, first_frame_alone", [(2, False), (2, True), (5, False)])
@pytest.mark.parametrize("given", [False, True])
def test_stream_equals_the_call(tiny_video_folder, tile_latents, first_frame_alone, given):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_video_folder)
    pipe.vae.module.tile_latents = tile_latents
    pipe.vae.module.first_frame_alone = first_frame_alone
    options = {**FAST, "max_latent_length": 4, "output_type": "pt"}
    if given:
        options["image"] = picture()
    whole = pipe(PROMPT, generator=seeded(0), **options)
    items = list(pipe.stream(PROMPT, generator=seeded(0), **options))
    torch.testing.assert_close(torch.cat([i.frames for i in items], dim=1), whole.frames)
    assert [item.index for item in items] == list(range(int(given), 4))
    assert torch.equal(items[-1].latents, whole.latents[:, :, -1])
    if tile_latents == 2:
        # Every latent frame gives its pixels at once, the first one alone or once two are there.
        first = [1, 4] if first_frame_alone else [0, 5]
        expected = [sum(first), 4, 4] if given else [*first, 4, 4]
        assert [i.frames.shape[1] for i in items] == expected


def test_stream_of_an_image(tiny_image_folder):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_image_folder)
    (item,) = pipe.stream(PROMPT, generator=seeded(0), output_type="pt", **FAST)
    whole = pipe(PROMPT, generator=seeded(0), output_type="pt", **FAST)
    torch.testing.assert_close(item.frames[:, 0], whole.images)


def test_callback_as_diffusers_has_it(pipe):
    calls = []

    def callback(pipeline, step, timestep, tensors):
        assert pipeline is pipe
        calls.append((step, timestep, tensors["latents"].shape))
        return tensors

    latents = latents_of(pipe, callback_on_step_end=callback)
    torch.testing.assert_close(latents, latents_of(pipe), rtol=1e-4, atol=1e-5)
    assert [step for step, _, _ in calls] == list(range(9))
    assert [round(timestep, 3) for _, timestep, _ in calls[:3]] == [0.667, 0.333, 0.0]
    assert {shape for _, _, shape in calls} == {(1, 4, 8, 12)}


def test_callback_may_change_latents_and_stop(pipe):
    changed = latents_of(pipe, callback_on_step_end=lambda *a: {"latents": 2 * a[3]["latents"]})
    assert not torch.allclose(changed, latents_of(pipe))

    def stop(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 4
        return tensors

    stopped = latents_of(pipe, callback_on_step_end=stop)
    assert stopped.shape[2] == 2
    torch.testing.assert_close(stopped[:, :, 0], latents_of(pipe)[:, :, 0], rtol=1e-4, atol=1e-5)
    options = {"generator": seeded(0), "output_type": "pt", **FAST}
    items = list(pipe.stream(PROMPT, callback_on_step_end=stop, **options))
    assert sum(item.frames.shape[1] for item in items) == 5
    with pytest.raises(InputError, match="callback_on_step_end returned"):
        latents_of(pipe, callback_on_step_end=lambda *a: {"latents": torch.zeros(1)})
    with pytest.raises(InputError, match="latents"):
        latents_of(pipe, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_a_stop_between_two_frames_of_a_stream(pipe):
    """The pixels that the decoder holds back come with the last item."""
    options = {"generator": seeded(0), "output_type": "pt", **FAST}
    items = []
    for item in pipe.stream(PROMPT, max_latent_length=5, **options):
        items.append(item)
        if item.index == 1:
            pipe._interrupt = True
    assert [item.index for item in items] == [0, 1, 2]
    assert sum(item.frames.shape[1] for item in items) == 9


def test_who_is_stopped_stops_nobody_else(pipe):
    options = {"output_type": "pt", "max_latent_length": 3, **FAST}
    expected = pipe(PROMPT, generator=seeded(0), **options).frames
    stream = pipe.stream(PROMPT, generator=seeded(0), **options)
    items = [next(stream)]

    def stop(pipeline, step, timestep, tensors):
        pipeline._interrupt = True

    assert pipe(PROMPT, callback_on_step_end=stop, **options).latents.shape[2] == 1
    items += stream
    assert torch.equal(torch.cat([item.frames for item in items], dim=1), expected)
    # A stop that came too late is not for the next call.
    pipe._interrupt = True
    assert pipe(PROMPT, **options).latents.shape[2] == 3


def test_a_stop_before_the_first_step(pipe, monkeypatch):
    """Of a stream that is not read yet, and while the prompt of a call is being encoded."""
    stream = pipe.stream(PROMPT, output_type="pt", max_latent_length=3, **FAST)
    pipe._interrupt = True
    assert [item.index for item in stream] == [0]
    encode = pipe.text_encoder.encode

    def stop_and_encode(prompts):
        pipe._interrupt = True
        return encode(prompts)

    monkeypatch.setattr(pipe.text_encoder, "encode", stop_and_encode)
    assert pipe(PROMPT, max_latent_length=3, **FAST).latents.shape[2] == 1


def test_what_a_callback_gets_is_an_ordinary_tensor(pipe):
    seen = []

    def guide(pipeline, step, timestep, tensors):
        seen.append(tensors["latents"])
        with torch.enable_grad():
            x = tensors["latents"].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(x.square().sum(), x)
        return {"latents": x - 0.25 * gradient}

    def halve(pipeline, step, timestep, tensors):
        assert not torch.is_grad_enabled()
        return {"latents": tensors["latents"].mul_(0.5)}

    guided = latents_of(pipe, callback_on_step_end=guide)
    torch.testing.assert_close(guided, latents_of(pipe, callback_on_step_end=halve))
    assert not guided.requires_grad
    seen[0].mul_(2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_stop_with_latents_of_another_dtype(pipe, dtype):
    def stop(pipeline, step, timestep, tensors):
        pipeline._interrupt = True
        return {"latents": tensors["latents"].to(dtype)}

    assert latents_of(pipe, callback_on_step_end=stop).dtype == torch.float32


@pytest.mark.parametrize("latents", [[1.0], np.zeros((1, 4, 8, 12))], ids=type)
def test_latents_of_a_callback_that_are_no_tensor(pipe, latents):
    with pytest.raises(InputError, match="returned as latents a .*expected a Tensor of shape"):
        latents_of(pipe, callback_on_step_end=lambda *_: {"latents": latents})


def test_items_of_a_stream_may_be_edited(pipe):
    options = {"output_type": "latent", "max_latent_length": 3, **FAST}
    expected = pipe(PROMPT, generator=seeded(0), **options).latents
    for item in pipe.stream(PROMPT, generator=seeded(0), **options):
        assert torch.equal(item.latents, expected[:, :, item.index])
        item.latents.mul_(0.5)


def test_given_latents_may_be_edited_while_they_are_gone_on_from(pipe):
    prompts, given = [PROMPT, "a dog"], latents_of(pipe)[:, :, :2].repeat(2, 1, 1, 1, 1)
    options = {"output_type": "latent", "max_latent_length": 3, "max_batch_size": 1, **FAST}
    expected = pipe(prompts, latents=given, generator=seeded(0, 1), **options).latents
    edited = given.clone()
    stream = pipe.stream(prompts, latents=edited, generator=seeded(0, 1), **options)
    edited.zero_()
    assert torch.equal(torch.cat([item.latents for item in stream]), expected[:, :, 2])
    edited.copy_(given)

    def edit(*_):
        edited.zero_()

    options["callback_on_step_end"] = edit
    called = pipe(prompts, latents=edited, generator=seeded(0, 1), **options).latents
    assert torch.equal(called, expected)


def test_given_latents_with_gradients(pipe):
    given = torch.zeros(1, 4, 1, 8, 12, requires_grad=True)
    assert not latents_of(pipe, latents=given).requires_grad


def test_progress_bars(pipe, capsys):
    latents_of(pipe, disable_progress_bar=False)
    shown = capsys.readouterr().err
    assert "frames" in shown and "sets" in shown
    latents_of(pipe, disable_progress_bar=True)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=True)
    latents_of(pipe, disable_progress_bar=False)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(desc="working on it", unit="piece", total=99)
    latents_of(pipe, disable_progress_bar=False)
    shown = capsys.readouterr().err
    assert "working on it" in shown and "piece" in shown and "99" not in shown
    pipe.set_progress_bar_config(disable=False)
    latents_of(pipe, disable_progress_bar=True)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config()


# Devices -------------------------------------------------------------------------------------


def test_dtype_and_device_moves(tiny_video_folder):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_video_folder)
    assert pipe.to("cpu", torch.bfloat16) is pipe
    assert pipe.dtype == pipe.vae.module.dtype == torch.bfloat16
    frames = pipe(PROMPT, output_type="uint8", **FAST).frames
    assert frames.shape == (1, 9, 64, 96, 3)
    pipe.to(torch.float32, text_encoder=False)
    assert pipe.dtype == torch.float32 and pipe.text_encoder.dtype == torch.bfloat16


class WithoutFloat64(TorchDispatchMode):
    """No operation gives float64, as on MPS; the message is torch's there."""

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        if any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tree_leaves(result)):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return result


def test_devices_without_float64(tiny_video_folder, monkeypatch):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_video_folder)
    pipe.vae.module.memory_budget = 0
    options = {"image": picture(), "output_type": "pt", "guidance_renorm": 0.5}
    expected = pipe(PROMPT, generator=seeded(0), **options, **FAST).frames
    monkeypatch.setattr(framewise, "_has_float64", lambda device: False)
    with WithoutFloat64():
        frames = pipe(PROMPT, generator=seeded(0), **options, **FAST).frames
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)


def test_offload_gives_the_same(tiny_video_folder, pipe):
    """On the CPU the parts do not move, but all of the offloading's path runs."""
    other = nova.NOVAPipeline.from_pretrained(tiny_video_folder)
    other.enable_model_cpu_offload("cpu")
    assert torch.equal(latents_of(other, image=picture()), latents_of(pipe, image=picture()))


def test_runs_inside_of_runs_leave_parts_where_they_are(tiny_video_folder, monkeypatch):
    """By moves alone, since there is no second device: who needs a part last moves it away."""
    pipe = nova.NOVAPipeline.from_pretrained(tiny_video_folder)
    pipe.enable_model_cpu_offload("cpu")
    away, to_work = "cpu", torch.device("cpu")
    moves = []
    monkeypatch.setattr(pipe.transformer, "to", moves.append)
    options = {"output_type": "latent", "max_latent_length": 2, **FAST}

    def call_again(pipeline, step, timestep, tensors):
        assert moves[-1] == to_work
        if step == 0:
            pipe(PROMPT, **options)
        assert moves[-1] == to_work

    pipe(PROMPT, callback_on_step_end=call_again, **options)
    assert moves[-1] == away
    first, second = (pipe.stream(PROMPT, **options) for _ in range(2))
    next(first)
    assert len(list(second)) == 2 and moves[-1] == to_work
    assert len(list(first)) == 1 and moves[-1] == away


def test_offloading_begins_by_initializing_cuda(tiny_video_folder, monkeypatch):
    """A call resets torch's count of a GPU's memory, which there is from then on."""
    other, begun = nova.NOVAPipeline.from_pretrained(tiny_video_folder), []
    monkeypatch.setattr("nova.pipeline.check_device", torch.device)
    monkeypatch.setattr("torch.cuda.init", lambda: begun.append("cuda"))
    other.enable_model_cpu_offload("cuda:0")
    assert begun == ["cuda"]


@pytest.mark.parametrize(
    "drop",
    [
        lambda pipe: pipe.disable_cuda_graphs(),
        lambda pipe: pipe.enable_model_cpu_offload("cpu"),
        lambda pipe: pipe.to("cpu"),
    ],
    ids=["disable", "offload", "to"],
)
def test_graphs_are_freed_at_once(tiny_video_folder, drop):
    other, recordings = nova.NOVAPipeline.from_pretrained(tiny_video_folder), []

    class Recorded(Repeated):
        def __init__(self, work):
            super().__init__(work)
            del self._work  # which refers back; a graph does not
            recordings.append(weakref.ref(self))

        def replay(self):
            pass

    other.graphs = SamplingGraphs(Recorded)
    latents_of(other)
    assert len(recordings) == len(other.graphs) > 0
    gc.disable()  # it would come, but at its own time
    try:
        drop(other)
        assert all(recording() is None for recording in recordings)
    finally:
        gc.enable()


def test_cuda_graphs_need_a_gpu(pipe):
    with pytest.raises(nova.DeviceError, match="need a GPU, and this pipeline is on cpu"):
        pipe.enable_cuda_graphs()


@pytest.mark.gpu
def test_cuda_graphs_give_the_same_clips(tiny_video_folder):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_video_folder).to("cuda")
    expected = latents_of(pipe, image=picture())
    pipe.enable_cuda_graphs()
    for _ in range(2):
        assert torch.equal(latents_of(pipe, image=picture()), expected)
    assert pipe.graphs.failure is None and len(pipe.graphs) > 0
    assert pipe.to("cpu").graphs is None


def test_offloading_ends_graphs(tiny_video_folder):
    """Nothing would be recorded, and nova.tune would time replays that never come."""
    other = nova.NOVAPipeline.from_pretrained(tiny_video_folder)
    other.graphs = SamplingGraphs(Repeated)
    other.enable_model_cpu_offload("cpu")
    assert other.graphs is None


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True])
def test_on_a_gpu(tiny_video_folder, pipe, offload):
    other = nova.NOVAPipeline.from_pretrained(tiny_video_folder)
    if offload:
        other.enable_model_cpu_offload()
    else:
        other.to("cuda")
    on_gpu = latents_of(other, image=picture())
    torch.testing.assert_close(
        on_gpu.cpu(), latents_of(pipe, image=picture()), rtol=1e-2, atol=1e-2
    )
    assert other.transformer.device.type == ("cpu" if offload else "cuda")
