"""What commands need of their arguments before these can be parsed as a whole."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from fdjax.config import Config, load_config
from fdjax.errors import UserError, suggestion

if TYPE_CHECKING:
    from fdjax.training.restore import Restored

Parsed = TypeVar("Parsed")
# Characters of what is wrong with a flag.
_LONGEST_MESSAGE = 800
# By its name, a command, and what it does in words.
Commands = Mapping[str, tuple[Callable[[Sequence[str]], int], str]]


def flag_value(arguments: Sequence[str], program: str, flag: str = "--config") -> str | None:
    """The value of --config, or another flag, found before the flags that depend on it can be parsed."""
    parser = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="value")
    return parser.parse_known_args(list(arguments))[0].value


def parse_with_config(kind: type[Parsed], program: str, arguments: Sequence[str]) -> Parsed:
    """Parses a command's arguments, whose field `settings` is a `Config`: what --config's file says, or `Config()`, is
    the default of every flag that sets one of its fields.

    Raises:
      UserError: as `load_config`.
    """
    path = flag_value(arguments, program)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    given: Any = {field.name: tyro.MISSING for field in fields if field.default is dataclasses.MISSING}
    given["settings"] = Config() if path is None else load_config(path)
    return parse_arguments(kind, program, arguments, kind(**given))


def parse_arguments(
    kind: type[Parsed], program: str, arguments: Sequence[str] | None, default: Parsed | None = None
) -> Parsed:
    """Parses a command's arguments; `default` has the values of the flags that are not given.

    Raises:
      UserError: a flag that there is not, is missing, or has a value that it cannot have.
      SystemExit: help was asked for, and has been printed.
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
    """Has tyro write errors in long lines, so that no number is cut; help keeps the terminal's width."""
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
    """What tyro draws a box of up to 20 lines around."""
    sections: list[list[str]] = [[]]
    for row in box.splitlines():
        text = row.strip("\u2502| ")
        if re.fullmatch(r"[\W_]*", text) or text.startswith(("\u256d", "\u2570")):
            sections.append([])
        else:
            sections[-1].append(text)
    sections = [section for section in sections if section]
    if not box.lstrip().startswith("\u256d") and len(sections) > 1:
        # Without a frame the title is a section of its own.
        sections = sections[1:]
    said = " ".join(sections[0]).replace("Error parsing ", "")
    if said.startswith("Missing from"):
        flags = [row for row in sections[0] if row.startswith("--")]
        # What has no flag is known by its help alone.
        said = f"missing: {', '.join(flags) or ' '.join(sections[0][1:]).removesuffix(' (required)')}"
    for section in sections[1:]:
        if section[0].startswith("Unrecognized"):
            said += f"; unrecognized: {' '.join(section[1:])}"
        if section[0].startswith("Perhaps you meant"):
            said += f" (did you mean {section[1].split()[0]}?)"
    said = said.rstrip(".") if len(said) < _LONGEST_MESSAGE else f"{said[:_LONGEST_MESSAGE]}..."
    return f"{said}; {program} --help says what is accepted"


def restored_run(path: str, which: str = "latest") -> Restored:
    """The checkpoint that --checkpoint and --which name, restored."""
    from fdjax.training.restore import open_checkpoint

    return open_checkpoint(path, which)[-1]


def check_at_least_one(**flags: int) -> None:
    """Raises `UserError` for the first of some flags' values that is below 1."""
    for name, number in flags.items():
        if number < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {number}")


def dispatch(commands: Commands, arguments: Sequence[str], *group: str) -> int:
    """Does the command that the first argument names, of `fdjax` or of one of its groups; without one, lists them."""
    usage = " ".join(["fdjax", *group, "COMMAND"])
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {usage} [OPTIONS]; {usage} --help tells more\n")
        print("\n".join(f"  {name:10} {text}" for name, (_, text) in commands.items()))
        return 0 if arguments else 2
    if arguments[0] not in commands:
        given, hint = " ".join([*group, arguments[0]]), suggestion(arguments[0], commands)
        raise UserError(f"no command {given!r}{hint}; accepted are {', '.join(commands)}")
    return commands[arguments[0]][0](arguments[1:])
