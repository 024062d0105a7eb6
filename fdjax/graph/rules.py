"""Rules on paths: patterns with the wildcards of `fnmatch` that name layers, and values for the layers that fit."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Generic, TypeVar

Value = TypeVar("Value")


def fits(name: str, rules: Iterable[str]) -> bool:
    """Returns whether a layer's name fits one of the rules."""
    return any(fnmatchcase(name, rule) for rule in rules)


def chosen(names: Iterable[str], include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Returns the names that fit a rule of `include` and none of `exclude`, in order."""
    return [name for name in names if fits(name, include) and not fits(name, exclude)]


def check_rules(rules: Iterable[str], names: Collection[str], what: str = "layer") -> None:
    """Checks that every rule fits at least one name.

    Args:
      rules: the rules to check; "*" always passes.
      names: names of the layers.
      what: what the message calls them.

    Raises:
      ValueError: a rule fits no name; the message lists similar names.
    """
    for rule in rules:
        if rule == "*" or any(fnmatchcase(name, rule) for name in names):
            continue
        near = close_names(rule, names)
        raise ValueError(
            f"the rule {rule!r} fits no {what}; "
            + (f"similar names are {', '.join(near)}" if near else f"the names are {_some(names)}")
        )


def close_names(rule: str, names: Collection[str], most: int = 5) -> list[str]:
    """Returns names that are spelled like a rule, in whole or in one part of their path."""
    plain = rule.replace("*", "").replace("?", "").strip("/") or rule
    parts: dict[str, list[str]] = {}
    for name in names:
        for part in (name, *name.split("/")):
            parts.setdefault(part, []).append(name)
    near = difflib.get_close_matches(plain, parts, n=most, cutoff=0.6)
    near += difflib.get_close_matches(plain.split("/")[0], parts, n=most, cutoff=0.7)
    return list(dict.fromkeys(name for part in near for name in parts[part]))[:most]


def _some(names: Collection[str], most: int = 8) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


class ByRule(Generic[Value]):
    """One value for all layers, or a mapping from rules to values; if several rules fit a layer, the last one counts.

    Args:
      given: a value, or rule -> value.
      default: the value where no rule fits.
    """

    def __init__(self, given: Value | Mapping[str, Value], default: Value):
        self._rules: dict[str, Value] = dict(given) if isinstance(given, Mapping) else {"*": given}
        self._default = default

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules, in order."""
        return tuple(self._rules)

    def of(self, *names: str) -> Value:
        """Returns the value for a layer, or for what several layers share."""
        fitting = (value for rule, value in reversed(self._rules.items()) if any(fnmatchcase(n, rule) for n in names))
        return next(fitting, self._default)
