"""Disturbs runs: kills or stops them, starts them twice, or limits their disk; then resumes them."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tools.faults.victims import ROOT, TRAIN, expect, make_run, with_folder
from tools.faults.worker import Worker

KILLS = "a run's process or disk"
_WAYS = ("kill", "kill", "kill", "terminate", "interrupt", "two at once", "full disk", "read-only disk")
# The most seconds that a stop and a run may take.
_STOP_LIMIT, _RUN_LIMIT = 15.0, 300.0
# Bytes of a disk with room for a few checkpoints.
_SMALL_DISK = 1_500_000


def _start(workdir: Path) -> subprocess.Popen:
    command = [sys.executable, f"{ROOT}/train.py", *with_folder(TRAIN[1:], workdir)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def _end(process: subprocess.Popen) -> tuple[int, str]:
    said, _ = process.communicate(timeout=_RUN_LIMIT)
    return process.returncode, said


def _wait_for_a_moment(workdir: Path, rng: random.Random) -> str:
    """Waits until a run has done a random number of steps, and then a random moment longer."""
    steps, rest = rng.randint(0, 8), rng.random() * 1.5
    began = time.monotonic()

    def written() -> int:
        folder = workdir / "checkpoints"
        return max((int(p.name) for p in folder.iterdir() if p.name.isdecimal()), default=0) if folder.exists() else 0

    while written() < 2 * steps and time.monotonic() - began < 60:
        time.sleep(0.01)
    time.sleep(rest)
    return f"{rest:.2f} s after step {2 * steps}"


def _stop(workdir: Path, rng: random.Random, way: str) -> tuple[str, str | None]:
    """Starts a run and stops it; returns when, and what was wrong with its end."""
    process = _start(workdir)
    when = _wait_for_a_moment(workdir, rng)
    if process.poll() is not None:
        return f"{when} (it had finished)", None if process.returncode == 0 else _end(process)[1]
    sent = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}[way]
    began = time.monotonic()
    process.send_signal(sent)
    status, said = _end(process)
    # In the first second a process has Python's own signal handlers, or none.
    expected = {"kill": (-9,), "terminate": (143, -15, 0), "interrupt": (130, -2, 0, 1)}[way]
    if status not in expected:
        return when, f"exit status {status}: {said[-500:]}"
    if time.monotonic() - began > _STOP_LIMIT:
        return when, f"{time.monotonic() - began:.0f} s to stop"
    return when, None


def _two(workdir: Path, rng: random.Random) -> tuple[str, str | None]:
    first = _start(workdir)
    when = _wait_for_a_moment(workdir, rng)
    second = _start(workdir)
    (status, said), (other, message) = _end(first), _end(second)
    if status != 0:
        return when, f"the first ended with {status}: {said[-500:]}"
    if other not in (0, 2) or (other == 2 and "is at work there" not in message):
        return when, f"the second ended with {other}: {message[-500:]}"
    return when, None


def _starved(workdir: Path, rng: random.Random, way: str, disk: Path) -> tuple[str, str | None]:
    """Executes a run on a small disk, or on one that becomes read-only; then moves its files to a large one."""
    size = _SMALL_DISK + rng.randrange(_SMALL_DISK)
    disk.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size if way == 'full disk' else 1 << 28}", "tmpfs", str(disk)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        return "no disk could be mounted here", None
    try:
        process, when = _start(disk / "run"), f"{size} bytes"
        if way == "read-only disk":
            when = _wait_for_a_moment(disk / "run", rng)
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=False, capture_output=True)
        status, said = _end(process)
        problem = None
        if status not in (0, 1, 2) or "Traceback" in said or (status and "error: " not in said):
            problem = f"exit status {status}: {said[-700:]}"
        if (disk / "run").exists():
            shutil.copytree(disk / "run", workdir)
        return when, problem
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False, capture_output=True)


def try_kills(seed: int, stage: Path, worker: Worker) -> dict[str, Any]:
    """Disturbs a process or a disk once, gives the same command again, and compares the weights with the right ones."""
    make_run(stage, worker)
    rng, way, began = random.Random(f"kills {seed}"), _WAYS[seed % len(_WAYS)], time.monotonic()
    workdir = stage / "killed"
    shutil.rmtree(workdir, ignore_errors=True)
    if way == "two at once":
        when, problem = _two(workdir, rng)
    elif "disk" in way:
        when, problem = _starved(workdir, rng, way, stage / "disk")
    else:
        when, problem = _stop(workdir, rng, way)
    said = ""
    if problem is None:
        again = worker.run(*with_folder(TRAIN, workdir))
        said, problem = again.err[-500:], again.problem()
        if problem is None and again.status:
            problem = f"it does not go on: {again.err.strip()[-500:]}"
        elif problem is None:
            right = expect(worker, "weights", str(stage / "run")).out
            if worker.run("weights", str(workdir)).out != right:
                problem = "other weights than the undisturbed run's"
    return {
        "victim": KILLS, "seed": seed, "damage": f"{way}, {when}", "command": "train", "problem": problem,
        "result": "wrong" if problem else "right", "said": said.replace(str(stage), "."),
        "seconds": round(time.monotonic() - began, 2),
    }  # fmt: skip
