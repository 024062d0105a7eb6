"""Settings by the names of their flags: sets them in a config, and writes them as flags of train.py."""

from __future__ import annotations

import os
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from fdjax.config import Config
from fdjax.errors import UserError, suggestion


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """Returns a config with other values; all are set at once, so that they are checked together.

    Args:
      config: the config.
      settings: field -> value, such as {"seed": 1, "learn.target_macs": 0.33}.

    Raises:
      UserError: if a field does not exist, or does not accept its value.
    """
    fields = config.to_dict()
    for name, value in settings.items():
        group, field = _place(fields, name)
        value = _plain(name, value)
        _check_choice(type(getattr(config, group)) if group else Config, field, name, value)
        (fields[group] if group else fields)[field] = value
    return Config.from_dict(fields)


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Returns the flags of train.py for settings.

    Args:
      settings: settings that `with_settings` accepts.
    """
    flags: list[str] = []
    for name, value in settings.items():
        group, dot, field = name.rpartition(".")
        field = field.rstrip("_").replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{group}{dot}{field}" if value else f"--{group}{dot}no-{field}")
        else:
            flags += [f"--{group}{dot}{field}", *_words(value)]
    return flags


def _place(fields: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Returns the group of a field ("" for the config itself) and the field's name in it."""
    groups = [group for group, value in fields.items() if isinstance(value, dict)]
    group, _, field = name.rpartition(".")
    if group and group not in groups:
        raise UserError(
            f"no settings {group!r} (in {name!r}){suggestion(group, groups)}; there are {', '.join(groups)}"
        )
    if not group and field in groups:
        raise UserError(f"{name!r} is a group of fields; name one, such as {f'{name}.{next(iter(fields[name]))}'!r}")
    known = fields[group] if group else fields
    # If the flag is a keyword of Python, the field's name ends with an underscore.
    found = next((key for key in (field, f"{field}_") if key in known), None)
    if found is None:
        everywhere = [f"{group}.{key}" for group in groups for key in fields[group]]
        hint = suggestion(field, known) or suggestion(name, everywhere)
        where = f"{group} has" if group else "a config has"
        raise UserError(f"no field {name!r}{hint}; {where} {', '.join(known)}")
    return group, found


def _plain(name: str, value: Any) -> Any:
    """Returns the value as JSON types."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, tuple | list):
        return [_plain(name, item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(f"{name} must be a number, a text, True, False, None or a tuple of them, got {value!r}")


def _check_choice(owner: type, field: str, name: str, value: Any) -> None:
    """Raises `UserError` if a field has a list of accepted words, and a word of the value is none of them."""
    hint = typing.get_type_hints(owner)[field]
    parts = [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is Literal]
    accepted = [word for part in parts for word in typing.get_args(part)]
    for word in value if isinstance(value, list) else [value]:
        if accepted and isinstance(word, str) and word not in accepted:
            raise UserError(f"{name} is {word!r}{suggestion(word, accepted)}; accepted are {', '.join(accepted)}")


def _words(value: Any) -> Iterable[str]:
    if isinstance(value, tuple | list):
        return [word for item in value for word in _words(item)]
    return [os.fspath(value) if isinstance(value, os.PathLike) else str(value)]
