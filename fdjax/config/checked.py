"""The base class of the config dataclasses, which checks their values when they are made."""

from __future__ import annotations

import dataclasses
import math
import typing

import typeguard

from fdjax.errors import UserError


class Checked:
    """Checks the type of every field when an instance is made; subclasses check values in `_check`."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            hint = hints[field.name]
            boolean_number = isinstance(value, bool) and hint is not bool
            try:
                typeguard.check_type(value, hint)
            except typeguard.TypeCheckError:
                boolean_number = True
            if boolean_number:
                wanted = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint)
                wanted = (wanted or str(hint)).replace("typing.", "")
                raise UserError(f"{type(self).__name__}.{field.name} must be {wanted}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{type(self).__name__}.{field.name} must be a finite number, got {value!r}")
        self._check()

    def _check(self) -> None:
        pass

    def _require(self, condition: bool, field: str, accepted: str) -> None:
        if not condition:
            raise UserError(f"{type(self).__name__}.{field} must be {accepted}, got {getattr(self, field)!r}")
