"""Files that commands write beside what they print: checked before the work, written after it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fdjax.errors import UserError


def check_file_target(flag: str, path: str | None, suffixes: Sequence[str] = ()) -> None:
    """Raises `UserError` if `path`, a flag's value, cannot be written, before the work that leads to it.

    Args:
      flag: its name, such as "--json".
      path: None where the flag is not given.
      suffixes: those accepted, such as ".png"; none: any.
    """
    if path is None:
        return
    file = Path(path).resolve()
    writable = os.access(file if file.exists() else file.parent, os.W_OK)
    if file.is_dir() or not file.parent.is_dir() or not writable:
        raise UserError(f"{flag} {path}: give a file that can be written, in a directory that exists")
    if suffixes and file.suffix not in suffixes:
        raise UserError(f"{flag} {path}: give a file that ends in {' or '.join(suffixes)}")


def check_json_target(path: str | None) -> None:
    """`check_file_target` for --json."""
    check_file_target("--json", path)


def write_report(path: str | None, value: Any) -> None:
    """Writes JSON to `path`, if one was given."""
    if path is not None:
        Path(path).write_text(json.dumps(value, indent=1) + "\n")
