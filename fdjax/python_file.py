"""Python files that a user writes: run, and asked for what one of their functions makes."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import TypeVar

from fdjax.errors import UserError, suggestion

Made = TypeVar("Made")


def load_made(path: str, what: str, function: str, kind: type[Made], name: str) -> Made:
    """Runs a Python file and returns what its function makes.

    Args:
      path: of the file.
      what: the file is, in a word: "config".
      function: its name: "get_config"; it takes no arguments.
      kind: what it must return.
      name: of `kind`, as a user imports it.

    Raises:
      UserError: no such file, an error in it, no such function, or one that returns something else.
    """
    if not Path(path).is_file():
        nearby = sorted(str(p) for p in Path(path).parent.glob("*.py")) if Path(path).parent.is_dir() else []
        known = f"; there are {', '.join(nearby)}" if nearby else ""
        raise UserError(f"no {what} file {path!r}{suggestion(path, nearby)}{known}")
    must = f"must return an {name}"
    try:
        namespace = runpy.run_path(path, run_name=f"fdjax_{what}")
        if function not in namespace:
            raise UserError(f"it defines no {function}(); it {must}")
        made = namespace[function]()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(made, kind):
        raise UserError(f"{path}: {function}() {must}, got {type(made).__name__}")
    return made
