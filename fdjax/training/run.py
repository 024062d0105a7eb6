"""A run: from a config and a workdir to a summary; interrupted anywhere, it resumes."""

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
    """Runs `config` in `workdir`, from where it stopped if it has been run before.

    Args:
      config: what to do.
      workdir: a new or empty directory, or one that holds this run.
      init: a checkpoint of another run to start from.
      local_devices: how many of each process's devices to use; None for all.
      profile: how many steps of each phase to trace.
      stopping: asks the run to save and stop.

    Returns:
      The summary.

    Raises:
      UserError: something asked for does not exist, does not fit or holds another run. Nothing has been written then.
      RunStopped: the run has diverged, or something cannot be written.
      RunInterrupted: as `stopping` asked.
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
        # Before the lock is given back, however the run ends.
        held.callback(run.saves.join)
        # What one process writes below, another may still be reading above.
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
    """So that the checkpoint can be evaluated from anywhere."""
    absolute = {
        field: str(Path(path).expanduser().resolve())
        for field in ("path", "unlabelled")
        if (path := getattr(config.data, field)) is not None
    }
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **absolute))


def _prepare(
    config: Config, folder: Path, init: str | None, devices: Devices, profile: int, stopping: Stopping | None
) -> tuple[Run, str | None]:
    """The run, checked against its workdir and what it starts from, and the latter's path; nothing is written."""
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
    """One line: what happened, the last good checkpoint, what to do."""
    if isinstance(error, OSError):
        what = f"{error.strerror or first_line(error)}{f': {error.filename}' if error.filename else ''}"
    else:
        what = str(error)
    step = next(Checkpoints(folder / CHECKPOINT_FOLDER).sound_steps(), None) if folder.is_dir() else None
    last = f"the last good checkpoint is step {step:,}" if step is not None else "no checkpoint was saved"
    if isinstance(error, Diverged):
        return RunStopped(f"{what}; {last}, in {folder}")
    again = "goes on from it" if step is not None else "begins anew"
    return RunStopped(f"the run stops: {what}; {last}, in {folder}; mend that, and the same command {again}")


def _init_source(folder: Path, init: str | None, *, begun: bool, resumed: Restored | None) -> str | None:
    """The checkpoint that --init means, absolute: the one that the run in `folder` was begun with, if there is one."""
    asked = None if init is None else str(Path(init).expanduser().resolve())
    if not begun:
        return asked
    file = folder / INIT_FILE
    recorded = (read_json(file) or {}).get("checkpoint")
    lost = recorded is None and (file.exists() or (resumed is not None and bool(resumed.done.inherited)))
    if lost or not isinstance(recorded, str | None):
        if resumed is None:
            raise UserError(f"{file} is damaged, and nothing has been saved yet; give another --workdir to begin anew")
        # The checkpoint has all that was taken from there.
        print(f"warning: {file} is damaged or missing; going on without it", file=sys.stderr)
        return asked
    if asked is not None and asked != recorded:
        was = f"--init {recorded}" if recorded else "no --init"
        raise UserError(f"--workdir {folder} holds a run begun with {was}; give another directory for --init {init}")
    return recorded
