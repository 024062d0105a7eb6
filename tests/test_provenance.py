"""A summary names the commit of the code, if there is one, and the processor, but not the machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from fdjax import provenance
from fdjax.provenance import commit, cpu_model, processor

git_needed = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder: Path, *arguments: str) -> str:
    """Runs git in `folder`, whatever settings and repositories the surroundings name."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    author = ["-c", "user.name=someone", "-c", "user.email=someone@example.com"]
    command = ["git", *author, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A repository with one commit."""
    folder = tmp_path / "checkout"
    (folder / "package").mkdir(parents=True)
    (folder / "package" / "code.py").write_text("x = 1\n")
    (folder / "notes.txt").write_text("one\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


@git_needed
def test_the_commit_is_that_of_the_checkout(checkout, capfd):
    code = checkout / "package" / "code.py"
    short = git(checkout, "rev-parse", "--short", "HEAD").strip()
    assert commit(code) == short and len(short) >= 7
    git(checkout, "tag", "v1")
    assert commit(code) == short
    (checkout / "untracked.txt").write_text("of no matter")
    assert commit(code) == short
    (checkout / "notes.txt").write_text("two\n")
    assert commit(code) == f"{short}+"
    git(checkout, "add", ".")
    assert commit(code) == f"{short}+"
    git(checkout, "commit", "-q", "-m", "second")
    assert commit(code) not in (short, f"{short}+", None)
    assert capfd.readouterr() == ("", "")


@git_needed
def test_a_package_that_only_lies_in_a_checkout_has_no_commit(checkout, tmp_path, capfd):
    """Such as one installed into .venv there."""
    installed = checkout / ".venv" / "code.py"
    installed.parent.mkdir()
    installed.write_text("")
    assert commit(installed) is None
    (tmp_path / "code.py").write_text("")
    assert commit(tmp_path / "code.py") is None
    assert commit(tmp_path / "nowhere" / "code.py") is None
    assert capfd.readouterr() == ("", "")


@git_needed
def test_the_surroundings_name_no_other_repository(checkout, monkeypatch):
    """Git's hooks run with GIT_DIR and the like set to their own repository."""
    before = commit(checkout / "package" / "code.py")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.setenv(name, "/does/not/exist")
    assert commit(checkout / "package" / "code.py") == before


@git_needed
def test_asking_changes_nothing(checkout):
    index = checkout / ".git" / "index"
    os.utime(checkout / "notes.txt")  # Git would note the new time in its index.
    before = index.read_bytes(), index.stat().st_mtime_ns
    assert commit(checkout / "package" / "code.py")
    assert (index.read_bytes(), index.stat().st_mtime_ns) == before


def test_without_git_or_its_answer_there_is_no_commit(monkeypatch, capfd):
    monkeypatch.setenv("PATH", "/does/not/exist")
    assert commit() is None

    def slow(*_, **__):
        raise subprocess.TimeoutExpired("git", 1)

    monkeypatch.setattr(provenance.subprocess, "run", slow)
    assert commit() is None
    assert capfd.readouterr() == ("", "")


def test_the_processor_is_named_with_its_cores_and_the_machine_is_not():
    assert processor().startswith(f"{cpu_model()}, ")
    assert str(os.cpu_count()) in processor().rpartition(", ")[2] and "core" in processor()
    assert cpu_model() and cpu_model() == " ".join(cpu_model().split())
    assert platform.node() not in processor().split()


def test_cores_that_may_not_be_used_are_told_apart(monkeypatch):
    monkeypatch.setattr(provenance, "cpu_model", lambda: "Some CPU")
    for allowed, cores, expected in ((8, 8, "8 cores"), (2, 8, "2 of 8 cores"), (1, 1, "1 core")):
        monkeypatch.setattr(provenance.os, "cpu_count", lambda cores=cores: cores)
        monkeypatch.setattr(
            provenance.os, "sched_getaffinity", lambda _, allowed=allowed: set(range(allowed)), raising=False
        )
        assert processor() == f"Some CPU, {expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nmodel name\t: Some(R)  CPU  @ 2GHz\nmodel name\t: other\n", "Some(R) CPU @ 2GHz"),
        ("processor\t: 0\nBogoMIPS\t: 50\n", "aarch64"),  # as on ARM
        (None, "aarch64"),
    ],
)
def test_the_name_comes_from_where_linux_has_it(monkeypatch, text, expected):
    def read_text(*_, **__):
        if text is None:
            raise FileNotFoundError
        return text

    monkeypatch.setattr(provenance.Path, "read_text", read_text)
    monkeypatch.setattr(provenance.platform, "processor", lambda: "")
    monkeypatch.setattr(provenance.platform, "machine", lambda: "aarch64")
    assert cpu_model() == expected
