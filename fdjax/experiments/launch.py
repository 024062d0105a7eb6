"""Executes the runs of a sweep as processes, several at a time, each on its share of the processor cores."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from fdjax.data import check_source
from fdjax.errors import UserError
from fdjax.experiments.collect import PICTURE_FILES, TABLE_FILES, read_run, write_tables
from fdjax.experiments.sweep import PlannedRun
from fdjax.reports import Result, plot_pareto
from fdjax.training.progress import duration

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE, PARETO_FILE = "sweep.lock", "pareto.png"
_POLL_SECONDS = 0.1
# Seconds that processes have to end after an interruption. Ctrl-C in a terminal reaches them, too, and a second signal
# would interrupt the save that the first one caused.
_PATIENCE_SECONDS, _GRACE_SECONDS = 6.0, 60.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a sweep.

    Attributes:
      results: all finished runs, also those that were finished before.
      failed: run -> why it has no result.
      written: paths of the tables and plots.
    """

    results: list[Result]
    failed: dict[str, str]
    written: list[Path]


class _Going(NamedTuple):
    """A run in progress, with its process and its share of the cores."""

    run: PlannedRun
    process: subprocess.Popen[bytes]
    share: tuple[int, ...] | None
    began: float


def check_data(runs: Sequence[PlannedRun]) -> None:
    """Raises `UserError` if the data set of an unfinished run is missing."""
    first: dict[tuple[str, str | None], str] = {}
    for run in runs:
        if not run.is_finished():
            first.setdefault((run.config.data.name, run.config.data.path), run.name)
    for (name, path), run in first.items():
        try:
            check_source(name, path)
        except UserError as error:
            raise UserError(f"run {run!r}: {error}") from error


def core_shares(cores: Sequence[int], jobs: int) -> list[tuple[int, ...]]:
    """Returns the cores of each job: equal shares, or with fewer cores than jobs one core each, which jobs share."""
    if len(cores) < jobs:
        return [(cores[job % len(cores)],) for job in range(jobs)]
    ends = [job * len(cores) // jobs for job in range(jobs + 1)]
    return [tuple(cores[first:last]) for first, last in pairwise(ends)]


def run_sweep(
    runs: Sequence[PlannedRun],
    folder: Path,
    command: Sequence[str],
    jobs: int = 1,
    say: Callable[[str], Any] = print,
) -> Outcome:
    """Executes the unfinished runs, then writes the tables and plots of all finished runs.

    A run that fails stops only those that start from it.

    Args:
      runs: the runs of `plan_sweep`.
      folder: directory of their workdirs.
      command: the command of a process; a run's arguments are appended.
      jobs: number of runs at a time; on Linux they share the cores of this process evenly.
      say: is called with each line of progress.

    Raises:
      UserError: if another sweep is at work there, or the directory has files that no sweep wrote (nothing has been
        written then), or a file cannot be written.
      KeyboardInterrupt: on an interruption or SIGTERM; the processes have ended.
    """
    with _locked(folder) as lock, _terminable():
        try:
            failed = _Scheduler(runs, command, jobs, lock, say).work()
            return _collect(runs, folder, failed)
        except OSError as error:
            raise UserError(
                f"--workdir {folder}: {error.strerror}: {error.filename}; the same command goes on"
            ) from error


class _Scheduler:
    """Starts the runs in order, each when there is room and the run that it starts from is finished."""

    def __init__(
        self, runs: Sequence[PlannedRun], command: Sequence[str], jobs: int, lock: int | None, say: Callable[[str], Any]
    ):
        self._command, self._lock, self._say = command, lock, say
        self._finished = {run.name for run in runs if run.is_finished()}
        self._waiting = [run for run in runs if run.name not in self._finished]
        self._going: list[_Going] = []
        self._failed: dict[str, str] = {}
        self._total = len(runs)
        self._jobs = jobs = max(1, min(jobs, len(self._waiting)))
        pinned = jobs > 1 and hasattr(os, "sched_setaffinity")
        self._free: list[tuple[int, ...] | None] = (
            [*core_shares(sorted(os.sched_getaffinity(0)), jobs)] if pinned else [None] * jobs
        )

    def work(self) -> dict[str, str]:
        """Works until nothing is left to do; returns the runs that failed, and why."""
        begun = sum(run.is_begun() for run in self._waiting)
        self._say(
            f"{self._total} runs: {len(self._finished)} finished, {begun} to go on with, "
            f"{len(self._waiting) - begun} to start; {self._jobs} at a time"
        )
        try:
            while self._waiting or self._going:
                self._give_up()
                self._start_ready()
                self._reap()
                if self._going:
                    time.sleep(_POLL_SECONDS)
        except BaseException:
            self._stop()
            raise
        return self._failed

    def _give_up(self) -> None:
        """Gives up runs that start from a failed run."""
        for run in list(self._waiting):
            if run.after in self._failed:
                self._waiting.remove(run)
                self._fail(run, f"not started: {run.after}, which it starts from, has failed")

    def _start_ready(self) -> None:
        for run in list(self._waiting):
            if not self._free:
                return
            if run.after is None or run.after in self._finished:
                self._waiting.remove(run)
                self._start(run, self._free.pop(0))

    def _start(self, run: PlannedRun, share: tuple[int, ...] | None) -> None:
        again = run.is_begun()
        with run.log.open("ab") as log, _pinned(share):
            process = subprocess.Popen(
                [*self._command, *run.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A run that outlives this process then still holds the lock of the directory.
                pass_fds=() if self._lock is None else (self._lock,),
            )
        self._going.append(_Going(run, process, share, time.monotonic()))
        where = f", on core{'s' if len(share) > 1 else ''} {', '.join(map(str, share))}" if share else ""
        self._say(f"{run.name}: {'goes on' if again else 'started'}{where}; log: {run.log}")

    def _reap(self) -> None:
        for going in list(self._going):
            status = going.process.poll()
            if status is None:
                continue
            self._going.remove(going)
            self._free.append(going.share)
            run, took = going.run, duration(time.monotonic() - going.began)
            if status == 0 and run.is_finished():
                self._finished.add(run.name)
                done = len(self._finished) + len(self._failed)
                self._say(f"[{done}/{self._total}] {run.name}: finished after {took}; {_result_words(run)}")
            elif status == 0:
                self._fail(run, "its process ended well, but left no result of this config")
            else:
                ended = f"exit status {status}" if status > 0 else f"ended by signal {-status}"
                self._fail(run, f"{ended} after {took}: {_last_line(run.log)} (log: {run.log})")

    def _fail(self, run: PlannedRun, why: str) -> None:
        self._failed[run.name] = why
        self._say(f"[{len(self._finished) + len(self._failed)}/{self._total}] {run.name}: FAILED, {why}")

    def _stop(self) -> None:
        """Waits for the processes to end, then interrupts and finally kills those that are left."""
        left = [going.process for going in self._going]
        if left:
            self._say(f"stopping; waiting for {len(left)} {'run' if len(left) == 1 else 'runs'} to end")
        try:
            left = _ended(left, _PATIENCE_SECONDS)
            # If SIGINT is ignored, as for a shell's background jobs, the processes ignore it, too.
            ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            for process in left:
                process.send_signal(signal.SIGTERM if ignored else signal.SIGINT)
            left = _ended(left, _GRACE_SECONDS)
        except KeyboardInterrupt:  # A second interruption ends the processes at once.
            pass
        for process in left:
            process.kill()
            process.wait()


def _ended(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> list[subprocess.Popen[bytes]]:
    """Waits for processes; returns those that have not ended after `seconds`."""
    until = time.monotonic() + seconds
    left = [process for process in processes if process.poll() is None]
    while left and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
        left = [process for process in left if process.poll() is None]
    return left


def _result_words(run: PlannedRun) -> str:
    try:
        result = _read(run)
    except UserError as error:
        return str(error)
    top1 = result.pruned_top1 if result.pruned_top1 is not None else result.dense_top1
    return f"{100 * (top1 or 0.0):.2f}% top-1 at {result.macs_ratio:.3f}x MACs"


def _read(run: PlannedRun) -> Result:
    return read_run(run.workdir, str(run.workdir), "the same command does it").result


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def _collect(runs: Sequence[PlannedRun], folder: Path, failed: dict[str, str]) -> Outcome:
    results, failed = [], dict(failed)
    for run in runs:
        if run.name in failed:
            continue
        try:
            results.append(_read(run))
        except UserError as error:
            failed[run.name] = str(error)
    if not results:
        return Outcome(results, failed, [])
    written = write_tables(results, folder)
    return Outcome(results, failed, [*written, plot_pareto(results, folder / PARETO_FILE)])


@contextlib.contextmanager
def _pinned(share: Sequence[int] | None) -> Iterator[None]:
    """Restricts processes that are started inside to some cores; no code may run between fork and exec."""
    if share is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, share)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int | None]:
    """Makes and locks a sweep's directory against other sweeps; yields the lock's file descriptor."""
    file = folder / LOCK_FILE
    foreign = [name for name in (*TABLE_FILES, *PICTURE_FILES, PARETO_FILE) if (folder / name).exists()]
    if foreign and not file.exists():
        raise UserError(f"--workdir {folder} holds {', '.join(foreign)} that no sweep has written; give another one")
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        file.touch()
        yield None
        return
    with file.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"--workdir {folder}: another sweep, or a run that it has left behind, is at work there; wait for it, "
                "or end it"
            ) from error
        yield stream.fileno()


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Treats SIGTERM as an interruption, so that the processes are ended, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
