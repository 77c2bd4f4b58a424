"""Blocks compiled by torch.compile: the same samples, from few variants of the code."""

import pytest
import torch
from reference_stand_in import StandInPipeline
from small_models import SMALL, SMALL_ROTARY, sample, small_model
from torch._dynamo.utils import counters
from typer.testing import CliRunner

import nova
from nova.cli.app import app
from nova.errors import InputError
from nova.guidance import Guidance
from nova.model import NOVATransformer
from nova.plain_sampling import generate_frames_plain
from nova.sampling import generate_frames

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize("config", [SMALL, SMALL_ROTARY], ids=["absolute", "rotary"])
@pytest.mark.parametrize("sampler", [generate_frames_plain, generate_frames])
def test_samples_are_the_same_with_a_few_variants_of_the_code(sampler, config):
    model = small_model(config)
    options = {"guidance": Guidance(scale=3.0), "steps": 12, "num_frames": 2}
    expected = sample(model, sampler, **options)
    assert not model.has_compiled_blocks
    model.compile_blocks(backend="eager")  # traces and guards as any other, and compiles nothing
    assert model.has_compiled_blocks
    torch.testing.assert_close(sample(model, sampler, **options), expected, atol=1e-4, rtol=1e-4)
    # Not one for each set, of which there are twelve: blocks with and without queries, lengths
    # that are 1 and those that are not.
    assert 1 <= counters["stats"]["unique_graphs"] <= 6
    assert counters["frames"]["total"] == counters["frames"]["ok"]


def test_options_and_what_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compiled.append((self, options))
    )
    model = small_model()
    model.compile_blocks(dynamic=False, mode="max-autotune-no-cudagraphs")
    expected = [*model.image_encoder.blocks, *model.image_decoder.blocks]
    assert [block for block, _ in compiled] == expected
    options = {"dynamic": False, "mode": "max-autotune-no-cudagraphs"}
    assert all(given == options for _, given in compiled)


def test_reports_tell(tiny_video_folder):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_video_folder)
    assert "compile" not in str(nova.report(pipe))
    pipe.transformer.compile_blocks()
    assert "blocks: compiled by torch.compile" in str(nova.report(pipe))
    theirs = StandInPipeline()
    nova.accelerate(theirs, compile_blocks=True)
    assert nova.report(theirs).compiled
    nova.accelerate(theirs)
    assert not nova.report(theirs).compiled


def test_options_of_the_command_line(tiny_video_folder, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(NOVATransformer, "compile_blocks", lambda self: compiled.append(self))
    command = ["generate", "a cat", "--model", str(tiny_video_folder), "--latents", "1"]
    command += ["--steps", "2", "--diffusion-steps", "2", "--device", "cpu"]
    out = tmp_path / "cat.png"
    result = CliRunner().invoke(app, [*command, "--out", str(out), "--compile"])
    assert result.exit_code == 0 and len(compiled) == 1 and out.exists(), result.output
    result = CliRunner().invoke(app, [*command, "--out", str(out), "--cuda-graphs"])
    assert result.exit_code != 0 and "--cuda-graphs needs a GPU" in " ".join(result.output.split())
    result = CliRunner().invoke(app, [*command, "--out", str(out), "--cuda-graphs", "--offload"])
    assert result.exit_code != 0 and "cannot be used" in " ".join(result.output.split())


def test_tuning_comes_first(tiny_video_folder):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_video_folder)
    pipe.transformer.compile_blocks(backend="eager")
    with pytest.raises(InputError, match="tune first"):
        nova.tune(pipe)
