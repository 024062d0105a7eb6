"""Views: what only orders a value's axes anew, adds axes of length 1 and takes them away.

Models with channels first, and models under `vmap`, do that around every layer, and undo it. Equal views of one value
are one value: what makes the second is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fdjax.graph.operations import Operation, Operations

# For each axis of a view the axis of the value that it is of; None: an axis of length 1 that was added.
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


# (parameters, axes before, their lengths) -> axes after; None where it is no view.
_RULES: Mapping[str, Callable[[Mapping[str, Any], Axes, Sequence[int]], Axes | None]] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
}


class Views:
    """The views that are known, of values of these shapes.

    Args:
      shapes: of every value, with the batch as it stands in the operations' parameters.
    """

    def __init__(self, shapes: Sequence[Sequence[int]]):
        self._shapes = shapes
        self._views: dict[int, tuple[int, Axes]] = {}
        self._known: dict[tuple[int, Axes], int] = {}

    def of(self, value: int) -> tuple[int, Axes]:
        """The value that this one is a view of, and the axes; of itself, if it is no view."""
        if value not in self._views:
            view = self._views[value] = value, tuple(range(len(self._shapes[value])))
            self._known.setdefault(view, value)
        return self._views[value]

    def twin(self, kind: str, params: Mapping[str, Any], value: int, made: int) -> int | None:
        """A value that is the same view as what an operation makes of `value`; None where there is none.

        `made` is then known as a view, if it is one.
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
    """The same operations, without those that make a view which is there already."""
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
