"""The world of shapes: what is drawn is what is said, and what is measured is what was drawn."""

import dataclasses
import itertools
import json
import re
import sys
from collections import defaultdict

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova import shapes
from nova.errors import DependencyError, InputError
from nova.media import read_image
from nova.shapes.__main__ import main
from nova.shapes.accuracy import degrade, measuring_accuracy
from nova.shapes.blobs import to_lab
from nova.shapes.geometry import POLYGONS, SHAPES, extents, signed_distance
from nova.shapes.labels import QUESTIONS, scene_labels
from nova.shapes.paths import paths
from nova.shapes.vocabulary import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    MOTIONS,
    RELATIONS,
    SPEEDS,
)

cv2.setNumThreads(1)

# Frames, height, width.
SIZES = [(17, 64, 64), (1, 64, 64), (9, 48, 80), (33, 64, 64), (17, 96, 40)]

OPPOSITES = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


def scene_of(motion="left", shape="circle", color="red", background="black", **changes):
    """A scene of one small slow shape."""
    grows = motion in ("growing", "shrinking")
    fields = {
        "shape": shape,
        "color": color,
        "motion": motion,
        "size": None if grows else "small",
        "speed": None if motion == "still" else "slow",
        **changes,
    }
    return shapes.Scene((shapes.SceneObject(**fields),), background)


def sampled(seed, **options):
    return shapes.sample_scene(np.random.default_rng(seed), **{"held_out": None, **options})


# --- labels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", RELATIONS)
def test_labels_say_where_shapes_are(relation):
    """The first of the labels is the upper or left shape, whichever is named first."""
    scene = next(
        scene
        for scene in (sampled(seed, num_objects=2) for seed in range(1000))
        if scene.relation == relation
    )
    named = dict(zip(QUESTIONS, scene_labels(scene), strict=True))
    said = {name: QUESTIONS[name][number] for name, number in named.items()}
    first, second = scene.objects if relation in ("above", "left of") else scene.objects[::-1]
    assert said["axis"] == ("vertical" if relation in ("above", "below") else "horizontal")
    assert said["background"] == scene.background
    for position, thing in (("first", first), ("second", second)):
        for name in ("color", "shape", "motion", "size", "speed"):
            assert said[f"{position} {name}"] == getattr(thing, name)


def test_labels_of_one_shape():
    said = dict(zip(QUESTIONS, scene_labels(scene_of(shape="star")), strict=True))
    assert QUESTIONS["first shape"][said["first shape"]] == "star"
    absent = ["axis", *(name for name in QUESTIONS if name.startswith("second"))]
    assert all(QUESTIONS[name][said[name]] is None for name in absent)


# --- drawing --------------------------------------------------------------------------------


def check_places(scene, frames, height, width):
    """Shapes are inside of the frame and apart, on the sides that their relation says."""
    boxes = []
    for thing, track in zip(scene.objects, paths(scene, frames, height, width), strict=True):
        left_up, right_down = extents(thing.shape)
        low = track[:, :2] - left_up * track[:, 2:]
        high = track[:, :2] + right_down * track[:, 2:]
        assert low.min() >= 0 and (high <= [width, height]).all()
        boxes.append((low, high))
    if scene.relation is not None:
        axis, first_in_front = RELATIONS[scene.relation]
        (_, end), (start, _) = boxes if first_in_front else boxes[::-1]
        assert (end[:, axis] < start[:, axis]).all()


@pytest.mark.parametrize("size", SIZES)
def test_shapes_stay_inside_the_frame_and_keep_their_relation(size):
    for seed in range(150):
        check_places(sampled(seed), *size)


@pytest.mark.parametrize("relation", RELATIONS)
def test_shapes_too_large_for_the_frame_are_drawn_smaller(relation):
    """Scenes made by hand; none that is sampled is so full."""
    for first, second, motion in itertools.product(SHAPES, SHAPES, ("still", "left")):
        speed = None if motion == "still" else "slow"
        things = (
            shapes.SceneObject(first, "red", "still", "large", None),
            shapes.SceneObject(second, "blue", motion, "large", speed),
        )
        check_places(shapes.Scene(things, "white", relation), 9, 64, 64)


@pytest.mark.parametrize("motion,speed", itertools.product(DIRECTIONS, SPEEDS))
def test_directions_and_speeds(motion, speed):
    (track,) = paths(scene_of(motion, speed=speed), 17, 128, 128)
    steps = np.diff(track[:, :2], axis=0)
    pixels = {"slow": 2, "fast": 3.5}[speed]  # 1 and 1.75 in a frame of 64
    assert np.allclose(np.linalg.norm(steps, axis=1), pixels)
    angle = np.degrees(np.arctan2(-steps[:, 1], steps[:, 0])) % 360
    assert np.allclose(angle, DIRECTIONS[motion])


def test_turns_growth_and_bounces():
    for motion, sign in (("clockwise", 1), ("counterclockwise", -1)):
        (track,) = paths(scene_of(motion), 17, 64, 64)
        steps = np.diff(track[:, :2], axis=0)
        turn = steps[:-1, 0] * steps[1:, 1] - steps[:-1, 1] * steps[1:, 0]
        assert (sign * turn > 0).all()  # with y down, clockwise is positive
    for motion, sign in (("growing", 1), ("shrinking", -1)):
        (track,) = paths(scene_of(motion), 17, 64, 64)
        assert np.allclose(np.diff(track[:, 2]), sign * 0.25)
        assert np.ptp(track[:, :2]) == 0
    for phase in (0.0, 0.5, 0.99):
        (track,) = paths(scene_of("bounce right", phase=phase), 17, 64, 64)
        turning = int(track[:, 0].argmax())
        assert 4 < turning < 12 and np.ptp(track[:, 1]) == 0
        assert (np.diff(track[:turning, 0]) > 0).all() and (
            np.diff(track[turning + 1 :, 0]) < 0
        ).all()
        assert track[turning, 0] + 9 > 61  # at the border


def test_longer_clips_come_to_rest_inside():
    (track,) = paths(scene_of("left", speed="fast", size="large"), 65, 64, 64)
    assert (track[-10:, 0] == track[-1, 0]).all() and track[0, 0] - track[-1, 0] > 27


@pytest.mark.parametrize("shape", SHAPES)
def test_anti_aliasing_covers_the_right_area(shape):
    """The mean over the frame is what the exact area gives, at any sub-pixel position."""
    place = (0.37, 0.41)  # off the grid of pixels: aligned with it, a cross has no mixed pixels
    scene = scene_of("right", shape=shape, color="yellow", size="large", place=place)
    frames = shapes.render(scene, 17, 64, 64)
    ground, color = (np.array(c, float) for c in (BACKGROUNDS["black"], COLORS["yellow"]))
    covered = ((frames - ground)[..., :2] / (color - ground)[:2]).mean(-1).sum((1, 2))
    axis = (np.arange(1000) + 0.5) / 1000 * 3 - 1.5
    exact = (signed_distance(shape, *np.meshgrid(axis, axis)) < 0).mean() * 9 * 12.5**2
    assert np.abs(covered / exact - 1).max() < 0.02
    edge = ((covered := (frames - ground)[..., 0] / (color - ground)[0]) > 0.1) & (covered < 0.9)
    assert 10 < edge.sum(axis=(1, 2)).min()


@pytest.mark.parametrize("corners", POLYGONS.values(), ids=POLYGONS.keys())
def test_polygons_are_symmetric_and_even(corners):
    mirrored, corners = np.round(corners * (-1, 1), 6) + 0.0, np.round(corners, 6) + 0.0  # no -0
    assert sorted(mirrored.tolist()) == sorted(corners.tolist())
    edges = np.linalg.norm(corners - np.roll(corners, 1, axis=0), axis=1)
    assert edges == pytest.approx(edges[0], abs=1e-5)


def test_plain_ground_and_full_color():
    frames = shapes.render(scene_of("still", place=(0.5, 0.5)), 2, 64, 64)
    assert frames.dtype == np.uint8 and frames.shape == (2, 64, 64, 3)
    assert tuple(frames[0, 0, 0]) == BACKGROUNDS["black"]
    assert tuple(frames[0, 32, 32]) == COLORS["red"]
    assert (frames[0] == frames[1]).all()


@pytest.mark.parametrize("size", SIZES)
def test_any_size_and_length(size):
    frames = shapes.render(sampled(3, num_objects=2), *size)
    assert frames.shape == (*size, 3)
    assert len(np.unique(frames[-1].reshape(-1, 3), axis=0)) > 2


def test_colors_are_far_apart():
    colors, grounds = to_lab(list(COLORS.values())), to_lab(list(BACKGROUNDS.values()))
    for a, b in itertools.combinations(colors, 2):
        assert np.linalg.norm(a - b) > 40
    for a, b in itertools.product(colors, grounds):
        assert np.linalg.norm(a - b) > 40


# --- sampling and the held-out split --------------------------------------------------------


def test_training_scenes_are_never_held_out():
    scenes = [sampled(seed, held_out=False) for seed in range(400)]
    assert not any(map(shapes.is_held_out, scenes))
    assert {thing.motion for scene in scenes for thing in scene.objects} == set(MOTIONS)
    assert all(shapes.is_held_out(sampled(seed, held_out=True)) for seed in range(100))


def test_a_tenth_is_held_out_and_every_pair_is_trained_on():
    held_out = {
        key: shapes.is_held_out(scene_of(key[2], key[1], key[0]))
        for key in itertools.product(COLORS, SHAPES, MOTIONS)
    }
    assert 0.09 < np.mean(list(held_out.values())) < 0.11
    trained = [key for key, out in held_out.items() if not out]
    for parts in ((0, 1), (0, 2), (1, 2)):
        pairs = {tuple(key[p] for p in parts) for key in held_out}
        assert {tuple(key[p] for p in parts) for key in trained} == pairs


def test_held_out_does_not_depend_on_the_rest():
    scene = next(s for s in map(sampled, range(100)) if shapes.is_held_out(s) and not s.relation)
    other = dataclasses.replace(scene.objects[0], place=(0.1, 0.9), phase=0.1)
    ground = "white" if scene.background != "white" else "black"
    assert shapes.is_held_out(shapes.Scene((other,), ground))


def test_sampler_options():
    for seed in range(20):
        assert len(sampled(seed, num_objects=2).objects) == 2
        assert sampled(seed, num_objects=1, motions=["still"]).objects[0].motion == "still"
        assert len(sampled(seed, two_objects=0.0).objects) == 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**63))
def test_scene_from_any_seed(seed):
    scene = sampled(seed)
    assert scene == sampled(seed)
    known = json.loads(json.dumps(shapes.facts(scene)))
    assert known["count"] == len(known["objects"]) == len(scene.objects)
    for thing in known["objects"]:
        assert (thing["size"] is None) == (thing["motion"] in ("growing", "shrinking"))
        assert (thing["speed"] is None) == (thing["motion"] == "still")
    assert (known["relation"] is None) == (known["count"] == 1)


def test_facts():
    known = shapes.facts(scene_of("up left"))
    assert known == {
        "count": 1,
        "background": "black",
        "relation": None,
        "objects": [
            {
                "color": "red",
                "shape": "circle",
                "size": "small",
                "motion": "up left",
                "speed": "slow",
                "direction": 135,
            }
        ],
    }
    assert shapes.facts(scene_of("bounce down"))["objects"][0]["direction"] == 270
    assert shapes.facts(scene_of("clockwise"))["objects"][0]["direction"] is None


# --- captions -------------------------------------------------------------------------------


def test_describe():
    left, still = (scene_of(m, c, k).objects[0] for m, c, k in MOVING_ABOVE)
    assert shapes.describe(scene_of("left")) == "a red circle moving left"
    assert shapes.describe(scene_of("still", color="orange")) == "an orange circle standing still"
    assert shapes.describe(scene_of("bounce up")) == "a red circle bouncing off the top edge"
    scene = shapes.Scene((left, still), "black", "above")
    assert shapes.describe(scene) == "a red circle moving left above a blue square"
    scene = shapes.Scene((still, left), "black", "below")
    words = "a blue square standing still below a red circle moving left"
    assert shapes.describe(scene) == words


MOVING_ABOVE = [("left", "circle", "red"), ("still", "square", "blue")]


def captions_of(scene, count=100):
    rng = np.random.default_rng(0)
    return {shapes.caption(scene, rng) for _ in range(count)}


def test_many_phrasings():
    for motion in MOTIONS:
        assert len(captions_of(scene_of(motion))) > 15
    assert len(captions_of(sampled(1, num_objects=2))) > 50


def test_captions_state_what_is_true():
    rng = np.random.default_rng(1)
    sizes = {"small": "small", "little": "small", "large": "large", "big": "large"}
    speeds = {"slowly": "slow", "quickly": "fast", "rapidly": "fast"}
    for seed in range(1500):
        scene = sampled(seed)
        text = shapes.caption(scene, rng)
        words = text.replace(",", "").split()
        things = scene.objects
        assert {w for w in words if w in COLORS} == {thing.color for thing in things}
        assert {w for w in words if w in BACKGROUNDS} <= {scene.background}
        for shape in SHAPES:  # "in a clockwise circle" is the one other use of such a word
            told = text.replace("clockwise circle", "").replace(",", "").split()
            assert (shape in told) == (shape in {thing.shape for thing in things})
        for index, word in enumerate(words):
            if word in sizes:
                color = words[index + 1]
                assert {t.color: t.size for t in things}[color] == sizes[word]
            if word in speeds:
                assert speeds[word] in {thing.speed for thing in things}
        for word in ("above", "below", "under"):
            relation = "below" if word == "under" else word
            assert word not in words or scene.relation == relation
        for side in ("left", "right", "up", "down"):
            if side in words:
                assert any(side in thing.motion for thing in things) or side in scene.relation
        if scene.relation is not None:
            assert scene.relation in text or (scene.relation == "below" and "under" in words)


def test_same_caption_means_same_scene():
    """What a caption says of colours, shapes, motions and relation can be read off in one way."""
    meanings = defaultdict(set)
    rng = np.random.default_rng(2)
    for seed in range(3000):
        scene = sampled(seed, num_objects=1)
        meanings[shapes.caption(scene, rng)].add(shapes.describe(scene))
    assert len(meanings) < 3000  # some captions came twice, so something was compared
    assert all(len(described) == 1 for described in meanings.values())


def test_a_second_shape_without_a_motion_stands_still():
    (moving,) = scene_of("right").objects
    texts = {}
    for motion in ("still", "left", "growing"):
        (second,) = scene_of(motion, shape="star", color="blue").objects
        texts[motion] = captions_of(shapes.Scene((moving, second), "black", "above"))
    # Nothing follows the star, or only what the first shape does.
    ending = re.compile("star(, (?!.*star).*)?( (on|against) a black background)?$")
    unsaid = {key: sum(map(bool, map(ending.search, found))) for key, found in texts.items()}
    assert unsaid["left"] == unsaid["growing"] == 0
    assert len(texts["still"]) / 2 < unsaid["still"] < len(texts["still"])


# --- clips by number ------------------------------------------------------------------------


def test_clips_do_not_depend_on_order_or_sharding():
    dataset = shapes.ShapesDataset(seed=5, size=8)
    forward = list(dataset)
    assert len(forward) == len(dataset) == 8
    for index in (7, 2, 5):
        again = dataset[index]
        assert (again.frames == forward[index].frames).all()
        assert again[1:] == forward[index][1:]
    assert len({clip.caption for clip in forward}) > 5
    assert shapes.clip(6, 2).scene != forward[2].scene


def test_scene_of_a_clip_does_not_depend_on_its_size():
    small, large = shapes.clip(0, 4), shapes.clip(0, 4, num_frames=9, height=96, width=128)
    assert small[1:] == large[1:] and large.frames.shape == (9, 96, 128, 3)


def test_splits_of_a_dataset():
    assert not any(shapes.is_held_out(c.scene) for c in shapes.ShapesDataset(size=50))
    assert all(shapes.is_held_out(c.scene) for c in shapes.ShapesDataset(size=20, held_out=True))
    with pytest.raises(IndexError):
        shapes.ShapesDataset(size=3)[3]


# --- measuring ------------------------------------------------------------------------------


def test_accuracy_on_rendered_clips():
    accuracy = measuring_accuracy(200)
    assert min(accuracy[name] for name in ("count", "background", "color", "relation")) >= 0.99
    assert min(accuracy["shape"], accuracy["motion"], accuracy["direction"]) >= 0.97


def test_accuracy_on_degraded_clips():
    accuracy = measuring_accuracy(200, seed=1, change=degrade)
    assert min(accuracy[name] for name in ("count", "background", "color", "relation")) >= 0.97
    assert min(accuracy["motion"], accuracy["direction"]) >= 0.95
    assert accuracy["shape"] >= 0.95


def test_shuffled_scenes_score_near_chance():
    accuracy = measuring_accuracy(150, seed=2, shuffled=True)
    # Chance for one shape is 1/8, 1/6, 1/17 and 1/8, and for two of them much less.
    assert accuracy["color"] < 0.22 and accuracy["shape"] < 0.27
    assert accuracy["motion"] < 0.15 and accuracy["direction"] < 0.2
    assert accuracy["relation"] < 0.35


def test_other_sizes_and_lengths():
    for num_frames, side in ((9, 64), (33, 64), (17, 160)):
        accuracy = measuring_accuracy(20, num_frames=num_frames, side=side)
        assert min(accuracy.values()) >= 0.9


def test_measured_numbers():
    scene = scene_of("down right", size="large", color="cyan", background="navy", speed="fast")
    for side in (64, 200):
        (seen,) = shapes.measure(shapes.render(scene, 17, side, side)).objects
        (track,) = paths(scene, 17, 1, 1)
        assert seen.speed == pytest.approx(1.75 / 64, rel=0.05)
        assert np.abs(seen.centers - paths(scene, 17, side, side)[0, :, :2] / side).max() < 0.01
        assert np.abs(seen.radii / track[:, 2] - 1).max() < 0.06
        assert seen.shape_fit > 0.95 and abs(seen.growth) < 1e-4
    (seen,) = shapes.measure(shapes.render(scene_of("shrinking"), 17, 64, 64)).objects
    assert seen.growth == pytest.approx(-0.25 / 64, rel=0.1)
    (seen,) = shapes.measure(shapes.render(scene_of("clockwise"), 17, 64, 64)).objects
    assert seen.speed == pytest.approx(1 / 64, rel=0.1)


def test_each_part_of_a_check_finds_its_own_error():
    scene = sampled(11, num_objects=2)
    first, second = scene.objects
    measured = shapes.measure(shapes.render(scene, 17, 64, 64))
    assert all(shapes.check(scene, measured).values())

    def wrong(said):
        return {name for name, right in shapes.check(said, measured).items() if not right}

    def said(**changes):
        return dataclasses.replace(scene, objects=(dataclasses.replace(first, **changes), second))

    color = next(c for c in COLORS if c not in (first.color, second.color))
    assert wrong(said(color=color)) == {"color"}
    assert wrong(said(shape=next(s for s in SHAPES if s != first.shape))) == {"shape"}
    other = "left" if first.motion != "left" else "right"
    assert "motion" in wrong(said(motion=other, size="small", speed="slow"))
    assert not {"color", "shape", "count"} & wrong(said(motion=other, size="small", speed="slow"))
    assert wrong(dataclasses.replace(scene, relation=OPPOSITES[scene.relation])) == {"relation"}
    other = next(name for name in BACKGROUNDS if name != scene.background)
    assert wrong(dataclasses.replace(scene, background=other)) == {"background"}
    alone = shapes.Scene((first,), scene.background)
    assert wrong(alone) == {"count"}


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_empty_and_odd_clips():
    blank = shapes.measure(np.full((5, 64, 64, 3), 200, np.uint8))
    assert blank.count == 0 and blank.objects == () and blank.background in BACKGROUNDS
    scene = sampled(0, num_objects=2)
    result = shapes.check(scene, blank)
    assert result.pop("background") == (scene.background == blank.background)
    assert not any(result.values())
    rng = np.random.default_rng(0)
    for frames in (1, 2, 6):
        noise = rng.integers(0, 256, (frames, 48, 64, 3)).astype(np.uint8)
        assert not all(shapes.check(sampled(0), shapes.measure(noise)).values())
    one = shapes.measure(shapes.render(scene_of("left"), 1, 64, 64))
    assert one.count == 1 and one.objects[0].color == "red" and one.objects[0].motion == "still"


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": "heptagon"},
        {"color": "black"},
        {"motion": "sideways"},
        {"size": "huge"},
        {"size": None},
        {"speed": None},
        {"place": (0.5, 1.5)},
        {"phase": float("nan")},
        {"background": "red"},
    ],
)
def test_bad_scenes(changes):
    with pytest.raises(InputError):
        scene_of(**changes)


def test_scenes_that_contradict_themselves():
    red, blue = scene_of().objects[0], scene_of(color="blue").objects[0]
    for things, relation in (
        ((red, blue), None),
        ((red,), "above"),
        ((red, red), "above"),
        ((), None),
    ):
        with pytest.raises(InputError):
            shapes.Scene(things, "black", relation)


def test_bad_arguments():
    rng = np.random.default_rng(0)
    for options in ({"num_objects": 3}, {"motions": ["jumping"]}, {"motions": []}):
        with pytest.raises(InputError):
            shapes.sample_scene(rng, **options)
    for size in ((0, 64, 64), (5, 8, 64)):
        with pytest.raises(InputError, match="at least"):
            shapes.render(scene_of(), *size)
    for frames in (np.zeros((4, 64, 64, 3)), np.zeros((64, 64, 3), np.uint8), None):
        with pytest.raises(InputError, match="uint8"):
            shapes.measure(frames)
    with pytest.raises(InputError):
        shapes.ShapesDataset(seed=-1)


def test_drawing_needs_no_opencv_and_measuring_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    frames = shapes.clip(0, 0).frames
    with pytest.raises(DependencyError, match=r"nova-kernels\[motion\]"):
        shapes.measure(frames)


# --- python -m nova.shapes ------------------------------------------------------------------


def test_sheet_and_accuracy_from_the_command_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "sheet.png"
    command = ["shapes", "--out", str(path), "--count", "3", "--accuracy", "5"]
    monkeypatch.setattr(sys, "argv", command)
    main()
    assert read_image(path).shape[1] > 6 * 64
    printed = capsys.readouterr().out
    for word in ("rendered: ", "degraded: ", "shuffled: ", "color"):
        assert word in printed
    monkeypatch.setattr(sys, "argv", ["shapes"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
