"""The command `nova`: what it writes, that its options reach the pipeline, and its exit codes."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import nova_kernels
from nova import pipeline as pipeline_module
from nova.cli import doctor
from nova.cli.app import app
from nova.cli.generate import Backend
from nova.cli.samples import Sample, read_conditions
from nova.devices import PeakMemory
from nova.errors import InputError, MediaError
from nova.media import check_writable, read_image, read_video, write_image, write_video
from nova.pipeline import NOVAPipeline
from nova_kernels import onednn
from nova_kernels.dispatch import BACKENDS

ROOT = Path(__file__).parents[1]
FAST = ["--steps", "2", "--diffusion-steps", "2", "--device", "cpu", "--quiet"]
FAST_CALL = {
    "num_inference_steps": 2,
    "num_diffusion_steps": 2,
    "output_type": "latent",
    "disable_progress_bar": True,
}
PROMPT = "a red square moves to the left"


def run(*arguments):
    # Without colours, which some CI services force, texts can be compared.
    result = CliRunner(env={"NO_COLOR": "1"}).invoke(app, [str(text) for text in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def generate(*arguments):
    """Run `nova generate` with few steps; returns what it printed."""
    result = run("generate", *arguments, *FAST)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def latents_of(*arguments, folder, name="latents"):
    """The latents (samples, channels, frames, h, w) that a run saves."""
    path = folder / f"{name}.safetensors"
    generate(*arguments, "--out", folder / f"{name}.png", "--save-latents", path)
    return load_file(path)["latents"]


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def gradient(height, width, frames=None):
    """A smooth picture, or a clip of it that gets brighter."""
    rows, columns = np.mgrid[0:height, 0:width]
    picture = np.stack([rows * 2, columns * 2, (rows + columns)], axis=-1).astype(np.uint8)
    if frames is None:
        return picture
    return np.stack([picture // 2 + 8 * k for k in range(frames)]).astype(np.uint8)


@pytest.fixture(scope="module")
def video_pipeline(tiny_video_folder):
    return NOVAPipeline.from_pretrained(tiny_video_folder)


# Files that are written -----------------------------------------------------------------------


def test_mp4_with_contact_sheet(tiny_video_folder, tmp_path):
    out = tmp_path / "new" / "x.mp4"
    printed = generate(
        PROMPT, "--model", tiny_video_folder, "--out", out, "--latents", 2, "--fps", 6, "--seed", 7
    )
    frames, fps = read_video(out)
    assert frames.shape == (5, 64, 96, 3)
    assert fps == 6
    assert read_image(tmp_path / "new" / "x_sheet.png").shape[1] > 96
    assert "seed 7" in printed
    assert f"{out}: 5 frames of 64 x 96 pixels, 0.83 s at 6 fps" in printed
    assert sorted(path.name for path in out.parent.iterdir()) == ["x.mp4", "x_sheet.png"]


def test_gif_without_contact_sheet(tiny_video_folder, tmp_path):
    out = tmp_path / "x.gif"
    generate(PROMPT, "--model", tiny_video_folder, "--out", out, "--latents", 2, "--no-sheet")
    assert len(read_video(out)[0]) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["x.gif"]


def test_png_of_a_video_model_is_a_contact_sheet_or_one_frame(tiny_video_folder, tmp_path):
    several, single = tmp_path / "several.png", tmp_path / "single.png"
    printed = generate(
        PROMPT, "--model", tiny_video_folder, "--out", several, "--latents", 2, "--seed", 1
    )
    assert "contact sheet of 5 frames" in printed
    assert read_image(several).shape[1] > 2 * 96
    generate(PROMPT, "--model", tiny_video_folder, "--out", single, "--latents", 1)
    assert read_image(single).shape == (64, 96, 3)


def test_several_videos_on_one_sheet(tiny_video_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\na blue ball\n")
    common = ["--batch-file", tmp_path / "prompts.txt", "--model", tiny_video_folder]
    printed = generate(*common, "--latents", 1, "--batch-size", 2, "--out", tmp_path / "x.gif")
    assert f"{tmp_path / 'x_sheet.png'}: 2 samples" in printed
    single = read_image(tmp_path / "x_000_sheet.png")
    assert read_image(tmp_path / "x_sheet.png").shape[0] > 1.5 * single.shape[0]


def test_image_and_class_models(tiny_image_folder, tiny_class_folder, tmp_path):
    generate(PROMPT, "--model", tiny_image_folder, "--out", tmp_path / "i.png")
    generate("--class-id", 7, "--model", tiny_class_folder, "--out", tmp_path / "c.jpg")
    assert read_image(tmp_path / "i.png").shape == (64, 64, 3)
    assert read_image(tmp_path / "c.jpg").shape == (64, 64, 3)


def test_the_length_defaults_to_the_models(tiny_video_folder, tmp_path):
    latents = latents_of(PROMPT, "--model", tiny_video_folder, folder=tmp_path)
    assert latents.shape == (1, 4, 3, 8, 12)


# Seeds and batches ----------------------------------------------------------------------------


def test_a_seed_repeats_a_result(tiny_video_folder, tmp_path):
    common = [PROMPT, "--model", tiny_video_folder, "--latents", 2]
    first = latents_of(*common, "--seed", 5, folder=tmp_path)
    assert torch.equal(latents_of(*common, "--seed", 5, folder=tmp_path), first)
    assert not torch.allclose(latents_of(*common, "--seed", 6, folder=tmp_path), first, atol=0.1)


def test_a_random_seed_is_printed(tiny_video_folder, tmp_path):
    common = [PROMPT, "--model", tiny_video_folder, "--latents", 1]
    out, path = tmp_path / "x.png", tmp_path / "x.safetensors"
    printed = [generate(*common, "--out", out, "--save-latents", path) for _ in range(2)]
    seeds = [re.match(r"seed (\d+),", text)[1] for text in printed]
    assert seeds[0] != seeds[1]
    latents = load_file(path)["latents"]
    assert torch.equal(latents_of(*common, "--seed", seeds[1], folder=tmp_path), latents)


def test_batch_file_equals_single_runs(tiny_video_folder, tmp_path):
    prompts = ["a red square moves up", "a blue ball", "a green star falls"]
    text = f"# three shapes\n\n{prompts[0]}\n  {prompts[1]}  \n\n{prompts[2]}\n"
    (tmp_path / "prompts.txt").write_text(text)
    common = ["--model", tiny_video_folder, "--latents", 2]
    singles = [
        latents_of(prompt, "--seed", 10 + i, *common, folder=tmp_path, name="single")
        for i, prompt in enumerate(prompts)
    ]
    (tmp_path / "single.png").unlink()
    for batch_size in (1, 2):
        batch = latents_of(
            *("--batch-file", tmp_path / "prompts.txt", "--batch-size", batch_size),
            *("--seed", 10, *common),
            folder=tmp_path,
            name="x",
        )
        torch.testing.assert_close(batch, torch.cat(singles), rtol=1e-4, atol=1e-4)
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["x_000.png", "x_001.png", "x_002.png"]


def test_what_a_sheet_says_of_its_clip():
    embeds = torch.zeros(2, 3)
    captions = [Sample(each, 0, Path("x.mp4")).caption for each in ("a ball", 7, embeds)]
    assert captions == ["a ball", "class 7", None]


def test_a_prompt_is_a_line(tmp_path):
    """str.splitlines() would make three of it."""
    (tmp_path / "prompts.txt").write_bytes("a ball\x0c moves\u2028up\r\n".encode())
    assert read_conditions(None, None, None, tmp_path / "prompts.txt") == [
        "a ball\x0c moves\u2028up"
    ]


def test_files_of_all_samples_are_checked_before(tiny_video_folder, tmp_path):
    """A number makes a name too long; names of a clip, its sheet, the sheet of all are folders'."""
    common = ("generate", PROMPT, "--model", tiny_video_folder, "--num", 2, *FAST)
    for folder in ("x_001_sheet.png", "y_sheet.png", "z_001.mp4"):
        (tmp_path / folder).mkdir()
    for name, more in (("a" * 248, ()), ("x", ("--sheet",)), ("y", ("--sheet",)), ("z", ())):
        result = run(*common, "--out", tmp_path / f"{name}.mp4", *more)
        assert result.exit_code == 1 and "seed" not in result.stdout, result.output
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_a_video_is_named_although_its_sheet_fails(tiny_video_folder, tmp_path, monkeypatch):
    def fail(path, _):
        raise MediaError(f"{path} cannot be written")

    monkeypatch.setattr("nova.cli.outputs.write_image", fail)
    result = run("generate", PROMPT, "--model", tiny_video_folder, "--sheet", *FAST,
                 "--out", tmp_path / "x.mp4")  # fmt: skip
    assert result.exit_code == 1 and "x_sheet.png cannot be written" in result.output
    assert f"{tmp_path / 'x.mp4'}: " in result.stdout


@pytest.mark.parametrize("name", ["a" * 300, "~nosuchuser/x"])
def test_an_output_that_is_no_path(name):
    with pytest.raises(MediaError, match="is no path"):
        check_writable(f"{name}.mp4")


def test_latents_of_finished_batches_are_kept(tiny_video_folder, tmp_path, monkeypatch):
    common = (PROMPT, "--model", tiny_video_folder, "--latents", 1, "--num", 3, "--seed", 1)
    expected = latents_of(*common, folder=tmp_path)
    original, calls = pipeline_module.NOVAPipeline.__call__, []

    def call(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(pipeline_module.NOVAPipeline, "__call__", call)
    path = tmp_path / "kept.SAFETENSORS"
    result = run(
        *("generate", *common, "--batch-size", 1, *FAST),
        *("--out", tmp_path / "kept.png", "--save-latents", path),
    )
    written = tmp_path / "kept.safetensors"
    assert result.exit_code == 130 and f"{written}: latents" in result.stdout
    assert torch.equal(load_file(written)["latents"], expected[:2])


def test_num_makes_several_samples_of_a_prompt(tiny_image_folder, tmp_path):
    common = [PROMPT, "--model", tiny_image_folder]
    both = latents_of(
        *common, "--num", 2, "--batch-size", 2, "--seed", 3, folder=tmp_path, name="x"
    )
    assert {p.name for p in tmp_path.glob("*.png")} == {"x_000.png", "x_001.png"}
    second = latents_of(*common, "--seed", 4, folder=tmp_path)
    torch.testing.assert_close(both[1:], second, rtol=1e-4, atol=1e-4)


# Options reach the pipeline -------------------------------------------------------------------


def test_image_to_video_equals_the_pipeline(video_pipeline, tiny_video_folder, tmp_path):
    write_image(tmp_path / "start.png", gradient(64, 96))
    latents = latents_of(
        *(PROMPT, "--model", tiny_video_folder, "--image", tmp_path / "start.png"),
        *("--latents", 2, "--seed", 4),
        folder=tmp_path,
    )
    expected = video_pipeline(
        PROMPT,
        image=gradient(64, 96),
        max_latent_length=2,
        generator=seeded(4),
        **FAST_CALL,
    ).latents
    torch.testing.assert_close(latents, expected)
    other = latents_of(
        PROMPT, "--model", tiny_video_folder, "--latents", 2, "--seed", 4, folder=tmp_path
    )
    assert not torch.allclose(latents, other, atol=0.1)


def test_video_continuation_equals_the_pipeline(video_pipeline, tiny_video_folder, tmp_path):
    clip = tmp_path / "start.mp4"
    write_video(clip, gradient(64, 96, frames=5), 12)
    latents = latents_of(
        *(PROMPT, "--model", tiny_video_folder, "--video", clip, "--latents", 3, "--seed", 4),
        folder=tmp_path,
    )
    expected = video_pipeline(
        PROMPT, video=clip, max_latent_length=3, generator=seeded(4), **FAST_CALL
    ).latents
    assert latents.shape == (1, 4, 3, 8, 12)
    torch.testing.assert_close(latents, expected)


def test_prompt_embeds_stand_in_for_the_text_encoder(video_pipeline, tiny_video_folder, tmp_path):
    path = tmp_path / "embeds.safetensors"
    save_file({"prompt_embeds": video_pipeline.encode_prompt([PROMPT])[0]}, path)
    common = ["--model", tiny_video_folder, "--latents", 1, "--seed", 2]
    from_embeds = latents_of("--prompt-embeds", path, *common, folder=tmp_path)
    from_prompt = latents_of(PROMPT, *common, folder=tmp_path)
    torch.testing.assert_close(from_embeds, from_prompt)
    save_file({"prompt_embeds": torch.zeros(0, 3, 32)}, path)
    with pytest.raises(InputError, match="holds no prompt"):
        read_conditions(None, None, path, None)


@pytest.mark.parametrize(
    "options", [["--offload"], ["--text-encoder-device", "cpu"]], ids=["offload", "text encoder"]
)
def test_where_parts_are_does_not_change_the_result(tiny_video_folder, tmp_path, options):
    common = [PROMPT, "--model", tiny_video_folder, "--latents", 1, "--seed", 2]
    plain = latents_of(*common, folder=tmp_path)
    torch.testing.assert_close(latents_of(*common, *options, folder=tmp_path), plain)


def test_dtype(tiny_image_folder, tmp_path):
    common = [PROMPT, "--model", tiny_image_folder]
    assert latents_of(*common, folder=tmp_path).dtype == torch.float32
    half = latents_of(*common, "--dtype", "bfloat16", folder=tmp_path)
    assert half.dtype == torch.bfloat16


def test_every_option_reaches_the_pipeline(tiny_video_folder, tmp_path, monkeypatch):
    calls, tilings = [], []
    original = NOVAPipeline.__call__

    def record(self, **options):
        calls.append(options)
        tilings.append(self.vae.module.tiling)
        return original(self, **options)

    monkeypatch.setattr(NOVAPipeline, "__call__", record)
    options = {
        "--latents": ("max_latent_length", 2),
        "--guidance": ("guidance_scale", 4.0),
        "--min-guidance": ("min_guidance_scale", 2.0),
        "--guidance-trunc": ("guidance_trunc", 100.0),
        "--guidance-renorm": ("guidance_renorm", 0.5),
        "--image-guidance": ("image_guidance_scale", 1.5),
        "--flow-shift": ("flow_shift", 3.0),
        "--motion": ("motion_flow", 9.0),
        "--fps": ("fps", 8.0),
        "--negative": ("negative_prompt", "a blue ball"),
        "--context-frames": ("context_frames", 2),
    }
    flags = [text for flag, (_, value) in options.items() for text in (flag, value)]
    generate(
        PROMPT, "--model", tiny_video_folder, "--out", tmp_path / "x.gif", *flags, "--vae-tiling"
    )
    expected = {name: value for name, value in options.values()}
    expected |= {"prompt": [PROMPT], "num_inference_steps": 2, "num_diffusion_steps": 2}
    assert {name: calls[0][name] for name in expected} == expected
    assert tilings[0] is not None


def test_batches_get_smaller_where_memory_is_short(tiny_image_folder, tmp_path, monkeypatch):
    common = (PROMPT, "--model", tiny_image_folder, "--num", 7, "--seed", 3)
    expected = latents_of(*common, "--batch-size", 2, folder=tmp_path)
    sizes = []
    original = pipeline_module.generate_frames

    def generate_frames(model, conditioning, **options):
        sizes.append(conditioning.batch_size)
        if conditioning.batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(model, conditioning, **options)

    monkeypatch.setattr(pipeline_module, "generate_frames", generate_frames)
    path = tmp_path / "small.safetensors"
    result = run(
        *("generate", *common, "--batch-size", 4, *FAST),
        *("--out", tmp_path / "small.png", "--save-latents", path),
    )
    assert result.exit_code == 0 and torch.equal(load_file(path)["latents"], expected)
    # 4 fail and go on as 2 and 2; the batches behind have 2 from the start.
    assert sizes == [4, 2, 2, 2, 1]
    assert result.stderr == (
        "note: out of memory while sampling 4 samples at a time; 2 at a time fit. Give "
        "max_batch_size=2 (nova generate: --batch-size 2) to start so.\n"
    )


def test_peak_memory_is_printed_on_gpus(tiny_image_folder, tmp_path, monkeypatch):
    common = (PROMPT, "--model", tiny_image_folder, "--num", 2, "--out", tmp_path / "x.png")
    assert "GPU memory" not in generate(*common)
    peaks = [3 * 2**30, 2 * 2**30]
    monkeypatch.setattr(PeakMemory, "read", lambda self: peaks.pop(0))
    assert "at most 3.0 GiB of GPU memory\n" in generate(*common)


def test_progress_bar_unless_quiet(tiny_video_folder, tmp_path):
    common = ["generate", PROMPT, "--model", tiny_video_folder, "--out", tmp_path / "x.png"]
    loud = run(*common, *[option for option in FAST if option != "--quiet"])
    quiet = run(*common, *FAST)
    assert "frames: 100%" in loud.stderr
    assert quiet.stderr == ""


def test_notes_replace_warnings(tiny_video_folder, tmp_path):
    write_image(tmp_path / "start.png", gradient(50, 50))
    result = run(
        *("generate", "a red square " * 9, "--model", tiny_video_folder, *FAST),
        *("--out", tmp_path / "x.png", "--image", tmp_path / "start.png", "--latents", 2),
    )
    notes = result.stderr.splitlines()
    assert result.exit_code == 0
    assert len(notes) == 2 and all(note.startswith("note: ") for note in notes)
    assert "prompts may have 16 tokens" in result.stderr
    assert "50 x 50 pixels is resized and cropped" in result.stderr
    assert ".py" not in result.stderr


# Exit codes and streams -----------------------------------------------------------------------


def test_errors_are_one_line_and_debug_shows_the_traceback(tmp_path):
    plain = run("info", tmp_path / "nothing")
    assert plain.exit_code == 1
    assert re.fullmatch(r"error: .*nothing is not a folder.*\n", plain.stderr)
    command = [sys.executable, "-m", "nova", "info", str(tmp_path / "nothing"), "--debug"]
    debug = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr and "CheckpointError" in debug.stderr


def test_debug_through_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("NOVA_DEBUG", "1")
    result = CliRunner().invoke(app, ["info", str(tmp_path / "nothing")])
    assert type(result.exception).__name__ == "CheckpointError"


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: 1 / 0)
    result = CliRunner().invoke(app, ["doctor"])
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_output_to_a_full_disk_is_no_bug(monkeypatch):
    def to_a_full_disk(report):
        with open("/dev/full", "w") as file:
            print(report, file=file)

    monkeypatch.setattr(doctor, "print_report", to_a_full_disk)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert result.stderr.endswith("No space left on device; make room, or write elsewhere\n")
    assert isinstance(CliRunner().invoke(app, ["doctor", "--debug"]).exception, OSError)


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
def test_interrupt_exits_130_and_leaves_nothing(tiny_video_folder, tmp_path):
    command = [sys.executable, "-m", "nova", "generate", PROMPT]
    command += ["--model", str(tiny_video_folder), "--out", str(tmp_path / "x.mp4")]
    command += ["--device", "cpu", "--steps", "24", "--diffusion-steps", "1000"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, Ctrl-C is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        errors = ""
        while "sets:" not in errors and process.poll() is None:  # until it samples
            errors += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        errors += process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "PROMPT"),
        (["a", "--class-id", "1"], "PROMPT and --class-id"),
        (["a", "--steps", "0"], "--steps"),
        (["a", "--latents", "-1"], "--latents"),
        (["a", "--guidance", "nan"], "--guidance"),
        (["a", "--seed", "-1"], "--seed"),
        (["a", "--dtype", "int8"], "--dtype"),
        (["--batch-file", "nothing.txt"], "--batch-file"),
        (["a", "--offload", "--text-encoder-device", "cpu"], "--offload"),
    ],
)
def test_usage_errors_exit_2(tmp_path, arguments, named):
    result = run("generate", *arguments, "--model", "m", "--out", tmp_path / "x.mp4")
    assert result.exit_code == 2
    assert named in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_conditions_that_the_model_does_not_take(
    tiny_video_folder, tiny_image_folder, tiny_class_folder, tmp_path
):
    save_file({"prompt_embeds": torch.zeros(2, 7)}, tmp_path / "narrow.safetensors")
    out = tmp_path / "out" / "x.png"
    for folder, arguments, message in (
        (tiny_video_folder, ["--class-id", 3], "takes prompts, not classes: give a sentence"),
        (tiny_class_folder, ["--class-id", 3, "--negative", "x"], "--negative is for models that"),
        (
            tiny_class_folder,
            ["--class-id", 3, "--image-guidance", 1.5],
            "--image-guidance is for models that take prompts",
        ),
        (tiny_image_folder, [PROMPT, "--latents", 3], "is an image model; leave --latents out"),
        (
            tiny_video_folder,
            ["--prompt-embeds", tmp_path / "narrow.safetensors"],
            "`prompt_embeds` has 7 values a token; this model takes 32",
        ),
    ):
        result = run("generate", *arguments, "--model", folder, "--out", out, *FAST)
        assert result.exit_code == 1 and message in result.stderr, result.output
        assert not list(tmp_path.glob("out/*"))


def test_files_of_conditions_that_cannot_be_used(tmp_path):
    texts, tensors = tmp_path / "prompts.txt", tmp_path / "embeds.safetensors"
    for content, message in (
        (b"\xff\xfe\x00a", "cannot be read as UTF-8 text"),
        (b"# a remark\n\n", "holds no prompts; write one a line"),
    ):
        texts.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_conditions(None, None, None, texts)
    for content, message in (
        ({"embeds": torch.zeros(2, 32)}, r"has no tensor `prompt_embeds`, only \['embeds'\]"),
        (
            {"prompt_embeds": torch.zeros(32)},
            r"must be floating point .* got torch.float32 \(32,\)",
        ),
        ({"prompt_embeds": torch.zeros(2, 32).int()}, "must be floating point .* got torch.int32"),
    ):
        save_file(content, tensors)
        with pytest.raises(InputError, match=message):
            read_conditions(None, None, tensors, None)
    tensors.write_bytes(b"123")
    with pytest.raises(InputError, match="cannot be read as a safetensors file"):
        read_conditions(None, None, tensors, None)


# doctor, info, help ---------------------------------------------------------------------------


def test_help_does_not_import_torch():
    code = (
        "import sys\n"
        "from nova.cli import main\n"
        "sys.argv = ['nova', 'generate', '--help']\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'PIL', 'av'} & set(sys.modules)\n"
        "    print(sorted(heavy), file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0
    assert "--diffusion-steps" in result.stdout
    assert result.stderr == "[]\n"


def test_version():
    result = subprocess.run(
        [sys.executable, "-m", "nova", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert re.fullmatch(r"nova-kernels \d+\.\d+\.\d+\n", result.stdout)


def test_doctor_json():
    result = run("doctor", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["torch"]["version"] == torch.__version__
    assert report["runs"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert report["h264"] is True
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert report["cuda_extension"] == nova_kernels.build_info()


def test_doctor_table():
    result = run("doctor")
    assert result.exit_code == 0
    extensions = ("CUDA extension", "C++ extension")
    for text in ("torch", "transformers", *extensions, "H.264 encoder", "will run"):
        assert text in result.stdout


@pytest.mark.parametrize("usable", [True, False])
def test_doctor_says_who_computes(monkeypatch, usable):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # layers are packed on a CPU
    monkeypatch.setattr(onednn, "is_usable", lambda weight: usable)
    monkeypatch.setattr(onednn, "can_pack", lambda weight: usable)
    ops = doctor.examine()["runs"]["ops"]
    assert ("linear layers" in ops) == ("3D convolutions" in ops) == usable
    entries = nova_kernels.report(check=False)
    by_op = {entry.op: entry.backend for entry in entries if entry.default}
    assert {name: ops.get(name, "reference") for name in by_op} == by_op
    assert doctor._runs_text("cpu", "float32", {}) == "cpu, float32, all by plain torch"
    monkeypatch.setenv("NOVA_KERNELS_BACKEND", "reference")
    assert doctor.examine()["runs"]["ops"] == {}
    monkeypatch.setenv("NOVA_KERNELS_BACKEND", "fast")
    assert "NOVA_KERNELS_BACKEND is 'fast'" in doctor.examine()["runs"]["error"]
    assert run("doctor").exit_code == 0
    text = doctor._runs_text("cpu", "float32", {"denoise": "cpp"})
    assert text == "cpu, float32, denoise by cpp; all else by plain torch"


def test_doctor_names_the_command_for_what_is_missing():
    report = doctor.examine()
    report["packages"]["av"] = None
    report["gpus"] = []
    assert doctor.missing(report)["av"] == "videos: pip install av"
    assert "CUDA extension" not in doctor.missing(report)
    report["gpus"] = [{"device": "cuda:0"}]
    report["nvcc"] = None
    report["cuda_extension"] |= {"cuda_extension": False, "error": "not built"}
    assert {"nvcc", "CUDA extension"} <= set(doctor.missing(report))


def test_doctor_says_why_the_cpp_extension_is_not_there():
    report = doctor.examine()
    report["cuda_extension"] |= {"cpp_extension": True, "cpp_instructions": ["avx2", "baseline"]}
    assert ("C++ extension", "avx2, baseline") in doctor._rows(report)
    assert "C++ extension" not in doctor.missing(report)
    report["cuda_extension"] |= {"cpp_extension": False, "cpp_error": "it cannot be loaded"}
    assert ("C++ extension", "it cannot be loaded") in doctor._rows(report)
    assert "NOVA_CPP=1 pip install" in doctor.missing(report)["C++ extension"]


@pytest.mark.parametrize(
    "origin, command",
    [
        ({"url": "file://{}", "dir_info": {"editable": True}}, "--editable '{}'"),
        ({"url": "file://{}", "dir_info": {}}, "'{}'"),
        ({"url": "file://{}/gone", "dir_info": {}}, "."),
        ({"url": "https://example.org/nova.git", "vcs_info": {"vcs": "git"}}, "."),
        (None, "."),
    ],
)
def test_doctor_rebuilds_from_the_checkout(monkeypatch, tmp_path, origin, command):
    folder = tmp_path / "a checkout"
    folder.mkdir()
    if origin is not None:
        origin = json.dumps(origin | {"url": origin["url"].format(str(folder).replace(" ", "%20"))})
    installed = SimpleNamespace(read_text=lambda name: origin)
    monkeypatch.setattr(doctor.importlib.metadata, "distribution", lambda name: installed)
    text = doctor._rebuild({"checkout": doctor._checkout()}, "NOVA_CUDA")
    install = "NOVA_CUDA=1 pip install --force-reinstall --no-deps --no-cache-dir "
    assert text.endswith(install + command.format(folder))
    assert text.startswith("in a checkout of nova-kernels, ") == (command == ".")


def test_doctor_where_nothing_is_installed(monkeypatch):
    def missing(name):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "distribution", missing)
    assert doctor._checkout() is None


@pytest.mark.parametrize(
    "driver, build, advice",
    [
        ("550.54.15", "13.0", "550.54.15 is too old for torch with CUDA 13.0, which needs 580"),
        ("550.54.15", "13.0", "whl/cu126"),
        ("470.82", "13.0", "update it"),
        ("580.65.06", "13.0", "CUDA_VISIBLE_DEVICES"),
        ("580.65.06", None, "torch is a CPU build; pip install --force-reinstall torch"),
        ("550.54.15", None, "torch is a CPU build; pip install --force-reinstall torch"),
    ],
)
def test_doctor_knows_why_torch_sees_no_gpu(driver, build, advice):
    report = doctor.examine() | {"driver": driver, "gpus": []}
    report["torch"]["cuda_build"] = build
    text = doctor.missing(report)["GPU in torch"]
    assert advice in text and ("cu126" in text) == (driver.startswith("550"))
    assert ("GPU", f"none is visible to torch; the driver is {driver}") in doctor._rows(report)


def test_doctor_reads_the_driver(monkeypatch):
    def answer(text):
        result = subprocess.CompletedProcess([], 0, stdout=text)
        monkeypatch.setattr(doctor.subprocess, "run", lambda *command, **options: result)
        return doctor._driver()

    assert answer("570.86.15\n570.86.15\n") == "570.86.15"
    assert answer("No devices were found\n") is None


def test_doctor_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    result = run("doctor")
    assert result.exit_code == 1
    assert "cannot be imported" in result.stdout
    assert "pip install torch" in result.stdout


def test_info_counts_parameters(video_pipeline, tiny_video_folder):
    table, data = run("info", tiny_video_folder), run("info", tiny_video_folder, "--json")
    description = json.loads(data.stdout)
    assert table.exit_code == data.exit_code == 0
    assert "text to video" in table.stdout
    assert description["latent_shape"] == [4, 8, 12]
    weights = video_pipeline.transformer.state_dict().values()
    assert description["parameters"]["transformer"] == sum(weight.numel() for weight in weights)
    assert description["text_encoder"] == "phi"


def test_written_png_is_a_png(tiny_image_folder, tmp_path):
    generate(PROMPT, "--model", tiny_image_folder, "--out", tmp_path / "X.PNG")
    with Image.open(tmp_path / "X.PNG") as image:
        assert image.format == "PNG"


def test_backends_of_the_command():
    assert [backend.value for backend in Backend] == list(BACKENDS)
