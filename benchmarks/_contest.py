"""Shared by the benchmarks: workers that take turns, their rows, the description of the machine, and the flags."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from _worker import Case, Facts

from fdjax.errors import UserError
from fdjax.provenance import cpu_model
from fdjax.runtime import CACHE_VARIABLE

HERE = Path(__file__).resolve().parent
NETWORKS = ("mobilenetv2_cifar10", "resnet20", "resnet56")
DTYPES = ("float32", "bfloat16")
ALLOCATORS = ("default", "tuned")
STEPS = ("weights", "masks", "masks_tied", "masks_channels", "masks_one_sided")
MIN_RESOLUTION = 8
# A pause between turns, because the last worker's threads spin for a moment before they sleep.
PAUSE_S = 0.05
# Environment variables that change what is measured.
TELLING_VARIABLES = (
    "GLIBC_TUNABLES", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_PLATFORMS", "LD_PRELOAD", "MALLOC_ARENA_MAX",
    "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "OMP_WAIT_POLICY", "XLA_FLAGS",
)  # fmt: skip

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Measured:
    """The results of one worker: seconds per step of every round, its facts, and its peak memory."""

    case: Case
    times: tuple[float, ...]
    facts: Facts
    peak_mb: float

    @property
    def median(self) -> float:
        """Median of the seconds per step."""
        return statistics.median(self.times)


class Worker:
    """A process that executes one case; leaving the context ends it."""

    def __init__(self, case: Case) -> None:
        """Starts the process and waits until it is warmed up."""
        self.case = case
        self.times: list[float] = []
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "_worker.py"), json.dumps(dataclasses.asdict(case))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_worker_environment(case),
            process_group=0,  # Ctrl-C then reaches this process only, which ends its workers.
        )
        try:
            self.facts: Facts = json.loads(self._answer().removeprefix("READY"))
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def turn(self) -> None:
        """Lets the worker take one turn."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # If the worker has died, reading its answer reports it.
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        self.times.append(float(self._answer()))

    def finish(self) -> Measured:
        """Reads the worker's peak memory and lets it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return Measured(self.case, tuple(self.times), self.facts, float(self._answer()))

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return line
        status = self._process.wait()
        case = self.case
        what = f"{case.engine}, {case.step}, width {case.width}, batch {case.batch}"
        cause = " (killed: out of memory?)" if status == -signal.SIGKILL else ""
        raise UserError(f"the worker of {what} ended with status {status}{cause}")

    def _end(self) -> None:
        self._process.kill()
        with contextlib.suppress(BrokenPipeError), self._process:  # Closes the pipes and waits.
            pass


def _worker_environment(case: Case) -> dict[str, str]:
    """Returns an environment without compilation cache, with the case's number of threads, and with this fdjax."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    path = os.pathsep.join(filter(None, [str(HERE.parent), environment.get("PYTHONPATH")]))
    return {**environment, CACHE_VARIABLE: "", "NPROC": str(case.threads), "PYTHONPATH": path}


def run_contest(cases: Sequence[Case], rounds: int) -> dict[Case, Measured]:
    """Measures cases in alternation: in every round each takes a turn while the others are idle."""
    with contextlib.ExitStack() as stack:
        # Workers start one after the other, so that no two compile at the same time.
        workers = [stack.enter_context(Worker(case)) for case in cases]
        sizes = {worker.facts["parameters"] for worker in workers}
        if len(sizes) != 1:
            raise RuntimeError(f"the networks differ: they have {sorted(sizes)} parameters")
        for number in range(rounds):
            # The order alternates, so that a worker does not always follow the same one.
            for worker in workers if number % 2 == 0 else reversed(workers):
                time.sleep(PAUSE_S)
                worker.turn()
        return {worker.case: worker.finish() for worker in workers}


def make_row(ours: Measured, weights: Measured, torch: Measured | None) -> Row:
    """Makes the row of `ours`, relative to the weight step and PyTorch's step of the same contest."""
    case = ours.case
    return {
        **{field: value for field, value in dataclasses.asdict(case).items() if field not in ("engine", "seed")},
        "images_per_s": case.batch / ours.median,
        "torch_images_per_s": case.batch / torch.median if torch else None,
        "ratio": torch.median / ours.median if torch else None,
        "relative_to_weights": ours.median / weights.median,
        "step_ms_median": 1e3 * ours.median,
        "step_ms_min": 1e3 * min(ours.times),
        "step_ms_max": 1e3 * max(ours.times),
        "torch_step_ms_median": 1e3 * torch.median if torch else None,
        "compile_s": ours.facts["compile_s"],
        "peak_mb": ours.peak_mb,
        "torch_peak_mb": torch.peak_mb if torch else None,
        "device": ours.facts["device"],
        "torch_device": torch.facts["device"] if torch else None,
    }


# Heading, field, format and width of each column of the table.
_COLUMNS = (
    ("width", "width", "g", 5), ("batch", "batch", "d", 5), ("res.", "resolution", "d", 4), ("block", "block", "d", 5),
    ("dtype", "dtype", "s", 8), ("alloc.", "allocator", "s", 7), ("step", "step", "s", 15),
    ("ms/step", "step_ms_median", ".1f", 9), ("images/s", "images_per_s", ".0f", 8),
    ("torch", "torch_images_per_s", ".0f", 7), ("x torch", "ratio", ".2f", 7),
    ("x weights", "relative_to_weights", ".2f", 9), ("compile s", "compile_s", ".1f", 9),
    ("peak MB", "peak_mb", ".0f", 7),
)  # fmt: skip


def print_heading() -> None:
    """Prints the first line of the table."""
    print("  ".join(f"{heading:>{width}}" for heading, _, _, width in _COLUMNS), flush=True)


def print_row(row: Row) -> None:
    """Prints a line of the table."""
    cells = ["-" if row[field] is None else format(row[field], form) for _, field, form, _ in _COLUMNS]
    print("  ".join(f"{cell:>{column[3]}}" for cell, column in zip(cells, _COLUMNS, strict=True)), flush=True)


def new_report(flags: argparse.Namespace) -> dict[str, Any]:
    """Makes the report for --json, without rows; the names of the output files are left out of its settings."""
    settings = {name: value for name, value in vars(flags).items() if name not in ("json", "picture")}
    return {"machine": describe_machine(), "settings": settings, "rows": []}


def measure_rows(
    flags: argparse.Namespace, columns: Sequence[str], points: Iterable[tuple], measure: Callable[[tuple], Row]
) -> None:
    """Measures every point in this process; prints each row and rewrites the JSON file after it."""
    from fdjax import runtime
    from fdjax.commands.output_files import write_report

    runtime.limit_threads(flags.threads)
    runtime.setup()
    report, width = new_report(flags), max(map(len, columns))
    print("  ".join(f"{name:>{width}}" for name in columns))
    for point in points:
        row = measure(point)
        cells = [f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for name in columns]
        print("  ".join(f"{cell:>{width}}" for cell in cells), flush=True)
        report["rows"].append(row)
        write_report(flags.json, report)


def describe_machine() -> dict[str, Any]:
    """Returns processor, versions and date, without importing jax or torch."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cores_allowed": allowed_cores(),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6,
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("jax", "jaxlib", "flax", "torch", "onnxruntime")},
        "environment": {name: os.environ[name] for name in TELLING_VARIABLES if name in os.environ},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def allowed_cores() -> int:
    """Returns the number of cores that this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        raise UserError("the benchmarks need Linux, because they bind every worker to processor cores")
    return len(os.sched_getaffinity(0))


class Parser(argparse.ArgumentParser):
    """A parser of flags whose errors are `UserError`."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """Returns a flag's type: an integer from `low` to `high`."""

    def convert(text: str) -> int:
        accepted = f"an integer, at least {low}" if high is None else f"an integer from {low} to {high}"
        if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
            raise argparse.ArgumentTypeError(f"give {accepted}, not {text!r}")
        return int(text)

    return convert


def width_multiplier(text: str) -> float:
    """A flag's type: a width that `ModelConfig` accepts."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 10:
        raise argparse.ArgumentTypeError(f"give a multiplier above 0 and at most 10, not {text!r}")
    return value


def share(text: str) -> float:
    """A flag's type: a share above 0 and at most 1."""
    value = float(text) if text.replace(".", "", 1).isdecimal() else 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"give a share above 0 and at most 1, not {text!r}")
    return value


def output_file(text: str) -> str:
    """A flag's type: a file that can be written; it is checked before the work."""
    file = Path(text).resolve()
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: give a file that can be written, in a directory that exists")
    return text


def add_shared_flags(parser: Parser) -> None:
    """Adds the flags of every benchmark."""
    cores = allowed_cores()
    parser.add_argument("--threads", type=integer(1, cores), default=cores, help="number of processor cores")
    parser.add_argument("--rounds", type=integer(1), default=15, help="number of turns of every contestant")
    parser.add_argument("--seed", type=integer(0, 2**31 - 1), default=0, help="seed of weights, masks and images")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="file to write settings and rows to")
