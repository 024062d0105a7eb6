"""What commands need of their arguments before these can be parsed as a whole."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from fdjax.config import Config, load_config
from fdjax.errors import UserError, suggestion

if TYPE_CHECKING:
    from fdjax.training.restore import Restored

Parsed = TypeVar("Parsed")
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
    return tyro.cli(kind, prog=program, args=arguments, default=kind(**given))


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
