"""benchmarks/streaming.py: arrival of pixels, what is checked, table, picture, command."""

import json
import sys

import measure
import numpy as np
import pytest
import streaming
import streaming_runs
import torch
from streaming_runs import Arrivals, Tiles, Way, WayRuns, run_ways, ways

import nova

CPU = torch.device("cpu")
SMALL_CALL = ["--latents", "3", "--steps", "2", "--diffusion-steps", "2", "--repeats", "1"]


def test_ways():
    names = [way.name for way in ways(CPU, 5)]
    alone, of_two = ", first alone", ", tiles of 2, first alone"
    suffixes = ("", alone, of_two)
    assert names == [f"{kind}{suffix}" for suffix in suffixes for kind in ("call", "stream")]
    assert [way.name for way in ways(CPU, 2)] == names[:4]
    on_gpu = ways(torch.device("cuda"), 5)
    assert [way.overlaps for way in on_gpu] == [False, False, True] * 3
    # Others are compared with the call of the same tiles, which comes first.
    calls = [way.tiles for way in on_gpu if not way.streams]
    assert calls == [Tiles(5), Tiles(5, True), Tiles(2, True)]


def test_when_playing_can_start():
    arrivals = Arrivals(((1.0, 1), (2.0, 4), (4.5, 4)))
    assert (arrivals.first_s, arrivals.last_s, arrivals.num_frames) == (1.0, 4.5, 9)
    # At 4 frames a second the second piece is due 0.25 s after the start, the third 1.25 s.
    assert arrivals.plays_from(4.0) == 3.25
    assert arrivals.plays_from(0.1) == 1.0  # then all else is there in time
    assert arrivals.plays_from(1e9) == pytest.approx(4.5)


def test_the_median_run():
    runs = [Arrivals(((seconds, 1),)) for seconds in (3.0, 1.0, 2.0, 9.0)]
    assert WayRuns(Way("call", False, Tiles(5)), runs).median.last_s == 2.0


@pytest.fixture
def pipe(tiny_video_folder):
    return nova.NOVAPipeline.from_pretrained(tiny_video_folder)


REQUEST = {
    "prompt": "a star",
    "max_latent_length": 3,
    "num_inference_steps": 2,
    "num_diffusion_steps": 2,
    "disable_progress_bar": True,
}


def test_runs(pipe):
    said = []
    seen = run_ways(pipe, ways(CPU, 5), REQUEST, repeats=2, say=said.append)
    assert len(said) == 6 * 3 and said[0].startswith("first run, call: ")
    for one in seen:
        assert one.refused is None and len(one.runs) == 2 and one.peak_bytes > 0
        assert one.median.num_frames == 9
    call, stream, _, first_alone, _, small_tiles = seen
    assert len(call.median.pieces) == 1
    # All three latent frames are in one tile of five; tiles of two share a latent frame.
    assert [frames for _, frames in stream.median.pieces] == [9]
    assert [frames for _, frames in first_alone.median.pieces] == [1, 8]
    assert [frames for _, frames in small_tiles.median.pieces] == [1, 4, 4]
    assert call.levels == stream.levels == 0 < first_alone.levels < small_tiles.levels


def test_wrong_pixels_are_not_timed(pipe, monkeypatch):
    right = streaming_runs._pieces

    def wrong(pipe, way, request):
        for piece in right(pipe, way, request):
            yield piece + np.uint8(3) if way.name == "stream" else piece

    monkeypatch.setattr(streaming_runs, "_pieces", wrong)
    call, stream = run_ways(pipe, ways(CPU, 5)[:2], REQUEST, repeats=1)
    assert call.refused is None and len(call.runs) == 1
    assert stream.refused.startswith("wrong: differs from the call by") and not stream.runs


def test_timed_runs_are_checked_too(pipe, monkeypatch):
    """As what is recorded in the first run and wrong in a later one."""
    right, streamed = streaming_runs._pieces, []

    def wrong_later(pipe, way, request):
        streamed.append(way.streams)
        for piece in right(pipe, way, request):
            yield 255 - piece if way.streams and sum(streamed) > 2 else piece

    monkeypatch.setattr(streaming_runs, "_pieces", wrong_later)
    said = []
    call, stream = run_ways(pipe, ways(CPU, 5)[:2], REQUEST, repeats=3, say=said.append)
    assert call.refused is None and len(call.runs) == 3
    assert stream.refused.startswith("wrong: differs from the call by") and len(stream.runs) == 1
    assert f"turn 2, stream: {stream.refused}" in said


def test_a_stream_without_a_call_is_refused(pipe, monkeypatch):
    right = streaming_runs._pieces

    def broken(pipe, way, request):
        if not way.streams:
            raise RuntimeError("no kernel image")
        return right(pipe, way, request)

    monkeypatch.setattr(streaming_runs, "_pieces", broken)
    call, stream = run_ways(pipe, ways(CPU, 5)[:2], REQUEST, repeats=1)
    assert call.refused == "failed: RuntimeError: no kernel image"
    assert stream.refused == "failed: the call gave no frames to compare with"
    assert not stream.runs


def test_missing_frames_are_noticed(pipe, monkeypatch):
    right = streaming_runs._pieces
    monkeypatch.setattr(
        streaming_runs,
        "_pieces",
        lambda pipe, way, request: (
            piece[:-1] if way.streams else piece for piece in right(pipe, way, request)
        ),
    )
    _, stream = run_ways(pipe, ways(CPU, 5)[:2], REQUEST, repeats=1)
    assert "wrong: frames of shape (8, " in stream.refused


def test_what_fails_is_said(pipe):
    # Decoding beside sampling needs a GPU.
    overlapped = Way("overlapped", True, Tiles(5), overlaps=True)
    call, failed = run_ways(pipe, [ways(CPU, 5)[0], overlapped], REQUEST, repeats=1)
    assert call.refused is None
    assert failed.refused.startswith("failed: DeviceError: overlap_decoding needs a GPU")


def test_rows_are_kept_as_they_come(tiny_video_folder, tmp_path, monkeypatch):
    path, run, calls = tmp_path / "s.json", streaming_runs._run, []

    def broken(*arguments):
        calls.append(1)
        if len(calls) == 9:  # in the first turn behind that of warming up
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(streaming_runs, "_run", broken)
    with pytest.raises(KeyboardInterrupt):
        run_command(
            monkeypatch, "--model", str(tiny_video_folder), *SMALL_CALL, "--json", str(path)
        )
    ways = [row["way"] for row in json.loads(path.read_text())["rows"]]
    assert ways == ["call", "stream"]


def failing_from(number, monkeypatch):
    """Runs fail from this one on, as where the GPU is lost; names of the ways that were run."""
    run, names = streaming_runs._run, []

    def broken(pipe, way, request):
        names.append(way.name)
        if len(names) >= number:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")
        return run(pipe, way, request)

    def synchronize(device):
        if len(names) >= number:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(streaming_runs, "_run", broken)
    monkeypatch.setattr(measure, "synchronize", synchronize)
    return names


def test_a_lost_gpu_takes_no_other_way_along(pipe, monkeypatch):
    names, said, kept = failing_from(4, monkeypatch), [], []
    call, stream = run_ways(
        pipe,
        ways(CPU, 5)[:2],
        REQUEST,
        repeats=3,
        say=said.append,
        keep=lambda seen: kept.append([one.way.name for one in seen]),
    )
    assert names == ["call", "stream"] * 2
    assert call.refused is None and len(call.runs) == 1
    failure = "failed: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert stream.refused == failure
    assert said[-2:] == [f"turn 1, stream: {failure}", "the GPU refuses all work after stream"]
    assert kept == [["call"], ["call", "stream"]]


def test_a_gpu_lost_in_a_first_run(tiny_video_folder, tmp_path, monkeypatch, capsys):
    failing_from(2, monkeypatch)
    file = tmp_path / "s.json"
    options = ["--model", str(tiny_video_folder), *SMALL_CALL, "--json", str(file)]
    assert run_command(monkeypatch, *options) == 1
    [row] = json.loads(file.read_text())["rows"]
    assert row["way"] == "stream" and row["refused"].startswith("failed: RuntimeError: CUDA error")
    assert "the GPU refuses all work after stream" in capsys.readouterr().err


def test_what_fails_is_in_the_file_at_once(tiny_video_folder, tmp_path, monkeypatch):
    file, run = tmp_path / "s.json", streaming_runs._run

    def broken(pipe, way, request):
        if way.name == "call":
            raise RuntimeError("no kernel image")
        if way.name == "stream":
            raise KeyboardInterrupt
        return run(pipe, way, request)

    monkeypatch.setattr(streaming_runs, "_run", broken)
    options = ["--model", str(tiny_video_folder), *SMALL_CALL, "--json", str(file)]
    with pytest.raises(KeyboardInterrupt):
        run_command(monkeypatch, *options)
    [row] = json.loads(file.read_text())["rows"]
    assert row["refused"] == "failed: RuntimeError: no kernel image"


def test_a_disk_that_is_full_ends_nothing(tiny_video_folder, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measure, "replace_text", full)
    options = ["--model", str(tiny_video_folder), *SMALL_CALL, "--json", str(tmp_path / "s.json")]
    assert run_command(monkeypatch, *options) == 1
    said = capsys.readouterr()
    assert "s.json could not be written" in said.err and "at 12 frames a second" in said.out


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["streaming.py", "--device", "cpu", *arguments])
    return streaming.main()


def test_command(tiny_video_folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    files = ["--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.png")]
    assert run_command(monkeypatch, "--model", str(tiny_video_folder), *SMALL_CALL, *files) == 0
    printed = capsys.readouterr().out
    assert "T=3 A=2 D=2" in printed and "stream, tiles of 2, first alone" in printed
    assert "at 12 frames a second" in printed
    content = json.loads((tmp_path / "s.json").read_text())
    row = content["rows"][-1]
    assert row["frames"] == 9 and row["weights"] == "checkpoint" and row["rate"] == 12
    assert row["first_s"] <= row["plays_from_s"] <= row["latency_s"] == row["arrivals"][-1][0]
    assert row["fps"] == pytest.approx(9 / row["latency_s"])
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_random_weights(monkeypatch, capsys):
    assert run_command(monkeypatch, "--geometry", "tiny-video", *SMALL_CALL) == 0
    assert "tiny-video T=3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rate", "0"], "'0' is no finite number above 0"),
        (["--rate", "inf"], "'inf' is no finite number above 0"),
        (["--cuda-graphs"], "CUDA graphs need a GPU"),
        (["--latents", "0"], "num_frames must be at least 1"),
        (["--geometry", "x"], "no size named 'x'"),
        (["--geometry", "tiny-class"], "takes class labels"),
        (["--geometry", "nova-d48w1024-sd512"], "choose a video model"),
        (["--plot", "x.xyz"], "must end in"),
    ],
)
def test_bad_options(monkeypatch, capsys, tiny_video_folder, arguments, message):
    if "--geometry" not in arguments:
        arguments = ["--model", str(tiny_video_folder), *arguments]
    with pytest.raises(SystemExit) as stopped:
        run_command(monkeypatch, *arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_what_is_wrong_fails(tiny_video_folder, monkeypatch, capsys):
    monkeypatch.setattr(streaming_runs, "_difference", lambda frames, expected: "wrong: so it is")
    assert run_command(monkeypatch, "--model", str(tiny_video_folder), *SMALL_CALL) == 1
    assert capsys.readouterr().out.count("wrong: so it is") == 6


@pytest.mark.gpu
def test_command_on_a_gpu(tiny_video_folder, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["streaming.py", "--model", str(tiny_video_folder), *SMALL_CALL]
    )
    assert streaming.main() == 0
    assert "stream, overlapped" in capsys.readouterr().out
