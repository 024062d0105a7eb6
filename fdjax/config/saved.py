"""Saved dictionaries read back as config dataclasses, including those of earlier versions."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from fdjax.errors import UserError, suggestion

# Options that were removed because they did not help (docs/train.md). Saved configs may hold them, with the values
# here, which turned them off.
_REMOVED_FROM_LEARN = {
    "schedule": "constant",
    "warmup_epochs": 0.0,
    "noise": 0.0,
    "precondition": 0.0,
    "rounding": "nearest",
    "stage_masks": False,
    "straight_through": 0.0,
}

# Earlier names of options -> their names now.
_RENAMED_IN_LEARN = {"gate_batch": "engine_batch"}


def config_of_fields(cls: Any, fields: Mapping[str, Any]) -> Any:
    """Makes the dataclass `cls` from the fields of a saved config, for `Config.from_dict`."""
    learn = fields.get("learn") if isinstance(fields, Mapping) else None
    if isinstance(learn, Mapping):
        for name, idle in _REMOVED_FROM_LEARN.items():
            if learn.get(name, idle) != idle:
                raise UserError(
                    f"config.learn.{name} is {learn[name]!r}, an option that has been removed because it did not "
                    "help (docs/train.md); the commit in the run's summary.json has it"
                )
        kept = {_RENAMED_IN_LEARN.get(k, k): v for k, v in learn.items() if k not in _REMOVED_FROM_LEARN}
        fields = {**fields, "learn": kept}
    return _from_dict(cls, fields, "config")


def _from_dict(cls: Any, fields: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    if not isinstance(fields, Mapping):
        raise UserError(f"{where} must be an object with fields, got {fields!r}")
    for name in fields:
        if name not in hints:
            raise UserError(f"{where} has no field {name!r}{suggestion(name, hints)}; it has {', '.join(hints)}")
    values = {}
    for name, value in fields.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = _from_dict(hint, value, f"{where}.{name}")
        elif isinstance(value, list):
            value = tuple(tuple(item) if isinstance(item, list) else item for item in value)
        values[name] = value
    return cls(**values)
