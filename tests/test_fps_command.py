"""The command benchmarks/fps.py: what its options are for, its files, how it ends."""

import json
import sys

import fps
import fps_measure
import measure
import pytest
import torch
from calls import Calls
from ceilings import Ceilings
from fps_samplers import (
    EXACT,
    EXACT_COMPILED,
    GRAPHS,
    GRAPHS_COMPILED,
    PLAIN,
    PLAIN_COMPILED,
    TUNED,
)
from fps_workloads import Workload
from reference_package import DIFFNEXT
from test_fps import wrong_sampler

from nova.errors import DependencyError
from nova.plain_sampling import generate_frames_plain
from nova_kernels.dispatch import VARIABLE

TINY = ("--geometry", "tiny-video", "--steps", 2, "--diffusion-steps", 2, "--repeats", 1)


@pytest.fixture
def run(monkeypatch):
    """Runs the command on the CPU; ceilings of small matrices take no time."""
    monkeypatch.setattr("ceilings.MATRIX_SIDE", {"cpu": 64})

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["fps.py", "--device", "cpu", *map(str, words)])
        return fps.main()

    return run


# Options ------------------------------------------------------------------------------------------

# Option with its words -> what it is called where it arrives, and its value there.
OF_WORKLOADS = {
    ("--geometry", "a", "b"): ("geometries", ["a", "b"]),
    ("--model", "m"): ("model", "m"),
    ("--batch", 3, 5): ("batches", [3, 5]),
    ("--text",): ("text", True),
    ("--no-vae",): ("vae", False),
    ("--latents", 7): ("num_frames", 7),
    ("--steps", 11): ("num_steps", 11),
    ("--diffusion-steps", 13): ("num_diffusion_steps", 13),
    ("--sets", 17): ("num_sets", 17),
    ("--run-latents", 19): ("run_frames", 19),
    ("--repeats", 23): ("repeats", 23),
}
OF_SAMPLERS = {
    ("--compile",): ("compiled", True),
    ("--reference-ops",): ("reference_ops", True),
    ("--progress",): ("progress", True),
    ("--tune",): ("tuned", True),
    ("--against", DIFFNEXT): ("against_diffnext", True),
}
OF_MEASURING = {
    ("--dtype", "bfloat16"): ("dtype", torch.bfloat16),
    ("--backend", "reference"): ("backend", "reference"),
    ("--no-stages",): ("stages", False),
    ("--seconds", 2.5): ("seconds", 2.5),
}
OPTIONS = OF_WORKLOADS | OF_SAMPLERS | OF_MEASURING
# What arrives of each with no option at all, on a CPU.
DEFAULTS = dict.fromkeys((name for name, _ in OF_WORKLOADS.values()), None) | {
    **dict.fromkeys((name for name, _ in OF_SAMPLERS.values()), False),
    **{"dtype": torch.float32, "backend": "auto", "stages": True, "seconds": 20.0},
}


@pytest.fixture
def arrived(monkeypatch, run):
    """Runs the command without measuring; what arrived of its options, by name."""
    ceilings = Ceilings(rate=1e9, bandwidth=1e9)
    monkeypatch.setattr(fps, "measure_ceilings", lambda *_: ceilings)
    monkeypatch.setattr(fps, "import_reference", lambda: None)
    workload = Workload("tiny-video", 2, 3, num_diffusion_steps=2, batches=(1,))
    workloads = Calls(monkeypatch, fps, "choose_workloads", [workload])
    samplers = Calls(monkeypatch, fps, "make_samplers", {"a": None})
    measuring = Calls(monkeypatch, fps, "measure", [])

    def arrived(*words):
        assert run(*words) == 1  # nothing was measured
        (kind,), of_workloads = workloads.pop()
        (device,), of_samplers = samplers.pop()
        given, of_measuring = measuring.pop()
        assert kind == device.type == of_measuring.pop("device").type == "cpu"
        assert given == (workload, 1, {"a": None}, ceilings)
        for callback in ("say", "keep"):
            assert callable(of_measuring.pop(callback))
        return of_workloads | of_samplers | of_measuring

    return arrived


@pytest.mark.parametrize("words", OPTIONS, ids=str)
def test_an_option_changes_what_it_is_for_alone(arrived, words):
    name, value = OPTIONS[words]
    # Who says how many runs there are does not have them cut short.
    others = {"seconds": None} if name == "repeats" else {}
    assert arrived(*words) == DEFAULTS | others | {name: value}


def test_every_option_is_tested():
    tested = {words[0] for words in OPTIONS}
    tested |= {"--device", "--json", "--plot", "--help"}  # by the tests below
    for action in fps.build_parser()._actions:
        assert tested & set(action.option_strings), action.option_strings


@pytest.mark.parametrize(
    "words, message",
    [
        (["--geometry", "tiny-class"], "takes class labels"),
        (["--batch", "0"], "batches must be at least 1"),
        (["--model", "shapes", "--geometry", "small-video"], "not both"),
        (["--seconds", "nan"], "'nan' is no finite number above 0"),
        (["--device", "tpu"], "'tpu' is no device"),
    ],
)
def test_bad_options(run, capsys, words, message):
    with pytest.raises(SystemExit):
        run(*words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_that_cannot_run(run, monkeypatch, capsys, backend):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # else Triton runs on CPUs too
    assert run(*TINY, "--batch", 1, "--backend", backend) == 1
    assert "cannot run: " in capsys.readouterr().err


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_files_that_cannot_be_written_are_refused_before_measuring(
    run, monkeypatch, capsys, tmp_path, option
):
    if option == "--plot":
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(fps, "measure_ceilings", None)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    for target in ("folder.png", "file/fps.png", f"{'long' * 99}.png"):
        path = tmp_path / target
        with pytest.raises(SystemExit):
            run(option, path)
        assert f"{path} cannot be written: " in capsys.readouterr().err


def test_checking_a_file_changes_nothing(tmp_path):
    there, new = tmp_path / "there.json", tmp_path / "folder" / "new.json"
    there.write_text("earlier")
    fps.check_file(there)
    fps.check_file(new)
    assert there.read_text() == "earlier" and not new.exists()


def test_an_end_that_is_not_well_loses_no_rows(run, monkeypatch, tmp_path):
    def broken(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(fps_measure, "stage_seconds", broken)
    monkeypatch.setattr(fps, "is_lost", lambda device: True)
    path = tmp_path / "fps.json"
    with pytest.raises(RuntimeError, match="illegal"):
        run(*TINY, "--batch", 1, 2, "--json", path)
    rows = json.loads(path.read_text())["rows"]
    assert [(row["sampler"], row["batch"]) for row in rows] == [(PLAIN, 1), (EXACT, 1)]


def test_a_disk_that_is_full_ends_nothing(run, monkeypatch, tmp_path, capsys):
    write, path, full = measure.replace_text, tmp_path / "fps.json", [False]

    def replace_text(path, text):
        if full[0]:
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(measure, "replace_text", replace_text)
    assert run(*TINY, "--batch", 1, "--json", path) == 0
    earlier, full[0] = path.read_text(), True
    capsys.readouterr()
    assert run(*TINY, "--batch", 1, "--json", path) == 1
    said = capsys.readouterr()
    assert f"{path} could not be written: [Errno 28] No space left" in said.err
    assert "Stages of the exact sampler" in said.out and path.read_text() == earlier


# Whole commands -----------------------------------------------------------------------------------


def test_command(run, tmp_path, monkeypatch, capsys):
    file = tmp_path / "fps.json"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setenv(VARIABLE, "reference")
    assert run(*TINY, "--batch", 1, 2, "--latents", 2, "--json", file) == 0
    assert not torch.backends.cudnn.allow_tf32
    content = json.loads(file.read_text())
    assert [row["batch"] for row in content["rows"]] == [1, 1, 2, 2]
    assert {row["backend"] for row in content["rows"]} == {"reference"}
    assert content["machine"]["matmul_TFLOP_per_s"] > 0
    printed = capsys.readouterr()
    assert "Stages of the exact sampler" in printed.out
    # Of a batch size at once; all tables come in the end.
    plain, exact = (f"{row['fps']:.3g}" for row in content["rows"][2:])
    assert f"  frames a second: plain {plain}; exact {exact}\n" in printed.err


def test_it_fails_where_a_sampler_is_wrong(run, monkeypatch):
    monkeypatch.setattr("fps_samplers.generate_frames", wrong_sampler)
    assert run(*TINY, "--batch", 1) == 1


def test_it_goes_on_where_memory_is_short(run, monkeypatch, capsys):
    def plain(model, conditioning, **options):
        if conditioning.batch_size > 1:
            raise torch.OutOfMemoryError
        return generate_frames_plain(model, conditioning, **options)

    monkeypatch.setattr("fps_samplers.generate_frames_plain", plain)
    assert run(*TINY, "--batch", 1, 2) == 0
    said = capsys.readouterr()
    assert "batch 2 ...\nnot enough memory" in said.err and "Stages of the exact" in said.out
    assert run(*TINY, "--batch", 2) == 1


@pytest.mark.parametrize(
    "error, told",
    [
        (DependencyError("decoding needs a package"), "cannot be measured: "),
        (RuntimeError("CUDA error: no kernel image"), "Traceback"),
    ],
    ids=["package", "kernel"],
)
def test_it_goes_on_where_a_geometry_cannot_be_measured(run, monkeypatch, capsys, error, told):
    measured = fps.measure

    def measure(workload, *given, **options):
        if workload.geometry == "small-video":
            raise error
        return measured(workload, *given, **options)

    monkeypatch.setattr(fps, "measure", measure)
    geometries = ["--geometry", "tiny-video", "small-video", "--batch", 1]
    assert run(*geometries, *TINY[2:]) == 1
    said = capsys.readouterr()
    assert told in said.err and str(error) in said.err
    assert "tiny-video T=" in said.out


@pytest.mark.gpu
@pytest.mark.slow
def test_command_on_a_gpu(tmp_path, monkeypatch):
    file = tmp_path / "fps.json"
    command = "fps.py --geometry tiny-video --batch 1 --steps 4 --repeats 1 --dtype float32"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--json", str(file)])
    monkeypatch.setenv("NOVA_CACHE", str(tmp_path / "cache"))
    assert fps.main() == 0
    content = json.loads(file.read_text())
    samplers = [PLAIN, PLAIN_COMPILED, EXACT, EXACT_COMPILED, GRAPHS, GRAPHS_COMPILED, TUNED]
    assert [row["sampler"] for row in content["rows"]] == samplers
