"""Parses command lines: flags that are read ahead of the others, short error messages, and dispatch to commands."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from fdjax.config import Config, load_config
from fdjax.errors import UserError, suggestion

if TYPE_CHECKING:
    from fdjax.training.restore import Restored

Parsed = TypeVar("Parsed")
# The longest error message about a flag, in characters.
_LONGEST_MESSAGE = 800
# Maps the name of a command to its function and a line of help.
Commands = Mapping[str, tuple[Callable[[Sequence[str]], int], str]]


def flag_value(arguments: Sequence[str], program: str, flag: str = "--config") -> str | None:
    """Returns the value of `flag`, or None, before the flags whose defaults depend on it can be parsed."""
    parser = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="value")
    return parser.parse_known_args(list(arguments))[0].value


def parse_with_config(kind: type[Parsed], program: str, arguments: Sequence[str]) -> Parsed:
    """Parses the arguments of a command that has a `Config` in its field `settings`.

    The flags of `settings` have their defaults from the file that --config names, or from `Config()` without --config.

    Raises:
      UserError: as in `load_config` and `parse_arguments`.
    """
    path = flag_value(arguments, program)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    given: Any = {field.name: tyro.MISSING for field in fields if field.default is dataclasses.MISSING}
    given["settings"] = Config() if path is None else load_config(path)
    return parse_arguments(kind, program, arguments, kind(**given))


def parse_arguments(
    kind: type[Parsed], program: str, arguments: Sequence[str] | None, default: Parsed | None = None
) -> Parsed:
    """Parses a command's arguments; flags that are not given have their values from `default`.

    Raises:
      UserError: if a flag is unknown, missing, or has a value that is not accepted.
      SystemExit: if help was asked for; it has been printed.
    """
    printed = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(printed), _unwrapped(arguments):
            return tyro.cli(kind, prog=program, args=arguments, **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(_in_few_words(printed.getvalue(), program)) from None


@contextlib.contextmanager
def _unwrapped(arguments: Sequence[str] | None) -> Iterator[None]:
    """Makes tyro write errors in long lines, so that no number is broken; help keeps the terminal's width."""
    if {"-h", "--help"} & set(sys.argv[1:] if arguments is None else arguments):
        yield
        return
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(_LONGEST_MESSAGE)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _in_few_words(box: str, program: str) -> str:
    """Returns as one line the error that tyro prints in a box of up to 20 lines."""
    sections: list[list[str]] = [[]]
    for row in box.splitlines():
        text = row.strip("\u2502| ")
        if re.fullmatch(r"[\W_]*", text) or text.startswith(("\u256d", "\u2570")):
            sections.append([])
        else:
            sections[-1].append(text)
    sections = [section for section in sections if section]
    if not box.lstrip().startswith("\u256d") and len(sections) > 1:
        # Where tyro draws no frame, the title is a section of its own.
        sections = sections[1:]
    said = " ".join(sections[0]).replace("Error parsing ", "")
    if said.startswith("Missing from"):
        flags = [row for row in sections[0] if row.startswith("--")]
        # A positional argument has no flag; its help says which it is.
        said = f"missing: {', '.join(flags) or ' '.join(sections[0][1:]).removesuffix(' (required)')}"
    for section in sections[1:]:
        if section[0].startswith("Unrecognized"):
            said += f"; unrecognized: {' '.join(section[1:])}"
        if section[0].startswith("Perhaps you meant"):
            said += f" (did you mean {section[1].split()[0]}?)"
    said = said.rstrip(".") if len(said) < _LONGEST_MESSAGE else f"{said[:_LONGEST_MESSAGE]}..."
    return f"{said}; {program} --help says what is accepted"


def training_program() -> tuple[str, ...]:
    """Returns the first words of a command that trains: `python train.py` in a checkout, otherwise `fdjax train`."""
    return ("python", "train.py") if Path("train.py").is_file() else ("fdjax", "train")


def restored_run(path: str, which: str = "latest") -> Restored:
    """Restores the checkpoint that --checkpoint and --which name."""
    from fdjax.training.restore import open_checkpoint

    return open_checkpoint(path, which)[-1]


def check_at_least_one(**flags: int) -> None:
    """Raises `UserError` for the first flag whose value is below 1."""
    for name, number in flags.items():
        if number < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {number}")


def dispatch(commands: Commands, arguments: Sequence[str], *group: str) -> int:
    """Runs the command that the first argument names, or prints the list of commands if there is no argument.

    Args:
      commands: the commands of `fdjax`, or of one of its groups.
      arguments: the command's name, and its own arguments.
      *group: the name of the group, such as "data"; none for `fdjax` itself.

    Returns:
      The exit status.
    """
    usage = " ".join(["fdjax", *group, "COMMAND"])
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {usage} [OPTIONS]; {usage} --help lists a command's options\n")
        print("\n".join(f"  {name:10} {text}" for name, (_, text) in commands.items()))
        return 0 if arguments else 2
    if arguments[0] not in commands:
        given, hint = " ".join([*group, arguments[0]]), suggestion(arguments[0], commands)
        raise UserError(f"no command {given!r}{hint}; accepted are {', '.join(commands)}")
    return commands[arguments[0]][0](arguments[1:])
