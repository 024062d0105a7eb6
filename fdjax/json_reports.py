"""Reports that commands write as JSON beside what they print."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fdjax.errors import UserError


def check_json_target(path: str | None) -> None:
    """Raises `UserError` if a report could not be written to `path`, before the work that leads to it."""
    if path is None:
        return
    file = Path(path).resolve()
    writable = os.access(file if file.exists() else file.parent, os.W_OK)
    if file.is_dir() or not file.parent.is_dir() or not writable:
        raise UserError(f"--json {path}: give a file that can be written, in a directory that exists")


def write_report(path: str | None, value: Any) -> None:
    """Writes JSON to `path`, if one was given."""
    if path is not None:
        Path(path).write_text(json.dumps(value, indent=1) + "\n")
