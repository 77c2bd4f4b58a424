"""Parts that users wrapped by torch.compile(module) are sampled with, and saved, as without."""

import pytest
import torch
from reference_stand_in import StandInPipeline
from small_models import SMALL, small_prompts
from torch._dynamo.utils import counters

import nova
from nova.data.encoding import fingerprint
from nova.vae.layers import Downsample, ResBlock, Upsample

pytestmark = pytest.mark.usefixtures("fresh_compiler")

needs_is_exporting = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"),
    reason="transformers 5 asks torch 2.6 for what it lacks, when compiled",
)
PARTS = [
    "transformer",
    "transformer.image_encoder",
    "transformer.image_encoder.blocks.0",
    "transformer.image_decoder",
    "transformer.image_decoder.blocks.0",
    "vae.module",
    "vae.module.decoder",
    pytest.param("text_encoder.module", marks=needs_is_exporting),
    "text_encoder.module.layers.0",
]
FAST = {"num_inference_steps": 3, "num_diffusion_steps": 2, "max_latent_length": 2}


def compiled(module):
    return torch.compile(module, backend="eager")


def compile_part(owner, path):
    """Replace owner.path by its compiled self."""
    *names, last = path.split(".")
    for name in names:
        owner = getattr(owner, name)
    setattr(owner, last, compiled(getattr(owner, last)))


def clip(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", generator=generator, output_type="pt", **FAST).frames


@pytest.fixture(scope="module")
def plain(tiny_video_folder):
    return nova.NOVAPipeline.from_pretrained(tiny_video_folder)


@pytest.mark.parametrize("part", PARTS)
def test_the_same_clip_and_the_same_folder(part, plain, tiny_video_folder, tmp_path):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_video_folder)
    compile_part(pipe, part)
    torch.testing.assert_close(clip(pipe), clip(plain), rtol=1e-4, atol=1e-4)
    pipe.save_pretrained(tmp_path / "compiled")
    plain.save_pretrained(tmp_path / "plain")
    written, expected = (contents(tmp_path / name) for name in ("compiled", "plain"))
    assert written == expected


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_the_vae_frame_by_frame(plain, tiny_video_folder):
    """There the layers' weights are used past the layers."""
    latents = torch.randn(1, 4, 4, 4, 6)
    pixels = plain.vae.decode(latents)
    mean = plain.vae.encode(pixels, sample=False)
    codec = nova.NOVAPipeline.from_pretrained(tiny_video_folder).vae
    codec.module.memory_budget = 0
    kinds = Downsample | ResBlock | Upsample
    names = [name for name, layer in codec.module.named_modules() if isinstance(layer, kinds)]
    for name in names:
        compile_part(codec, f"module.{name}")
    torch.testing.assert_close(codec.decode(latents), pixels, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(codec.encode(pixels, sample=False), mean, rtol=1e-4, atol=1e-4)


def test_image_vaes(tiny_image_folder, tmp_path):
    codec = nova.NOVAPipeline.from_pretrained(tiny_image_folder).vae
    latents = torch.randn(1, codec.latent_channels, 4, 4)
    expected = codec.decode(latents)
    codec.module = compiled(codec.module)
    torch.testing.assert_close(codec.decode(latents), expected)
    codec.save(tmp_path)
    assert torch.equal(nova.LatentCodec.load(tmp_path).decode(latents), expected)


def test_encoded_folders_know_the_vae_again(tiny_video_folder):
    module = nova.NOVAPipeline.from_pretrained(tiny_video_folder).vae.module
    assert fingerprint(compiled(module)) == fingerprint(module)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_reference_accelerated(in_place, order):
    prompts = small_prompts(SMALL, 1)
    expected = StandInPipeline()(prompts, **FAST).frames
    pipe = StandInPipeline()
    if order == "after":
        nova.accelerate(pipe)
    if in_place:
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer = compiled(pipe.transformer)
    if order == "before":
        nova.accelerate(pipe)
    parameters = list(pipe.transformer.parameters())
    torch.testing.assert_close(pipe(prompts, **FAST).frames, expected, rtol=1e-4, atol=1e-4)
    assert nova.report(pipe).accelerated and pipe.transformer.calls == 0
    # What is around the loops is all that torch traced.
    assert counters["stats"]["unique_graphs"] <= 4
    assert all(a is b for a, b in zip(pipe.transformer.parameters(), parameters, strict=True))
    nova.restore(pipe)
    assert not nova.report(pipe).accelerated
