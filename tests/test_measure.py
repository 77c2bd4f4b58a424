"""benchmarks/measure.py and scripts/measure_gpu.sh: which code a result is of, files, Ctrl-C."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import measure
import pytest
from replace_text import replace_text


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of one commit with one file, in place of this one."""
    (tmp_path / "file").write_text("first")
    settings = ("user.name=a", "user.email=a@example.org", "commit.gpgsign=false")
    options = [part for setting in settings for part in ("-c", setting)]
    for arguments in (("init",), ("add", "file"), (*options, "commit", "-m", "first")):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.delenv("NOVA_COMMIT", raising=False)
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    return tmp_path


def test_commit_and_whether_files_differ_from_it(repository, monkeypatch):
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, cwd=repository, capture_output=True, text=True).stdout.strip()
    (repository / "results.json").write_text("not a part of it")
    assert measure.commit() == commit != ""
    (repository / "file").write_text("changed")
    assert measure.commit() == f"{commit}+"
    monkeypatch.setenv("NOVA_COMMIT", "abc1234")
    assert measure.commit() == "abc1234"


def test_commit_outside_of_git(tmp_path, monkeypatch):
    monkeypatch.delenv("NOVA_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    assert measure.commit() == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure.commit() == "unknown"


def test_the_command_of_a_results_file_can_be_run_again(tmp_path, monkeypatch):
    words = ["--model", "a folder/it's"]
    monkeypatch.setattr(sys, "argv", ["fps.py", *words])
    measure.write_rows(tmp_path / "new" / "x.json", "fps.py", {}, [])
    command = json.loads((tmp_path / "new" / "x.json").read_text())["command"]
    assert shlex.split(command) == ["python", "benchmarks/fps.py", *words]


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    file, link = tmp_path / "x.json", tmp_path / "link.json"
    file.write_text("old")
    link.symlink_to(file)
    replace_text(link, "new")
    assert link.is_symlink() and file.read_text() == "new"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", failing)
        with pytest.raises(OSError, match="full"):
            replace_text(file, "newer")
    assert file.read_text() == "new" and sorted(tmp_path.iterdir()) == [link, file]


def failing(*arguments):
    raise OSError("the disk is full")


def test_what_is_no_file_is_not_replaced():
    replace_text(Path(os.devnull), "text")
    assert Path(os.devnull).is_char_device()


# In place of Python: a step that waits for a process of its own, and ends well when interrupted.
STEP = """\
#!{python}
import signal, subprocess, sys
if sys.argv[1] == "-c":
    sys.exit(1)
signals = []
signal.signal(signal.SIGINT, lambda number, frame: signals.append(number))
child = subprocess.Popen(["sleep", "60"])
print("it runs", flush=True)
print(f"{{child.wait()}} for the child, {{signals[0]}} for the step", flush=True)
"""


def test_ctrl_c_reaches_the_running_step(tmp_path):
    python, log = tmp_path / "python", tmp_path / "out" / "denoise.log"
    python.write_text(STEP.format(python=sys.executable))
    python.chmod(0o755)
    script = subprocess.Popen(
        ["sh", "scripts/measure_gpu.sh", str(tmp_path / "out"), "denoise", "roofline"],
        cwd=Path(measure.ROOT),
        env={**os.environ, "PYTHON": str(python)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests may ignore it
    )
    try:
        deadline = time.monotonic() + 30
        while not (log.exists() and "it runs" in log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(script.pid, signal.SIGINT)  # as a terminal does
        assert script.wait(timeout=30) == 130
    finally:
        if script.poll() is None:
            os.killpg(script.pid, signal.SIGKILL)
    assert "-2 for the child, 2 for the step" in log.read_text()
    assert not (tmp_path / "out" / "roofline.log").exists()


# In place of Python: there is a GPU, everything ends well, and the extension is not there.
WITHOUT_EXTENSION = """\
#!/bin/sh
case "$2" in
*get_device_capability*) echo 90 ;;
*extension.obstacle*) echo "it is not built" >&2; exit 1 ;;
esac
"""


@pytest.mark.parametrize("wanted", ["1", "0"])
def test_figures_without_the_extension_are_no_success(tmp_path, wanted):
    python = tmp_path / "python"
    python.write_text(WITHOUT_EXTENSION)
    python.chmod(0o755)
    script = subprocess.run(
        ["sh", "scripts/measure_gpu.sh", str(tmp_path / "out"), "roofline"],
        cwd=Path(measure.ROOT),
        env={**os.environ, "PYTHON": str(python), "NOVA_CUDA": wanted},
        capture_output=True,
        text=True,
    )
    if wanted == "0":
        assert script.returncode == 0 and "failed" not in script.stdout
    else:
        assert script.returncode == 1 and "it is not built" in script.stderr
        assert "failed: (measured without the CUDA extension)" in script.stdout
