"""The benchmark of what a model makes of its prompts: its wrong captions, and two known models."""

import json

import prompt_use
import pytest
from prompt_use import CHANGES, FIRST, SECOND, caption, measure, scenes

import nova
from nova.errors import InputError
from nova.shapes.vocabulary import DIRECTIONS

SCENES = 40  # two batches


@pytest.fixture(scope="module")
def pipeline():
    return nova.NOVAPipeline.from_pretrained("shapes")


def test_every_wrong_caption_says_one_thing_else():
    told = {change.name: change.tell for change in CHANGES}
    for scene in scenes(20):
        first, second = scene.objects
        wrong = {name: tell(scene) for name, tell in told.items()}
        captions = {caption(scene), *(caption(other) for other in wrong.values())}
        assert len(captions) == 1 + len(CHANGES)

        assert [thing.shape for thing in wrong["shapes exchanged"].objects] == [
            second.shape,
            first.shape,
        ]
        assert [thing.color for thing in wrong["colours exchanged"].objects] == [
            second.color,
            first.color,
        ]
        for name, field in (("another shape", "shape"), ("another colour", "color")):
            changed, kept = wrong[name].objects
            assert getattr(changed, field) not in (getattr(first, field), getattr(second, field))
            assert kept == second
        axis = [{"above", "below"}, {"left of", "right of"}]
        relation = {scene.relation}
        assert any(relation | {wrong["relation inverted"].relation} == pair for pair in axis)
        assert all(relation | {wrong["relation turned"].relation} != pair for pair in axis)
        assert wrong["another background"].background != scene.background
        moved = wrong["opposite motion"].objects[0].motion
        assert abs(DIRECTIONS[moved] - DIRECTIONS[first.motion]) == 180


def test_a_model_that_reads_its_prompts(pipeline):
    losses, rises = measure(pipeline, SCENES, show_progress=False)
    assert set(losses) == {FIRST, SECOND} and all(0 < loss < 2 for loss in losses.values())
    by_name = {rise.change: rise for rise in rises}
    for name in ("another background", "another colour", "opposite motion"):
        assert by_name[name].rise > 2 * by_name[name].standard_error > 0


def test_a_model_that_does_not(pipeline):
    weight = pipeline.transformer.text_embed.proj.weight
    kept = weight.detach().clone()
    weight.data.zero_()
    try:
        _, rises = measure(pipeline, SCENES, show_progress=False)
    finally:
        weight.data.copy_(kept)
    assert all(rise.rise == 0 for rise in rises)


def test_bad_input(pipeline, tiny_image_folder, capsys):
    with pytest.raises(InputError, match="--scenes must be at least 40"):
        measure(pipeline, 39)
    assert prompt_use.main(["--model", str(tiny_image_folder)]) == 1
    assert "needs a text-to-video model" in capsys.readouterr().err
    assert prompt_use.main(["--out", "figures.txt"]) == 1
    assert ".json" in capsys.readouterr().err


def test_command(tmp_path, capsys):
    out = tmp_path / "use.json"
    assert prompt_use.main(["--scenes", str(SCENES), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert [rise["change"] for rise in written["rises"]] == [change.name for change in CHANGES]
    assert all(change.name in printed for change in CHANGES)
