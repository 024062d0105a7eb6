"""Finds the weights in what a training program saved: under a key, beside averaged weights, behind wrappers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fdjax.errors import UserError

_WEIGHTS = (
    "state_dict", "model", "model_state_dict", "model_state", "net", "network", "module", "weights", "params",
    "model_weights", "net_state_dict", "backbone",
)  # fmt: skip
_AVERAGED = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "ema_model", "model_ema_state_dict",
    "ema_model_state_dict", "model_state_dict_ema", "params_ema", "averaged_model", "model_avg", "swa_model",
    "swa_state_dict", "swa_model_state_dict", "shadow", "shadow_params",
)  # fmt: skip
_NEVER = re.compile("optim|sched|scaler|momentum|loss|criterion", re.IGNORECASE)
# Prefixes that wrappers (DataParallel, torch.compile, Lightning) add to every name.
_WRAPPERS = ("module.", "_orig_mod.", "model.")
# torch.optim.swa_utils.AveragedModel counts its updates beside the weights.
_AVERAGED_COUNT = "n_averaged"
_DEPTH = 5


class Weights(NamedTuple):
    """Weights by name.

    Attributes:
      tensors: name -> array.
      notes: what a user should know about how they were found, in whole sentences.
      averaged: whether they are averages over training (EMA, SWA).
    """

    tensors: dict[str, Any]
    notes: list[str]
    averaged: bool


def choose(content: Any, tensor: type, file: str, averaged: bool) -> Weights:
    """Finds the state dict in the content of a file.

    Args:
      content: mappings at any depth, with tensors and other objects.
      tensor: the type of a tensor.
      file: what messages call the file.
      averaged: whether to take the averaged weights of a file that has both.

    Returns:
      The weights.

    Raises:
      UserError: there is no state dict, there are several, or there are no averaged weights and `averaged` is set.
    """
    plain = _find(content, tensor, _WEIGHTS)
    ema = _find_averaged(content, tensor)
    # Single numbers beside the weights are metrics of the training.
    if ema is None and (plain is None or (not plain[0] and _are_numbers(plain[1]))):
        plain = _only_one(content, tensor, file) or plain
    if plain is not None and _AVERAGED_COUNT in plain[1]:
        plain, ema = None, ema or plain
    if averaged and ema is None:
        raise UserError(f"{file} has no averaged weights (EMA); leave --ema out")
    if plain is None and ema is None:
        raise _nothing(content, file)
    notes = []
    key, tensors = (ema if averaged or plain is None else plain) or ("", {})
    if plain is not None and ema is not None:
        other = "the plain weights are" if averaged else "the averaged weights (EMA) are taken with --ema; they are"
        where = plain[0] if averaged else ema[0]
        notes.append(f"the file has two sets of weights: those under {key or 'no key'!r} are taken; {other} under "
                     f"{where or 'no key'!r}")  # fmt: skip
    elif plain is None:
        notes.append("the weights are averages over training (EMA)" + (f", under {key!r}" if key else ""))
    tensors = {name: value for name, value in tensors.items() if name != _AVERAGED_COUNT}
    return Weights(unwrapped(tensors), notes, plain is None or averaged)


def _are_numbers(tensors: Mapping[str, Any]) -> bool:
    return all(getattr(tensor, "shape", None) == () for tensor in tensors.values())


def unwrapped(tensors: dict[str, Any]) -> dict[str, Any]:
    """Removes the prefixes that wrappers add to every name."""
    for prefix in _WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return unwrapped({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    return tensors


def _nothing(content: Any, file: str) -> UserError:
    kind = getattr(content, "name", type(content).__name__)
    return UserError(
        f"{file} holds no state dict (names with tensors) but a {kind}; save one with "
        "torch.save(model.state_dict(), FILE)"
    )


Found = tuple[str, dict[str, Any]]


def _find(content: Any, tensor: type, keys: tuple[str, ...], at: str = "") -> Found | None:
    # Mappings that have been looked into: a file may hold one in itself, under many keys.
    seen: set[int] = set()

    def within(content: Any, depth: int, at: str) -> Found | None:
        if not isinstance(content, Mapping) or not depth or id(content) in seen:
            return None
        seen.add(id(content))
        for key in keys:
            inner = within(content.get(key), depth - 1, f"{at}.{key}" if at else key)
            if inner is not None:
                return inner
        return _tensors(content, tensor, at)

    return within(content, _DEPTH, at)


def _tensors(content: Mapping[Any, Any], tensor: type, at: str) -> Found | None:
    found = {str(name): value for name, value in content.items() if isinstance(value, tensor)}
    if not found:
        return None
    odd = {
        str(name): value
        for name, value in content.items()
        if str(getattr(value, "name", "")).startswith("torch._utils._rebuild_")
    }
    return at, {**found, **odd}


def _find_averaged(content: Any, tensor: type) -> Found | None:
    if not isinstance(content, Mapping):
        return None
    for key in _AVERAGED:
        if key in content:
            found = _find(content[key], tensor, (*_WEIGHTS, *_AVERAGED), at=key)
            if found is not None:
                return found
    return None


def _only_one(content: Any, tensor: type, file: str) -> Found | None:
    """Returns the state dict under an unknown key, if there is exactly one."""
    if not isinstance(content, Mapping):
        return None
    found = {}
    for key, value in content.items():
        if isinstance(key, str) and not _NEVER.search(key):
            inner = _find(value, tensor, _WEIGHTS, at=key)
            if inner is not None:
                found[key] = inner
    if len(found) > 1:
        names = ", ".join(map(repr, list(found)[:10]))
        raise UserError(f"{file} has several sets of tensors, under {names}; save the one that is meant, alone")
    return next(iter(found.values()), None)


_COPIES = re.compile(r"(^|[._])(ema|avg|averaged|swa|teacher|shadow)([._])", re.IGNORECASE)


def without_prefix(
    tensors: Mapping[str, np.ndarray], wanted: set[str], averaged: bool = False
) -> tuple[dict[str, np.ndarray], str]:
    """Removes the prefix behind which most of the wanted names are found.

    Names with another prefix that are copies of these ("model_ema.", "teacher.") are dropped.

    Args:
      tensors: name -> array.
      wanted: the wanted names.
      averaged: whether to prefer the prefix of a copy.

    Returns:
      The tensors, and the prefix, which is "" if there is none.
    """
    counts: dict[str, int] = {}
    for name in tensors:
        for start in (0, *(match.end() for match in re.finditer(r"[./]", name))):
            if name[start:] in wanted:
                counts[name[:start]] = counts.get(name[:start], 0) + 1
    if not counts:
        return dict(tensors), ""
    most = max(counts.values())
    often = [prefix for prefix, count in counts.items() if 2 * count > most]
    prefix = max(often, key=lambda one: (bool(_COPIES.search(one)) == averaged, counts[one], -len(one)))
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not prefix:
        return {name: tensor for name, tensor in inside.items() if not _COPIES.search(name)}, ""
    beside = [other for other in often if other != prefix]
    left = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith((prefix, *filter(None, beside))) and not _COPIES.search(name)
    }
    return {**inside, **left}, prefix
