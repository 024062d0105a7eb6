"""`fdjax sweep`: trains many runs from one description."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fdjax.commands.arguments import check_at_least_one, parse_arguments
from fdjax.errors import UserError

# A run's process executes train.py's command from the package that this process has loaded, installed or not.
_TRAIN = (
    "import sys; sys.path.insert(0, {package!r}); from fdjax import runtime; runtime.setup(); "
    "from fdjax.commands.train import train_command; sys.exit(train_command())"
)


@dataclasses.dataclass(kw_only=True)
class SweepArguments:
    """Trains many runs from one description, several at a time, each in its own process and workdir.

    After an interruption the same command goes on: it skips finished runs and resumes interrupted ones.
    """

    config: str
    """Sweep file: Python with get_sweep(), such as configs/sweeps/quickstart.py."""
    workdir: str
    """Directory of the sweep. DIR/NAME is the workdir of run NAME, DIR/NAME.txt its log; tables and plots lie beside
    them."""
    jobs: int = 1
    """Number of runs at a time; on Linux they share the processor cores evenly."""
    dry_run: bool = False
    """Print the runs and the arguments that train.py would get, and do nothing."""


def train_process() -> list[str]:
    """Returns the command of a training process; the arguments of train.py follow it."""
    return [sys.executable, "-c", _TRAIN.format(package=str(Path(__file__).resolve().parents[2]))]


def sweep_command(arguments: Sequence[str], command: Sequence[str] | None = None) -> int:
    """Runs `fdjax sweep` and returns its exit status.

    Args:
      arguments: the command's arguments.
      command: the command of a training process; None: `train_process()`.
    """
    parsed = parse_arguments(SweepArguments, "fdjax sweep", arguments)
    check_at_least_one(jobs=parsed.jobs)
    from fdjax.experiments.launch import check_data, run_sweep
    from fdjax.experiments.sweep import load_sweep, plan_sweep

    sweep = load_sweep(parsed.config)
    try:
        runs = plan_sweep(sweep, parsed.workdir, Path(parsed.config).parent)
    except UserError as error:
        raise UserError(f"{parsed.config}: {error}") from error
    check_data(runs)
    if parsed.dry_run:
        for run in runs:
            state = "finished" if run.is_finished() else "to go on with" if run.is_begun() else "to start"
            after = f" after {run.after}" if run.after and state == "to start" else ""
            print(f"{run.name} ({state}{after}): train.py {shlex.join(run.arguments)}")
        return 0
    folder = Path(parsed.workdir).expanduser().resolve()
    try:
        outcome = run_sweep(
            runs, folder, command or train_process(), parsed.jobs, say=lambda line: print(line, flush=True)
        )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    print(f"{len(outcome.results)} of {len(runs)} runs finished" + _written_words(outcome.written))
    for name, why in outcome.failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    return 1 if outcome.failed else 0


def _written_words(written: Sequence[Path]) -> str:
    return f": {', '.join(str(path) for path in written)}" if written else ""
