"""Stands in for train.py in tests of sweeps: understands its flags, leaves its files, and computes nothing.

Each of a run's steps is one line, appended to `steps/NAME` beside the workdirs; a run goes on after the last one. A run
whose seed is 13 fails, one whose seed is 99 leaves no result.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import NoReturn

import tyro

from fdjax.commands.train import TrainArguments
from fdjax.config import load_config
from fdjax.training.workdir import write_json
from tests.fake_runs import make_run

STEPS, FAILING, SILENT = 4, 13, 99


def main() -> int:
    path = sys.argv[sys.argv.index("--config") + 1]
    default = TrainArguments(config=path, workdir="", settings=load_config(path))
    parsed = tyro.cli(TrainArguments, default=default)
    workdir, config = Path(parsed.workdir), parsed.settings
    steps = workdir.parent / "steps" / workdir.name
    steps.parent.mkdir(exist_ok=True)
    if parsed.init is not None and not (Path(parsed.init) / "summary.json").exists():
        raise SystemExit(f"{parsed.init} is not finished")
    workdir.mkdir(exist_ok=True)
    # In one move, as train.py does, because these runs are killed anywhere.
    write_json(workdir / "config.json", config.to_dict())
    if parsed.init is not None:
        write_json(workdir / "init.json", {"checkpoint": parsed.init})
    with steps.open("a") as log:
        log.write("begin\n")
    done = steps.read_text().count("step")
    for step in range(done, STEPS):
        time.sleep(0.1)
        with steps.open("a") as log:
            log.write(f"step {step}\n")
    if config.seed == FAILING:
        print("loss is nan\nerror: the run has diverged", file=sys.stderr)
        return 2
    if config.seed != SILENT:
        make_run(
            workdir, config, top1=0.5 + 0.2 * (config.learn.target_macs or 0), ratio=config.learn.target_macs or 0.4
        )
    print("finished")
    return 0


def run() -> NoReturn:
    """As a process."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted")
        sys.exit(130)
