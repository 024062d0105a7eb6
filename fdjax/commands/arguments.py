"""What commands need of their arguments before these can be parsed as a whole."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fdjax.config import Config, load_config


def flag_value(arguments: Sequence[str], program: str, flag: str = "--config") -> str | None:
    """The value of --config, or another flag, found before the flags that depend on it can be parsed."""
    parser = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="value")
    return parser.parse_known_args(list(arguments))[0].value


def config_given(arguments: Sequence[str], program: str) -> Config:
    """What --config's file says, the default of every flag that sets one of its fields; without --config, `Config()`.

    Raises:
      UserError: as `load_config`.
    """
    path = flag_value(arguments, program)
    return Config() if path is None else load_config(path)
