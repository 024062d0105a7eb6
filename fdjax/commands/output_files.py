"""Files that commands write in addition to what they print: paths are checked before the work, written after it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fdjax.errors import UserError


def check_file_target(flag: str, path: str | None, suffixes: Sequence[str] = ()) -> None:
    """Checks, before any work is done, that a file can be written.

    Args:
      flag: the flag that names the file, such as "--json".
      path: its value; None if the flag is not given.
      suffixes: accepted suffixes, such as ".png"; if empty, all are.

    Raises:
      UserError: if the file cannot be written, or has another suffix.
    """
    if path is None:
        return
    file = Path(path).resolve()
    writable = os.access(file if file.exists() else file.parent, os.W_OK)
    if file.is_dir() or not file.parent.is_dir() or not writable:
        raise UserError(f"{flag} {path}: give a file that can be written, in a directory that exists")
    # A device, such as /dev/stdout, has no suffix and nothing to lose.
    if suffixes and file.suffix not in suffixes and (file.is_file() or not file.exists()):
        raise UserError(f"{flag} {path}: give a file that ends in {' or '.join(suffixes)}")


def check_json_target(path: str | None) -> None:
    """Calls `check_file_target` for --json, whose file has to end in .json: no other is overwritten by mistake."""
    check_file_target("--json", path, (".json",))


def write_report(path: str | None, value: Any) -> None:
    """Writes `value` as JSON to `path`, unless that is None."""
    if path is not None:
        Path(path).write_text(json.dumps(value, indent=1) + "\n")
