"""Opens a run: what its workdir and --init hold decides whether it may begin or go on, and from where."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from fdjax.checkpoint import CHECKPOINT_FOLDER, Checkpoints
from fdjax.config import Config, continuation_problem, with_absolute_paths
from fdjax.errors import RunStopped, UserError, first_line
from fdjax.training.datasets import open_data
from fdjax.training.devices import Devices
from fdjax.training.health import Diverged
from fdjax.training.loop import Run
from fdjax.training.restore import Restored, open_checkpoint, restore_latest
from fdjax.training.stopping import Stopping
from fdjax.training.summary import describe
from fdjax.training.workdir import (
    CONFIG_FILE,
    INIT_FILE,
    SUMMARY_FILE,
    check_nothing_lost,
    read_config,
    read_json,
    write_json,
)


def open_run(
    config: Config, folder: Path, init: str | None, devices: Devices, profile: int, stopping: Stopping | None
) -> tuple[Run, str | None]:
    """Makes the run and checks it against its workdir and the checkpoint it starts from; writes nothing.

    Args:
      config: the run's config.
      folder: the workdir, an absolute path.
      init: the value of --init.
      devices: the run's devices.
      profile: number of steps of each phase to trace.
      stopping: asks the run to save and stop.

    Returns:
      The run, and the path of the checkpoint that --init names.

    Raises:
      UserError: if something that is asked for does not exist or does not fit, or `folder` holds another run.
    """
    config = with_absolute_paths(config)
    checkpoints = Checkpoints(folder / CHECKPOINT_FOLDER)
    found = restore_latest(checkpoints) if (folder / CONFIG_FILE).exists() else None
    resumed = None if found is None else found[1]
    saved = read_config(folder, resumed.config if resumed else None)
    if saved is not None:
        if resumed is None:
            check_nothing_lost(folder, checkpoints.folder)
        problem = continuation_problem(saved, config, resumed.phase.name if resumed else None)
        if problem:
            raise UserError(f"--workdir {folder} holds another run ({problem}); give another directory for this one")
    source = _init_source(folder, init, begun=saved is not None, resumed=resumed)
    start_from = open_checkpoint(source)[-1] if source is not None and resumed is None else None
    dataset = open_data(config.data, config.seed)
    begun = resumed or start_from
    if begun is not None:
        dataset = dataset.in_order_of(begun.graph.class_names)
        config = _with_kept_network(config, begun)
    run = Run(config, folder, dataset, devices, start_from, resumed, profile, stopping)
    run.check()
    return run, source


def _with_kept_network(config: Config, begun: Restored) -> Config:
    """Returns a config that names the copy of the ONNX file beside the checkpoints, if the file itself is gone."""
    file = config.model.onnx_file
    if file is None or file.exists() or begun.onnx_file is None:
        return config
    return dataclasses.replace(config, model=config.model.with_onnx_file(begun.onnx_file))


def summary_if_finished(run: Run) -> dict[str, Any] | None:
    """Returns the summary in the workdir if the run is finished, else None."""
    last, resumed = run.phases[-1], run.resumed
    if resumed is None or resumed.phase.name != last.name or resumed.phase_step < last.steps:
        return None
    summary = read_json(run.workdir / SUMMARY_FILE)
    try:
        if summary is None or summary["phases"] != resumed.done.history:
            return None
        describe(summary)
        pruned = summary["macs"]["total"] < summary["macs"]["dense"]
        if run.config.checkpoint.time and pruned and summary.get("time") is None:
            return None  # It was interrupted while the network was timed, or made without times.
    except (KeyError, TypeError, ValueError, AttributeError):
        return None  # A damaged summary is written again.
    return summary


def write_beginning(folder: Path, config: Config, source: str | None) -> None:
    """Writes what a run that goes on reads first: its config, and the path of the checkpoint that --init names."""
    if source is not None:
        write_json(folder / INIT_FILE, {"checkpoint": source})
    write_json(folder / CONFIG_FILE, config.to_dict())


def stopped(error: RunStopped | OSError, folder: Path) -> RunStopped:
    """Makes the error of a run that cannot go on: what happened, which checkpoint is the last good one, what to do."""
    if isinstance(error, OSError):
        what = f"{error.strerror or first_line(error)}{f': {error.filename}' if error.filename else ''}"
    else:
        what = str(error)
    step = next(Checkpoints(folder / CHECKPOINT_FOLDER).sound_steps(), None) if folder.is_dir() else None
    last = f"the last good checkpoint is step {step:,}" if step is not None else "no checkpoint was saved"
    if isinstance(error, Diverged):
        return RunStopped(f"{what}; {last}, in {folder}")
    again = "resumes from it" if step is not None else "begins anew"
    return RunStopped(f"the run stops: {what}; {last}, in {folder}; after that is fixed, the same command {again}")


def _init_source(folder: Path, init: str | None, *, begun: bool, resumed: Restored | None) -> str | None:
    """Returns the absolute path of --init; for a run that has begun, that with which it was begun."""
    asked = None if init is None else str(Path(init).expanduser().resolve())
    if not begun:
        return asked
    file = folder / INIT_FILE
    recorded = (read_json(file) or {}).get("checkpoint")
    lost = recorded is None and (file.exists() or (resumed is not None and bool(resumed.done.inherited)))
    if lost or not isinstance(recorded, str | None):
        if resumed is None:
            raise UserError(f"{file} is damaged, and nothing has been saved yet; give another --workdir to begin anew")
        # The run's own checkpoint has all that was taken from --init.
        print(f"warning: {file} is damaged or missing; going on without it", file=sys.stderr)
        return asked
    if asked is not None and asked != recorded:
        was = f"--init {recorded}" if recorded else "no --init"
        raise UserError(f"--workdir {folder} holds a run begun with {was}; give another directory for --init {init}")
    return recorded
