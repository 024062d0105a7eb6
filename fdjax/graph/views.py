"""Views: values that only reorder the axes of another value, and add or drop axes of length 1.

Models with channels first, and models under `vmap`, make such a view before every layer and undo it afterwards. Equal
views of one value are the same value, so the operation that makes the second one is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fdjax.graph.operations import Operation, Operations

# For each axis of a view, the axis of the viewed value; None for an added axis of length 1.
Axes = tuple[int | None, ...]


def _transpose(params: Mapping[str, Any], axes: Axes, lengths: Sequence[int]) -> Axes | None:
    return tuple(axes[axis] for axis in params["permutation"])


def _squeeze(params: Mapping[str, Any], axes: Axes, lengths: Sequence[int]) -> Axes | None:
    gone = {axis % len(axes) for axis in params["dimensions"]}
    if any(axes[axis] is not None for axis in gone):
        return None
    return tuple(entry for axis, entry in enumerate(axes) if axis not in gone)


def _broadcast(params: Mapping[str, Any], axes: Axes, lengths: Sequence[int]) -> Axes | None:
    made: list[int | None] = [None] * len(params["shape"])
    sizes = [1] * len(made)
    for axis, place in enumerate(params["broadcast_dimensions"]):
        made[place], sizes[place] = axes[axis], lengths[axis]
    return tuple(made) if sizes == list(params["shape"]) else None


def _reshape(params: Mapping[str, Any], axes: Axes, lengths: Sequence[int]) -> Axes | None:
    if params.get("dimensions"):
        return None
    left = [(axis, length) for axis, length in zip(axes, lengths, strict=True) if axis is not None]
    made: list[int | None] = []
    for size in params["new_sizes"]:
        if left and left[0][1] == size:
            made.append(left.pop(0)[0])
        elif size == 1:
            made.append(None)
        else:
            return None
    return None if left else tuple(made)


# (parameters, axes before, their lengths) -> axes after, or None if the result is not a view.
_RULES: Mapping[str, Callable[[Mapping[str, Any], Axes, Sequence[int]], Axes | None]] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
}


class Views:
    """The known views of the values of a network.

    Args:
      shapes: shape of every value, with the batch size of the operations' parameters.
    """

    def __init__(self, shapes: Sequence[Sequence[int]]):
        self._shapes = shapes
        self._views: dict[int, tuple[int, Axes]] = {}
        self._known: dict[tuple[int, Axes], int] = {}

    def of(self, value: int) -> tuple[int, Axes]:
        """Returns the value that this value is a view of, and the axes; a value that is no view is a view of itself."""
        if value not in self._views:
            view = self._views[value] = value, tuple(range(len(self._shapes[value])))
            self._known.setdefault(view, value)
        return self._views[value]

    def twin(self, kind: str, params: Mapping[str, Any], value: int, made: int) -> int | None:
        """Looks for a known value that equals the output of an operation.

        If there is none and the output is a view, it becomes known as such.

        Args:
          kind: kind of the operation.
          params: its parameters.
          value: its input.
          made: its output.

        Returns:
          The equal value, or None.
        """
        if kind not in _RULES:
            return None
        root, axes = self.of(value)
        lengths = [1 if axis is None else self._shapes[root][axis] for axis in axes]
        found = _RULES[kind](params, axes, lengths)
        if found is None:
            return None
        twin = self._known.get((root, found))
        if twin is None:
            self._views[made] = root, found
            self._known[root, found] = made
        return twin


def without_views(operations: Operations) -> Operations:
    """Returns the operations without those that repeat a known view."""
    views, same, kept = Views(operations.shapes), dict[int, int](), list[Operation]()
    for operation in operations.operations:
        inputs = tuple(same.get(value, value) for value in operation.inputs)
        twin = views.twin(operation.kind, operation.params, inputs[0], operation.outputs[0]) if inputs else None
        if twin is None:
            kept.append(dataclasses.replace(operation, inputs=inputs))
        else:
            same[operation.outputs[0]] = twin
    outputs = tuple(same.get(value, value) for value in operations.outputs)
    return dataclasses.replace(operations, operations=tuple(kept), outputs=outputs)
