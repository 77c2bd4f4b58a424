"""benchmarks/memory.py: what it says before it measures."""

import json

import memory
import pytest


def test_results_of_others_are_not_written_over(tmp_path):
    path = tmp_path / "fps.json"
    path.write_text(json.dumps({"machine": {}, "rows": []}))
    with pytest.raises(SystemExit, match="holds no list of rows"):
        memory.main(["sampling", "--geometry", "tiny-video", "--json", str(path)])
    assert json.loads(path.read_text()) == {"machine": {}, "rows": []}
    (tmp_path / "file").write_text("[]")
    with pytest.raises(SystemExit, match="cannot be used"):
        memory.main(["sampling", "--json", str(tmp_path / "file" / "memory.json")])


def test_no_videos_at_all(capsys):
    with pytest.raises(SystemExit):
        memory.main(["sampling", "--batch", "0"])
    assert "--batch must be at least 1, got 0" in capsys.readouterr().err


def test_a_clip_that_latents_do_not_cover():
    with pytest.raises(SystemExit, match=r"--frames must be 1 \+ 4 n, got 16"):
        memory.main(["vae", "--frames", "16", "--worker"])


def test_rows_are_added(tmp_path):
    path = tmp_path / "memory.json"
    options = ["--geometry", "tiny-video", "--steps", "2", "--diffusion-steps", "2", "--sets", "1"]
    for _ in range(2):
        memory.main(["sampling", *options, "--json", str(path)])
    assert [row["what"] for row in json.loads(path.read_text())] == ["sampling"] * 2
