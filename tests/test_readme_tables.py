"""The README's tables are those that benchmarks/readme_tables.py makes of the results."""

import json
import shutil
import sys

import pytest
import readme_tables
from readme_tables import README, RESULTS, TableError, make_table, rewrite


def test_the_readme_is_in_step_with_the_results():
    text = README.read_text()
    assert "<!-- table: fps_cpu -->" in text and "<!-- table: memory_cpu -->" in text
    assert rewrite(text) == text, "run python benchmarks/readme_tables.py"


def test_other_results_are_noticed(tmp_path):
    for file in RESULTS.glob("*.json"):
        shutil.copy(file, tmp_path)
    file = tmp_path / "fps_cpu.json"
    content = json.loads(file.read_text())
    content["rows"][0]["fps"] *= 2
    file.write_text(json.dumps(content))
    text = README.read_text()
    assert rewrite(text, tmp_path) != text


def fps_row(sampler, latency, **changes):
    row = {
        "sampler": sampler,
        "geometry": "tiny-video",
        "latent_frames": 3,
        "steps": 4,
        "diffusion_steps": 5,
        "sets_run": 12,
        "sets_of_video": 12,
        "batch": 2,
        "dtype": "float32",
        "latency_s": latency,
        "latencies_s": [latency, 2 * latency, latency / 2],
        "fps": 18 / latency,
        "ratio_to_plain": 6 / latency,
        "max_error_vs_plain": 2.4e-7,
    }
    return {**row, **changes}


def write(folder, rows):
    machine = {"device": "cpu", "name": "a processor", "threads": 2, "torch": "2.0"}
    content = {"machine": machine, "command": "python benchmarks/fps.py", "rows": rows}
    (folder / "fps_x.json").write_text(json.dumps(content))


def test_fps_by_hand(tmp_path):
    part = {"sets_run": 2, "batch": 1}
    refused = {"refused": "wrong: differs"}
    rows = [fps_row("plain", 6.0), fps_row("exact", 2.0), fps_row("other", 1.0, **refused)]
    write(tmp_path, [*rows, fps_row("plain", 6.0, **part), fps_row("exact", 3.0, **part)])
    assert make_table("fps_x", tmp_path) == [
        "| geometry | batch | plain | exact |",
        "|---|---|---|---|",
        "| tiny-video (64 x 96 pixels, 9 frames, A = 4, D = 5) | 2 | 3.0 FPS (1.5-6.0) | "
        "9.0 FPS (4.5-18.0), **3.00 x** |",
        "| tiny-video (64 x 96 pixels, 9 frames, A = 4, D = 5), the first 2 of 12 sets | 1 | "
        "6.0 s (3.0-12.0) | 3.0 s (1.5-6.0), **2.00 x** |",
        "",
        "a processor, 2 threads, torch 2.0, float32; medians of 3 runs, in brackets their range, "
        "and how many times as fast as plain; latents equal to 2e-07. `python benchmarks/fps.py`",
    ]


def test_share_of_the_floor(tmp_path):
    shares = {"share_of_floor": 0.25}
    write(tmp_path, [fps_row("plain", 6.0, share_of_floor=0.1), fps_row("exact", 2.0, **shares)])
    head, _, line, *_ = make_table("fps_x", tmp_path)
    assert head.endswith("| of floor |") and line.endswith("| 25 % |")


def test_frames_are_those_of_the_vae(tmp_path):
    write(tmp_path, [fps_row("plain", 6.0, temporal_factor=8)])
    assert "17 frames" in make_table("fps_x", tmp_path)[2]


def test_files_with_something_missing(tmp_path):
    plain, refused = fps_row("plain", 6.0), {"refused": "not timed yet"}
    del plain["fps"]
    for rows, message in (
        ([], "fps_x.json: no sampler was timed"),
        ([fps_row("plain", 6.0, **refused)], "no sampler was timed"),
        ([fps_row("plain", 6.0, **refused), fps_row("exact", 2.0)], "plain was not .*, batch 2"),
        ([plain], "fps_x.json has no 'fps'"),
    ):
        write(tmp_path, rows)
        with pytest.raises(TableError, match=message):
            make_table("fps_x", tmp_path)
    (tmp_path / "fps_x.json").write_text('{"rows"')
    with pytest.raises(TableError, match="fps_x.json: Expecting"):
        make_table("fps_x", tmp_path)


def test_only_blocks_change(tmp_path):
    write(tmp_path, [fps_row("plain", 6.0)])
    text = "before\n\n<!-- table: fps_x -->\nold\n<!-- end table -->\nafter\n"
    new = rewrite(text, tmp_path)
    assert new.startswith("before\n\n<!-- table: fps_x -->\n| geometry")
    assert new.endswith("\n<!-- end table -->\nafter\n") and "old" not in new
    assert rewrite(new, tmp_path) == new


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!-- table: fps_x -->\n", "has no '<!-- end table -->'"),
        ("<!-- table: fps_x -->\n<!-- table: fps_x -->\n<!-- end table -->\n", "has no"),
        ("<!-- end table -->\n", "without a table"),
        ("<!-- table: fps_y -->\n<!-- end table -->\n", "fps_y.json is not there"),
        ("<!-- table: sizes_x -->\n<!-- end table -->\n", "known kinds: fps, memory"),
    ],
)
def test_bad_blocks(tmp_path, text, message):
    write(tmp_path, [fps_row("plain", 6.0)])
    with pytest.raises(TableError, match=message):
        rewrite(text, tmp_path)


def test_command(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table: fps_cpu -->\n<!-- end table -->\n")
    arguments = ["readme_tables.py", "--readme", str(readme)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--check"])
    assert readme_tables.main() == 1 and "not in step" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", arguments)
    assert readme_tables.main() == 0 and "| plain |" in readme.read_text()
    monkeypatch.setattr(sys, "argv", [*arguments, "--check"])
    assert readme_tables.main() == 0
