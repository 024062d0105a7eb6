"""Converts labels of any type that a file may hold to class numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from fdjax.errors import UserError


def class_numbers(values: Any, where: str) -> np.ndarray:
    """Returns labels as integers.

    Args:
      values: numbers [n], an array or a list: integers of any type, booleans (0 and 1), or floats that are whole.
      where: what a message calls their place.

    Returns:
      int64 [n].

    Raises:
      UserError: the labels are of another type, such as text, or one is not a whole number.
    """
    try:
        given = np.asarray(values)
    except ValueError:  # Lists of different lengths.
        given = np.asarray([None])
    if given.ndim == 1 and (given.dtype.kind in "biu" or not given.size):
        wrong = given.astype(np.float64) >= 2.0**63 if given.size else np.zeros(0, bool)
    elif given.ndim == 1 and given.dtype.kind == "f":
        # NaN and infinities are not whole either.
        wrong = ~np.isfinite(given) | (np.floor(given) != given) | (np.abs(given) >= 2.0**53)
    else:
        wrong = np.ones(1, bool)
    if wrong.any():
        first = given.reshape(-1)[int(np.argmax(wrong))]
        shown = first.item() if isinstance(first, np.generic) else first
        raise UserError(
            f"{where} has the label {shown!r} (of type {given.dtype}); labels must be the numbers of the classes, "
            "from 0"
        )
    return given.astype(np.int64)
