"""What a checkpoint recommends: read, written, used where a call leaves it open."""

import json
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from test_cli import run

from nova.errors import CheckpointError, ConfigError
from nova.generation_config import FILE_NAME, GenerationConfig
from nova.pipeline import NOVAPipeline
from nova.request import Request

PROMPT = "a red square moves to the left"


def latents(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    options = {"max_latent_length": 2, "disable_progress_bar": True, **options}
    return pipe(PROMPT, generator=generator, output_type="latent", **options).latents


def test_without_a_file_the_references_defaults(tiny_video_folder):
    assert GenerationConfig.read(tiny_video_folder) == GenerationConfig()
    request = GenerationConfig().request(PROMPT)
    assert request == Request(PROMPT)
    assert (request.num_inference_steps, request.num_diffusion_steps) == (64, 25)
    assert (request.guidance_scale, request.motion_flow) == (5.0, 5.0)


def test_what_is_given_goes_before_what_is_recommended():
    config = GenerationConfig(num_inference_steps=3, motion_flow=2.0)
    request = config.request(PROMPT, num_inference_steps=None, motion_flow=1.0)
    assert (request.num_inference_steps, request.motion_flow) == (3, 1.0)


def test_numbers_of_numpy_become_those_of_files(tmp_path):
    config = GenerationConfig(num_inference_steps=np.int64(3), guidance_scale=np.float32(2.5))
    config.write(tmp_path)
    assert GenerationConfig.read(tmp_path) == GenerationConfig(3, guidance_scale=2.5)


def test_a_pipeline_uses_and_saves_it(tiny_video_folder, tmp_path):
    pipe = NOVAPipeline.from_pretrained(tiny_video_folder)
    settings = {
        "num_inference_steps": 3,
        "num_diffusion_steps": 2,
        "guidance_scale": 2.0,
        "motion_flow": 1.5,
    }
    expected = latents(pipe, **settings)
    pipe.generation_config = GenerationConfig(**settings)
    pipe.save_pretrained(tmp_path)
    saved = NOVAPipeline.from_pretrained(tmp_path)
    assert saved.generation_config == pipe.generation_config
    assert torch.equal(latents(saved), expected)
    assert not torch.equal(latents(saved, guidance_scale=1.0), expected)
    pieces = saved.stream(
        PROMPT,
        max_latent_length=2,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        disable_progress_bar=True,
    )
    assert torch.equal(torch.stack([piece.latents for piece in pieces], dim=2), expected)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"temperature": 1}, "unknown keys .'temperature'."),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number"),
        ({"guidance_scale": "high"}, "guidance_scale"),
        ({"motion_flow": None}, "motion_flow"),
    ],
)
def test_wrong_files_are_refused(tmp_path, content, problem):
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=problem):
        GenerationConfig.read(tmp_path)


def test_export_writes_half_precision_and_recommendations(tiny_video_folder, tmp_path):
    out = tmp_path / "exported"
    command = ("export", tiny_video_folder, "--out", out)
    result = run(*command, "--steps", 2, "--diffusion-steps", 3, "--motion", 1.5)
    assert result.exit_code == 0, result.stderr
    assert "MB" in result.stdout
    pipe = NOVAPipeline.from_pretrained(out)
    assert pipe.generation_config == GenerationConfig(2, 3, motion_flow=1.5)
    original = NOVAPipeline.from_pretrained(tiny_video_folder)
    for name, weight in original.transformer.state_dict().items():
        half = pipe.transformer.state_dict()[name]
        assert torch.equal(half, weight.half().float()), name
    assert latents(pipe).isfinite().all()
    assert run(*command).exit_code == 2  # the folder is there already


def test_a_failed_export_leaves_no_folder(tiny_video_folder, tmp_path, monkeypatch):
    out = tmp_path / "exported"
    full = CheckpointError("cannot write: No space left on device")
    with monkeypatch.context() as patch:  # the last file that is written
        patch.setattr(GenerationConfig, "write", Mock(side_effect=full))
        result = run("export", tiny_video_folder, "--out", out)
    assert result.exit_code == 1 and "No space left" in result.stderr
    assert not out.exists()
    assert run("export", tiny_video_folder, "--out", out).exit_code == 0
