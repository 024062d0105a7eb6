"""A run, from a config and a workdir to a summary. If it is interrupted, it can resume."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

from fdjax.checkpoint import CHECKPOINT_FOLDER, Checkpoints
from fdjax.config import Config, continuation_problem
from fdjax.errors import RunStopped, UserError, first_line
from fdjax.training.compilation import tidy_after_compilations
from fdjax.training.datasets import open_data
from fdjax.training.devices import Devices
from fdjax.training.health import Diverged
from fdjax.training.lock import locked
from fdjax.training.loop import Run
from fdjax.training.restore import Restored, open_checkpoint, restore_latest
from fdjax.training.stopping import Stopping
from fdjax.training.summary import describe
from fdjax.training.workdir import (
    CONFIG_FILE,
    INIT_FILE,
    check_folder,
    check_nothing_lost,
    read_config,
    read_json,
    write_json,
)


def train(
    config: Config,
    workdir: str,
    init: str | None = None,
    *,
    local_devices: int | None = None,
    profile: int = 0,
    stopping: Stopping | None = None,
) -> dict[str, Any]:
    """Trains as `config` describes in `workdir`; a run that is there already is resumed.

    Args:
      config: the run's config.
      workdir: a new or empty directory, or that of the run to resume.
      init: a checkpoint of another run to start from.
      local_devices: number of each process's devices to use; None: all.
      profile: number of steps of each phase to trace.
      stopping: asks the run to save and stop.

    Returns:
      The summary, as `summary.json` has it.

    Raises:
      UserError: if what was asked for does not exist, does not fit, or the directory holds another run. Nothing has
        been written then.
      RunStopped: if the run has diverged, or a file cannot be written.
      RunInterrupted: if `stopping` asked for it.
    """
    tidy_after_compilations()
    devices = Devices(local_devices)
    devices.check_precision(config.model.precision)
    devices.check_batch(config.data.batch_size)
    folder = Path(workdir).expanduser().resolve()
    check_folder(folder, "--workdir")
    with contextlib.ExitStack() as held:
        begun = (folder / CONFIG_FILE).exists()
        if begun and devices.is_writer:
            held.enter_context(locked(folder))
        run, source = _prepare(_with_absolute_paths(config), folder, init, devices, profile, stopping)
        summary = run.summary_if_finished()
        if summary is not None:
            if devices.is_writer:
                print(f"the run in {folder} is finished; nothing to do. Its result:\n{describe(summary)}")
            return summary
        # However the run ends, its saves are finished before the lock is released.
        held.callback(run.saves.join)
        # Another process may still be reading the files that process 0 writes from here on.
        devices.wait_for_all("before the run")
        try:
            if devices.is_writer:
                folder.mkdir(parents=True, exist_ok=True)
                if not begun:
                    held.enter_context(locked(folder))
                    if (folder / CONFIG_FILE).exists():
                        raise UserError(f"--workdir {folder}: another process has begun a run there; give another one")
                _write_beginning(folder, run.config, source)
            run.announce()
            summary = run.finish(run.run_phases(*run.start()))
        except (RunStopped, OSError) as error:
            raise _stopped(error, folder) from error
        if devices.is_writer:
            print(f"{describe(summary)}\nresults:  {folder}")
        devices.wait_for_all("after the run")
        return summary


def _with_absolute_paths(config: Config) -> Config:
    """Makes the paths of the data absolute, so that the checkpoint can be evaluated from any directory."""
    absolute = {
        field: str(Path(path).expanduser().resolve())
        for field in ("path", "unlabelled")
        if (path := getattr(config.data, field)) is not None
    }
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **absolute))


def _prepare(
    config: Config, folder: Path, init: str | None, devices: Devices, profile: int, stopping: Stopping | None
) -> tuple[Run, str | None]:
    """Makes the run and checks it against its workdir and the checkpoint it starts from; writes nothing.

    Returns:
      The run, and the path of the checkpoint that --init names.
    """
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
    run = Run(config, folder, dataset, devices, start_from, resumed, profile, stopping)
    run.check()
    return run, source


def _write_beginning(folder: Path, config: Config, source: str | None) -> None:
    if source is not None:
        write_json(folder / INIT_FILE, {"checkpoint": source})
    write_json(folder / CONFIG_FILE, config.to_dict())


def _stopped(error: RunStopped | OSError, folder: Path) -> RunStopped:
    """Makes the one-line message: what happened, which checkpoint is the last good one, what to do."""
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
