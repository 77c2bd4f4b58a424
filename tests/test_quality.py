"""The quality benchmark: oracles in place of a model, known statistics, its command line."""

import json
import math
import sys

import numpy as np
import pytest
import quality
import quality_frechet
import quality_statistics
import torch
from frechet import FeatureSpace, clip_features, frechet_distance, gaussian_frechet_distance
from quality_cases import NEW_CAPTIONS, NEW_COMBINATIONS, draw_case, score_without_flicker
from quality_evaluation import CaseSet, Evaluation
from quality_longer import continuation, extrapolation
from quality_results import Quantity, Section, TaskResult
from quality_sampler import ClipSampler, SamplerSettings
from quality_statistics import bootstrap, percentile_interval, rank_correlation, wilson_interval
from quality_tasks import image_to_video, motion, text_to_video

import nova
from nova import shapes
from nova.errors import InputError
from nova.media import read_image
from nova.motion import motion_score, require_opencv

require_opencv().setNumThreads(1)

CLIPS = 6
SIZE = (64, 64)
SETTINGS = SamplerSettings(num_inference_steps=2, num_diffusion_steps=2, guidance_scale=3.0)


class Oracle:
    """In place of a `ClipSampler`: draws what the cases say."""

    num_frames, size, batch_size, device = 17, SIZE, 4, torch.device("cpu")

    def sample(self, cases, settings, *, num_frames, given_frames=0, context_frames=None):
        return np.stack([shapes.render(case.scene, num_frames, *SIZE) for case in cases])

    def reconstruct(self, clips):
        return np.stack(clips)


class WrongOracle(Oracle):
    """Draws each case's clip for another one."""

    def sample(self, cases, settings, **options):
        return np.roll(super().sample(cases, settings, **options), 1, axis=0)


class FadingOracle(Oracle):
    """Shows nothing after the trained length."""

    def sample(self, cases, settings, **options):
        clips = super().sample(cases, settings, **options)
        clips[:, self.num_frames :] = 0
        return clips


class StandingOracle(Oracle):
    """Repeats the last given frame."""

    def sample(self, cases, settings, *, given_frames, **options):
        clips = super().sample(cases, settings, **options)
        clips[:, given_frames:] = clips[:, given_frames - 1, None]
        return clips


def evaluation_of(oracle, clips=CLIPS):
    return Evaluation(oracle(), SETTINGS, CaseSet(clips), context_frames=5)


@pytest.fixture(scope="module")
def right():
    """Shared by tests, since its cases and clips are made once."""
    return evaluation_of(Oracle)


def by_section(result):
    return {section.name: section.by_name for section in result.sections}


# --- statistics -----------------------------------------------------------------------------


def test_wilson_interval():
    # Values of R's prop.test(..., correct = FALSE).
    for right, count, low, high in (
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (50, 100, 0.4038315, 0.5961685),
    ):
        assert wilson_interval(right, count) == pytest.approx((low, high), abs=1e-6)


def test_rank_correlation():
    assert rank_correlation([1, 2, 3, 9], [0.1, 0.2, 5, 6]) == pytest.approx(1)
    # Ranks 1, 2.5, 2.5, 4 and 2, 1, 3.5, 3.5, by hand: 2.25 / sqrt(4.5 * 4.5).
    assert rank_correlation([1, 2, 2, 3], [5, 4, 7, 7]) == pytest.approx(0.5)
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


def test_bootstrap_interval():
    values = np.random.default_rng(3).normal(size=400)
    low, high = percentile_interval(bootstrap(lambda i: values[i].mean(), len(values)))
    # The textbook interval of a mean: 1.96 standard deviations / sqrt(n) on both sides.
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert low < values.mean() < high
    again = bootstrap(lambda i: values[i].mean(), len(values))
    assert percentile_interval(again) == (low, high)
    assert all(map(math.isnan, percentile_interval(np.array([math.nan]))))


def test_frechet_distance_of_gaussians():
    # Diagonal covariances: squared differences of the means and of the standard deviations.
    first, second = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 0.5])
    difference = np.array([1.0, -2.0, 0.0])
    expected = 5 + ((first - second) ** 2).sum()
    distance = gaussian_frechet_distance(difference, np.diag(first**2), np.diag(second**2))
    assert distance == pytest.approx(expected)
    # No basis of the space is preferred.
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    turned = [rotation @ np.diag(x**2) @ rotation.T for x in (first, second)]
    assert gaussian_frechet_distance(rotation @ difference, *turned) == pytest.approx(expected)
    # Two dimensions that do not commute: tr (AB)^(1/2) is sqrt(tr AB + 2 sqrt(det AB)).
    a, b = np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([[3.0, 0.0], [0.0, 1.0]])
    trace = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    assert gaussian_frechet_distance(np.zeros(2), a, b) == pytest.approx(8 - 2 * trace)


def test_frechet_distance_of_samples():
    samples = np.random.default_rng(0).normal(size=(50, 4))
    assert frechet_distance(samples, samples) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(samples, samples + [3, 0, 0, 0]) == pytest.approx(9)
    assert frechet_distance(samples, 2 * samples) == pytest.approx(
        np.cov(samples, rowvar=False).trace() + (samples.mean(axis=0) ** 2).sum()
    )


def test_features_say_where_things_are_and_where_they_move():
    scene = shapes.Scene(
        (shapes.SceneObject("circle", "red", "right", "small", "fast", place=(0.5, 0.0)),), "black"
    )
    features = clip_features(shapes.render(scene, 17, *SIZE))
    lab, change, flow = np.split(features, (48, 64))
    lightness, flow = lab.reshape(4, 4, 3)[..., 0], flow.reshape(4, 4, 2)
    assert (lightness[0] > lightness[3] + 1).all()  # it runs along the upper border
    assert change.reshape(4, 4)[0].min() > 10 * change.reshape(4, 4)[3].max()
    assert flow[0, :, 0].mean() > 0.5 and abs(flow[0, :, 1].mean()) < 0.1
    still = clip_features(np.repeat(shapes.render(scene, 1, *SIZE), 3, axis=0))
    assert (still[48:] == 0).all()


def test_distance_to_what_stands_still_is_larger():
    def features(seed, frames):
        return np.stack([clip_features(shapes.clip(seed, i).frames[frames]) for i in range(34)])

    fitted = features(1, slice(None))
    space = FeatureSpace.fit(fitted)
    assert space.components.T @ space.components == pytest.approx(np.eye(32), abs=1e-9)
    # Principal components: of what they were fitted to, uncorrelated, the most varying first.
    projected = space.project(fitted)
    variances = (projected**2).mean(axis=0)
    assert projected.mean(axis=0) == pytest.approx(0, abs=1e-9)
    assert projected.T @ projected / len(fitted) == pytest.approx(np.diag(variances), abs=1e-8)
    assert (np.diff(variances) <= 0).all()
    reference, moving, still = (
        space.project(features(seed, frames))
        for seed, frames in ((2, slice(None)), (3, slice(None)), (3, [0] * 17))
    )
    assert 1.5 * frechet_distance(moving, reference) < frechet_distance(still, reference)


# --- tasks with oracles ---------------------------------------------------------------------


def test_real_clips_are_right_and_their_floor_is_low(right):
    result = text_to_video(right)
    sections = by_section(result)
    for split in (NEW_CAPTIONS, NEW_COMBINATIONS):
        for quantity in sections[split].values():
            assert quantity.value == quantity.ceiling == 1
            assert quantity.low < 1 == pytest.approx(quantity.high)
        assert sections[split]["motion"].floor < 0.3 and sections[split]["color"].floor < 0.4
        assert {name for name, q in sections[split].items() if q.reached} == {
            "color",
            "shape",
            "direction",
        }
        single, pairs = sections[f"{split}, one shape"], sections[f"{split}, two shapes"]
        assert single["color"].count + pairs["color"].count == CLIPS
        each = sections[f"{split}, each shape"]["color"]
        assert each.count == single["color"].count + 2 * pairs["color"].count and each.value == 1
    assert all(example.text.endswith("| right") for example in result.examples)
    assert not any(section.wrong_clips for section in result.sections)


def test_backgrounds_count_where_captions_name_them(right):
    for split, section in zip(
        (NEW_CAPTIONS, NEW_COMBINATIONS), text_to_video(right).sections[::4], strict=True
    ):
        named = ["background" in case.caption for case in right.cases(split)]
        assert section.by_name["background"].count == sum(named) > 0


def test_clips_of_other_captions_are_wrong():
    result = text_to_video(evaluation_of(WrongOracle, clips=6))
    section = result.sections[0]
    assert section.by_name["motion"].value < 0.3 and section.by_name["color"].value < 0.4
    assert section.by_name["color"].ceiling == 1
    assert section.by_name["color"].reached is False
    note = section.wrong_clips[0]
    assert note.wrong and str(note).startswith(note.caption) and note.seen in str(note)


def test_motion_of_real_clips(right):
    sections = by_section(motion(right))
    data, swept = (sections[name]["rank correlation"] for name in ("as in the data", "swept"))
    assert data.value == data.ceiling == pytest.approx(1) and data.reached
    assert data.floor < 0.6
    # What the caption tells does not give the score; a clip that obeys does.
    assert swept.value < 0.6 and not swept.reached
    assert swept.ceiling > 0.8
    assert swept.low < swept.value < swept.high
    # Real clips do not flicker, so that nothing is to be left out.
    steady = sections["swept, without flicker"]["rank correlation"]
    assert steady.value == pytest.approx(swept.value, abs=0.02) and steady.wanted is None


def test_flicker_is_left_out_of_scores(right):
    (case,) = right.swept_cases()[:1]
    still = motion_score(case.frames, shapes.FPS)
    noise = np.random.default_rng(0).normal(0, 12, case.frames.shape)
    noisy = np.clip(case.frames + noise, 0, 255).astype(np.uint8)
    assert motion_score(noisy, shapes.FPS) > 1.2 * still
    assert score_without_flicker(case, noisy) == pytest.approx(still)
    nothing = np.full_like(case.frames, 128)
    assert score_without_flicker(case, nothing) == motion_score(nothing, shapes.FPS)


def test_swept_captions_say_nothing_of_speed_and_size(right):
    for case in right.swept_cases():
        words = set(case.caption.split())
        assert len(case.scene.objects) == 1
        assert not words & {"slowly", "quickly", "rapidly", "small", "little", "large", "big"}
        assert not shapes.is_held_out(case.scene)
    asked = sorted(case.motion for case in right.swept_cases())
    assert asked[0] < 1.3 and asked[-1] > 3 and np.diff(asked).max() < 0.6


def test_image_to_video(right):
    quantities = by_section(image_to_video(right))[NEW_COMBINATIONS]
    assert all(quantities[name].value == 1 for name in ("color", "motion", "direction"))
    psnr = quantities["first frame PSNR"]
    assert psnr.value == psnr.ceiling == 100 and psnr.floor < 30


def test_continuation(right):
    # Of 5 latent frames the first 3 are given: 9 of 17 frames.
    assert continuation(right).sections[0].name == "frames 8 to the end"
    (section,) = by_section(continuation(right)).values()
    assert all(q.value == 1 for name, q in section.items() if q.unit == "share")
    distance = section["distance in the last frame"]
    assert distance.value < 0.7 and distance.floor > 3
    (standing,) = by_section(continuation(evaluation_of(StandingOracle, clips=4))).values()
    distance = standing["distance in the last frame"]
    assert distance.value == pytest.approx(distance.floor, abs=0.7)
    assert standing["color"].value == 1 and standing["direction"].value == 0


def test_extrapolation(right):
    result = extrapolation(right)
    first, second, ratio = by_section(result).values()
    assert [section.name for section in result.sections[:2]] == [
        "frames 0 to 16",
        "frames 17 to 32",
    ]
    # Only what real clips show in both halves counts.
    assert all(q.value == 1 for q in (*first.values(), *second.values()))
    assert first["motion"].count == second["motion"].count < CLIPS
    assert all(q.value == q.low == q.high == q.ceiling == 1 for q in ratio.values())


def test_extrapolation_that_fades():
    first, second, ratio = by_section(extrapolation(evaluation_of(FadingOracle, clips=3))).values()
    assert first["color"].value == 1 and second["color"].value == 0
    assert ratio["color"].value == 0 and ratio["color"].ceiling == 1 and not ratio["all"].reached


def test_frechet_task(right, monkeypatch):
    monkeypatch.setattr(quality_frechet, "NUM_BASIS_CLIPS", 40)
    (section,) = by_section(quality_frechet.frechet(right)).values()
    generated, real = section["generated"], section["real"]
    assert generated.value == real.value == generated.ceiling
    assert generated.low < generated.value < generated.high
    assert generated.count == 2 * CLIPS
    assert section["frames in random order"].value > 2 * real.value


# --- cases and the sampler ------------------------------------------------------------------


def test_cases_do_not_depend_on_each_other(right):
    case = draw_case(NEW_COMBINATIONS, right.case_set.seed, 3, 17, SIZE, 17)
    drawn = right.cases(NEW_COMBINATIONS)[3]
    assert (case.caption, case.scene, case.motion, case.seed) == (
        drawn.caption,
        drawn.scene,
        drawn.motion,
        drawn.seed,
    )
    assert (case.frames == drawn.frames).all() and shapes.is_held_out(case.scene)
    every = [c for cases in (right.both_splits(right.cases), right.swept_cases()) for c in cases]
    assert len({c.seed for c in every}) == 3 * CLIPS
    # Scores of long clips are those of the length that training saw.
    long = draw_case(NEW_CAPTIONS, 5, 0, 33, SIZE, 17)
    assert long.motion == nova.motion.motion_score(long.frames[:17])


@pytest.fixture(scope="module")
def pipeline(tiny_video_folder):
    return nova.NOVAPipeline.from_pretrained(tiny_video_folder)


@pytest.mark.filterwarnings("ignore::nova.text.PromptTruncationWarning")
@pytest.mark.parametrize("given_frames", [1, 5])
def test_samples_do_not_depend_on_the_batch(pipeline, given_frames):
    sampler = ClipSampler(pipeline, batch_size=2)
    cases = [draw_case(NEW_CAPTIONS, 7, i, 9, sampler.size, 9) for i in range(2)]
    options = {"num_frames": 9, "given_frames": given_frames}
    together = sampler.sample(cases, SETTINGS, **options).astype(int)
    assert together.shape == (2, 9, *sampler.size, 3)
    alone = sampler.sample(cases[1:], SETTINGS, **options)
    assert np.abs(together[1] - alone[0]).max() <= 1  # rounding of other matrix sizes
    assert np.abs(together[1] - together[0]).max() > 10


@pytest.mark.filterwarnings("ignore::nova.text.PromptTruncationWarning")
def test_a_clip_to_go_on_from_is_what_the_pipeline_calls_video(pipeline):
    sampler = ClipSampler(pipeline, batch_size=1)
    case = draw_case(NEW_CAPTIONS, 7, 0, 9, sampler.size, 9)
    (clip,) = sampler.sample([case], SETTINGS, num_frames=9, given_frames=5)
    expected = pipeline(
        case.caption,
        2,
        2,
        3,
        3.0,
        video=case.frames[:5],
        motion_flow=case.motion,
        generator=[torch.Generator().manual_seed(case.seed)],
        output_type="uint8",
        disable_progress_bar=True,
    ).frames[0]
    assert (clip == expected).all()


def test_reconstruction(pipeline):
    sampler = ClipSampler(pipeline, batch_size=2)
    clip = shapes.clip(7, 0, num_frames=5, height=64, width=96).frames
    latents = pipeline.vae.encode(nova.codec.to_pixels([clip]), sample=False)
    expected = nova.media.to_uint8(pipeline.vae.decode(latents))[0]
    both = sampler.reconstruct([clip[::-1].copy(), clip]).astype(int)
    assert np.abs(both[1] - expected).max() <= 1 and np.abs(both[0] - expected).max() > 10


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_a_part_is_missing(tiny_video_folder, part):
    pipeline = nova.NOVAPipeline.from_pretrained(tiny_video_folder, **{part: None})
    with pytest.raises(InputError, match="text encoder and VAE"):
        ClipSampler(pipeline, 1)


# --- the command ----------------------------------------------------------------------------


def a_result(name):
    quantity = Quantity("color", 0.5, 0.2, 0.8, 4, ceiling=1.0, floor=math.nan, wanted=0.9)
    return TaskResult(name, (Section("new captions", (quantity,)),))


@pytest.mark.parametrize("error", [InputError("late"), KeyboardInterrupt(), RuntimeError("bug")])
def test_a_late_failure_keeps_the_finished_tasks(tmp_path, capsys, error):
    path = tmp_path / "results.json"

    def fails():
        assert list(json.loads(path.read_text())["tasks"]) == ["motion"]
        raise error

    tasks = {"motion": lambda: a_result("motion"), "frechet": fails}
    with pytest.raises(type(error)):
        quality.run_tasks(tasks, path, {"model": "tiny"}, tmp_path)
    saved = json.loads(path.read_text())
    assert saved["model"] == "tiny"
    quantity = saved["tasks"]["motion"]["new captions"]["color"]
    assert quantity["reached"] is False and quantity["floor"] is None and quantity["count"] == 4
    assert f"{path.name}: motion" in capsys.readouterr().out.replace("\n", "")
    assert (tmp_path / "accuracies.png").exists()


def run_command(folder, *arguments):
    return quality.main(["--model", str(folder), "--device", "cpu", *map(str, arguments)])


@pytest.mark.filterwarnings("ignore::nova.text.PromptTruncationWarning")
def test_the_whole_command(tiny_video_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quality_frechet, "NUM_BASIS_CLIPS", 34)
    monkeypatch.setattr(quality_statistics, "RESAMPLES", 20)
    out = tmp_path / "results.json"
    arguments = "--clips 2 --steps 2 --diffusion-steps 1 --batch-size 2"
    arguments += " --sweep-steps 2,3 --sweep-diffusion-steps 1 --sweep-clips 2"
    run = ["--out", out, "--plots", tmp_path / "plots", *arguments.split()]
    assert run_command(tiny_video_folder, *run) == 0
    saved = json.loads(out.read_text())
    assert list(saved["tasks"]) == [*quality.TASKS, "sweep"]
    assert saved["sampler"]["num_inference_steps"] == 2 and saved["frames"] == [9, 64, 96]
    assert {"torch", "commit", "opencv"} <= set(saved["machine"])
    speeds = [preset["times the slowest"] for preset in list(saved["tasks"]["sweep"].values())[1:]]
    assert len(speeds) == 2 and min(speed["value"] for speed in speeds) == 1
    sheets = [f"clips_{task}.png" for task in list(quality.TASKS)[:5]]
    for name in ("accuracies.png", "motion.png", "speed.png", *sheets):
        assert min(read_image(tmp_path / "plots" / name).shape[:2]) > 200
    printed = capsys.readouterr().out
    for word in ("Text to video", "rank correlation", "Quality against speed", "A=3 D=1"):
        assert word in printed


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--tasks", "motion,juggling"], "juggling"),
        (["--tasks", ""], "text-to-video, motion"),
        (["--clips", "0"], "--clips must be at least"),
        (["--seed", "0"], "seed of the clips of training"),
        (["--steps", "0"], "num_inference_steps"),
        (["--guidance", "nan"], "guidance"),
        (["--batch-size", "0"], "--batch-size"),
        (["--motion-range", "3", "1"], "--motion-range"),
        (["--context-frames", "1"], "--context-frames"),
        (["--sweep-steps", "4,x"], "4,8,16"),
        (["--sweep-diffusion-steps", "0"], "--sweep-diffusion-steps"),
        (["--sweep-clips", "0"], "--sweep-clips"),
        (["--device", "tpu"], "tpu"),
        (["--out", "results.txt"], ".json"),
    ],
)
def test_bad_options(tiny_video_folder, tmp_path, capsys, arguments, message):
    run = ["--out", tmp_path / "x.json", *arguments]
    assert run_command(tiny_video_folder, *run) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("size,message", [("image", "makes images"), ("class", "takes class ids")])
def test_other_kinds_of_models(size, message, request, tmp_path, capsys):
    folder = request.getfixturevalue(f"tiny_{size}_folder")
    assert run_command(folder, "--out", tmp_path / "x.json") == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("module,extra", [("cv2", "[motion]"), ("matplotlib", "[train]")])
def test_a_library_is_missing(module, extra, tiny_video_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    run = ["--out", tmp_path / "x.json", "--plots", tmp_path]
    assert run_command(tiny_video_folder, *run) == 1
    assert extra in capsys.readouterr().err


def test_ctrl_c(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(quality, "run", interrupted)
    assert quality.main(["--model", "x"]) == 130 and "interrupted" in capsys.readouterr().err
