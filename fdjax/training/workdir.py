"""The files of a run: its config, its metrics, its summary."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fdjax.config import Config
from fdjax.errors import UserError

CONFIG_FILE, INIT_FILE, METRICS_FILE, SUMMARY_FILE = "config.json", "init.json", "metrics.jsonl", "summary.json"
_DRAFT = ".draft"


def write_json(path: Path, value: Any) -> None:
    """Writes JSON in one move, so that a reader never sees half of it."""
    draft = path.with_name(path.name + _DRAFT)
    draft.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(draft, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads a JSON object; None where there is none, or not a whole one."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None


def check_folder(folder: Path, flag: str) -> None:
    """Raises `UserError` if nothing could be written into `folder`, given by `flag`; writes nothing."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{flag} {folder}: {existing} is a file; give a directory, or a path that does not exist yet")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder}: {existing} is not writable; give another one")


def read_config(workdir: Path) -> Config | None:
    """The config of the run in `workdir`; None where there is none.

    Raises:
      UserError: the directory holds other things, or the file is no config.
    """
    file = workdir / CONFIG_FILE
    if not file.exists():
        if workdir.is_dir() and any(not path.name.endswith(_DRAFT) for path in workdir.iterdir()):
            raise UserError(f"--workdir {workdir} is not empty and holds no run (no {CONFIG_FILE}); give another one")
        return None
    try:
        return Config.from_dict(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not readable as the config of a run: {error}") from error


class MetricsLog:
    """`metrics.jsonl`: one object a line, each with the step of the run and the phase.

    Args:
      path: of the file.
      writes: False in processes that leave the writing to another.
    """

    def __init__(self, path: Path, *, writes: bool = True):
        self._path, self._writes = path, writes

    def cut_back(self, step: int) -> None:
        """Drops records after `step`, and a last line that was only half written."""
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
        """All records; lines that are no JSON are passed over."""
        records = []
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records
