"""The files of a run: config, metrics and summary."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from fdjax.config import Config
from fdjax.errors import UserError, first_line
from fdjax.training.lock import LOCK_FILE

CONFIG_FILE, INIT_FILE, METRICS_FILE, SUMMARY_FILE = "config.json", "init.json", "metrics.jsonl", "summary.json"
# Names the checkpoint step that was saved last; if this file exists, there must be checkpoints.
SAVED_FILE = "saved.json"
# `fdjax import` writes it beside its checkpoint: where the weights are from.
IMPORT_FILE = "import.json"
_DRAFT = ".draft"


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically, so that a reader never sees half of it."""
    draft = path.with_name(path.name + _DRAFT)
    draft.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(draft, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads a JSON object; returns None if the file is missing or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def check_folder(folder: Path, flag: str) -> None:
    """Raises `UserError` if `folder`, the value of `flag`, cannot be written; writes nothing."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{flag} {folder}: {existing} is a file; give a directory, or a path that does not exist yet")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder}: {existing} is not writable; give another one")


def check_new_folder(folder: Path) -> None:
    """Raises `UserError` unless `folder`, the value of --out, is new or empty and can be written; writes nothing."""
    check_folder(folder, "--out")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--out {folder} is not empty; give a new or empty directory")


def read_config(workdir: Path, checkpointed: Config | None = None) -> Config | None:
    """Reads the config of the run in `workdir`.

    Args:
      workdir: the run's workdir.
      checkpointed: the config in the newest checkpoint, which replaces a damaged file.

    Returns:
      The config; None if there is no run.

    Raises:
      UserError: if the directory holds other files, or its config cannot be read.
    """
    file = workdir / CONFIG_FILE
    if not file.exists():
        if workdir.is_dir() and any(
            path.name != LOCK_FILE and not path.name.endswith(_DRAFT) for path in workdir.iterdir()
        ):
            raise UserError(f"--workdir {workdir} is not empty and holds no run (no {CONFIG_FILE}); give another one")
        return None
    try:
        return Config.from_dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if checkpointed is not None:
            print(f"warning: {file} is damaged; taking the config of the newest checkpoint", file=sys.stderr)
            return checkpointed
        raise UserError(f"{file} is not readable as the config of a run: {first_line(error)}") from error


def check_nothing_lost(workdir: Path, checkpoints: Path) -> None:
    """Raises `UserError` if the run in `workdir`, which has no sound checkpoint, once had one: it is not begun anew."""
    saved, step = (workdir / SAVED_FILE).exists(), (read_json(workdir / SAVED_FILE) or {}).get("step")
    folders = checkpoints.iterdir() if checkpoints.is_dir() else []
    unsound = sorted((path.name for path in folders if path.is_dir() and path.name.isdecimal()), key=int)
    if saved or unsound or (workdir / SUMMARY_FILE).exists():
        had = f"step {step:,}" if isinstance(step, int) else f"step {unsound[-1]}" if unsound else "a checkpoint"
        raise UserError(
            f"the run in {workdir} had saved {had}, but {checkpoints} has no sound checkpoint any more; bring back a "
            "copy of that folder, or give another --workdir to begin anew"
        )


class MetricsLog:
    """The file `metrics.jsonl`, with one object a line, each of which has the step of the run and the phase.

    Args:
      path: the file.
      writes: whether this process writes the file; False in all but one.
    """

    def __init__(self, path: Path, *, writes: bool = True):
        self._path, self._writes = path, writes

    def cut_back(self, step: int) -> None:
        """Removes records after `step`, and lines that are damaged."""
        if not self._path.exists():
            return
        kept = [record for record in self.read() if record["step"] <= step]
        draft = self._path.with_name(self._path.name + _DRAFT)
        draft.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(draft, self._path)

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record."""
        if not self._writes:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Returns all records; damaged lines are skipped."""
        records = []
        lines = self._path.read_text(errors="replace").splitlines() if self._path.is_file() else []
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if (
                isinstance(record, dict)
                and isinstance(record.get("step"), int)
                and isinstance(record.get("phase"), str)
            ):
                records.append(record)
        return records
