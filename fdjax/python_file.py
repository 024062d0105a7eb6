"""The user's Python code, in a file or an importable module: runs it, and returns what one of its functions makes."""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fdjax.errors import UserError, first_line, suggestion

Made = TypeVar("Made")


def load_made(path: str, what: str, function: str, kind: type[Made], name: str) -> Made:
    """Runs a Python file and returns what its function makes.

    Args:
      path: path of the file.
      what: what the messages call the file, such as "config".
      function: name of the function, such as "get_config"; it takes no arguments.
      kind: the type that the function must return.
      name: name of `kind`, as a user imports it.

    Returns:
      The result of the function.

    Raises:
      UserError: the file does not exist or fails, or has no such function, or the function returns another type.
    """
    if not Path(path).is_file():
        nearby = sorted(str(p) for p in Path(path).parent.glob("*.py")) if Path(path).parent.is_dir() else []
        known = f"; the files there are {', '.join(nearby)}" if nearby else ""
        raise UserError(f"no {what} file {path!r}{suggestion(path, nearby)}{known}")
    must = f"must return an {name}"
    try:
        namespace = runpy.run_path(path, run_name=f"fdjax_{what}")
        if function not in namespace:
            raise UserError(f"it defines no {function}(); it {must}")
        made = namespace[function]()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(made, kind):
        raise UserError(f"{path}: {function}() {must}, got {type(made).__name__}")
    return made


def shipped_file(name: str, folder: str) -> str | None:
    """Returns the path of a Python file that comes with fdjax, such as "finetune" in the folder "configs", or None.

    In an installed package, the folder is inside the package; in a checkout, it is beside it.
    """
    if Path(name).is_file() or not name.replace("_", "").isalnum():
        return None
    package = Path(__file__).parent
    files = (parent / folder / f"{name}.py" for parent in (package, package.parent))
    return next((str(file) for file in files if file.is_file()), None)


def import_function(reference: str, flag: str) -> Callable[..., Any]:
    """Imports a function that a user names, also from the current directory.

    Args:
      reference: "package.module:function".
      flag: the flag that gave the reference, for messages.

    Returns:
      The function.

    Raises:
      UserError: the module cannot be imported, or has no such function.
    """
    module_name, _, name = reference.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # A file may have been written since the import system last read its folder.
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"{flag} {reference}: importing {module_name} fails: {what_failed(error)}") from error
        raise UserError(
            f"{flag} {reference}: there is no module {error.name!r} in {folder} or among the installed packages; run "
            "the command in the folder that holds it, or add that folder to PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{flag} {reference}: importing {module_name} fails: {what_failed(error)}") from error
    if not hasattr(module, name):
        functions = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
        where = getattr(module, "__file__", None) or module_name
        raise UserError(f"{flag} {reference}: {where} has no {name!r}{suggestion(name, functions)}")
    function = getattr(module, name)
    if not callable(function):
        raise UserError(f"{flag} {reference}: {name} is not a function but {type(function).__name__}")
    return function


def what_failed(error: BaseException) -> str:
    """Describes an exception in one line: its type, its message, and the line of the user's file that it comes from."""
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}, line {error.lineno})"
        return f"{type(error).__name__}: {error.msg}{where}"
    installed = (str(Path(__file__).parent), "site-packages", "dist-packages", "<frozen", os.path.dirname(os.__file__))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(part in frame.filename for part in installed)
    ]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first_line(error)}{where}"
