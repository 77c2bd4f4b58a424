"""Motion scores of clips whose motion is known."""

import sys

import cv2
import numpy as np
import pytest

from nova.errors import DependencyError, InputError
from nova.motion import motion_score


def translating(pixels, frames=5, height=256, width=256, angle=0.4):
    """A textured clip that moves by so many pixels a frame: uint8 (frames, height, width, 3)."""
    rng = np.random.default_rng(0)
    texture = cv2.GaussianBlur(rng.normal(size=(height + 200, width + 200, 3)), (0, 0), 3)
    texture = np.clip(128 + 45 * texture / texture.std(), 0, 255).astype(np.uint8)
    clip = []
    for k in range(frames):
        x, y = -100 + k * pixels * np.cos(angle), -100 + k * pixels * np.sin(angle)
        clip.append(cv2.warpAffine(texture, np.array([[1, 0, x], [0, 1, y]]), (width, height)))
    return np.stack(clip)


@pytest.mark.parametrize("pixels", [0.5, 1, 2, 5, 12])
def test_known_displacement(pixels):
    assert motion_score(translating(pixels), fps=12) == pytest.approx(pixels, rel=0.1)


def test_still_clips_score_nothing():
    assert motion_score(np.repeat(translating(0, 1), 5, axis=0)) < 0.01
    assert motion_score(np.full((3, 64, 96, 3), 128, np.uint8)) < 0.01


def test_faster_scores_higher():
    scores = [motion_score(translating(pixels, 3)) for pixels in (0, 0.25, 0.5, 1, 2, 4, 8)]
    assert scores == sorted(scores) and len(set(scores)) == len(scores)


def test_score_does_not_depend_on_the_frame_size():
    clip = translating(4)
    half = np.stack([cv2.resize(frame, (128, 128), interpolation=cv2.INTER_AREA) for frame in clip])
    assert motion_score(half) == pytest.approx(motion_score(clip), rel=0.1)
    wide = translating(4, height=256, width=400)
    assert motion_score(wide) == pytest.approx(4, rel=0.1)
    assert motion_score(wide.transpose(0, 2, 1, 3)) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("fps", [6, 8, 12, 24, 30, 50])
def test_score_does_not_depend_on_the_frame_rate(fps):
    """The same motion, 3 pixels in a twelfth of a second, filmed at other rates."""
    assert motion_score(translating(3 * 12 / fps, 11), fps=fps) == pytest.approx(3, rel=0.1)


def test_rates_that_end_between_two_frames():
    """In floats 26 steps of 249 / 156 frames are not less than 41.5."""
    clip = np.zeros((42, 32, 32, 3), np.uint8)
    assert motion_score(clip, fps=249 / 13) == 0


def test_two_frames_are_enough():
    assert motion_score(translating(2, 2), fps=12) == pytest.approx(2, rel=0.1)
    assert motion_score(translating(2, 2), fps=60) == pytest.approx(10, rel=0.1)


def test_few_pairs_are_spread_over_the_clip():
    """Two still pairs at the ends, motion in between."""
    moving = translating(3, 7)
    clip = np.concatenate([moving[:1], moving, moving[-1:]])
    assert motion_score(clip, max_pairs=2) < 0.1
    assert motion_score(clip, max_pairs=3) == pytest.approx(1, rel=0.1)
    assert motion_score(clip, max_pairs=100) == motion_score(clip)
    for wrong in (0, 2.5, "3"):
        with pytest.raises(InputError, match="max_pairs must be a whole number of at least 1"):
            motion_score(clip, max_pairs=wrong)


def test_same_frames_same_score():
    clip = translating(3, 3)
    assert motion_score(clip) == motion_score(clip.copy())


@pytest.mark.parametrize(
    "frames,message",
    [
        (np.zeros((1, 32, 32, 3), np.uint8), "two frames"),
        (np.zeros((0, 32, 32, 3), np.uint8), "shape"),
        (np.zeros((4, 32, 32), np.uint8), "shape"),
        (np.zeros((4, 32, 32, 3), np.float32), "float32"),
        ([[0, 1]], "uint8"),
    ],
)
def test_bad_frames(frames, message):
    with pytest.raises(InputError, match=message):
        motion_score(frames)


@pytest.mark.parametrize("fps", [0, -12, float("nan"), float("inf"), None, "12"])
def test_bad_rates(fps):
    with pytest.raises(InputError, match="fps"):
        motion_score(translating(1, 2), fps=fps)


def test_missing_opencv_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(DependencyError, match=r"pip install 'nova-kernels\[motion\]'"):
        motion_score(np.zeros((2, 32, 32, 3), np.uint8))
