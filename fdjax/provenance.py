"""What a result depends on besides its config: the commit of the code, and the processor. Does not import jax."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from pathlib import Path

# Git sets these variables for its hooks and aliases; they may point to a repository other than the file's.
_REPOSITORY_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
_GIT_SECONDS = 20.0


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit(file: Path = Path(__file__)) -> str | None:
    """Returns the short hash of the commit of the git checkout that tracks `file`, with a + if tracked files changed.

    Returns None if no checkout tracks the file (as in an installed package, even inside another project's checkout), or
    if git is missing or fails.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _REPOSITORY_VARIABLES}

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=file.parent,
            env={**environment, "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            text=True,
            errors="replace",
            timeout=_GIT_SECONDS,
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "--", file.name)
        # Unlike `git describe --dirty`, this leaves the index alone.
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_model() -> str:
    """Returns the processor's name, or its architecture if the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return " ".join((names[0] if names else platform.processor()).split()) or platform.machine()


def processor() -> str:
    """Returns the processor's name and the number of its cores, or how many of them this process may use."""
    cores = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    number = f"{cores} core" if allowed == cores else f"{allowed} of {cores} core"
    return f"{cpu_model()}, {number}{'' if cores == 1 else 's'}"
