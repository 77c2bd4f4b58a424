"""benchmarks/measure.py: which code a result is of."""

import subprocess

import measure
import pytest


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
