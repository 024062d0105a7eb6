"""Leaves out of a program what only moves a map about and brings it back.

Models with channels first, and models under `vmap`, transpose, add axes of length 1 and take them away around every
layer. What such operations make is a view of another value: some order of its axes, with axes of length 1 anywhere.
Equal views of one value are one value.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from fdjax.frozen.program import Apply, Operation, Program

# For each axis of a view the axis of the value it is of; None: an axis of length 1. Axis 0 is the batch's.
Axes = tuple[int | None, ...]
# (parameters, axes before, lengths before) -> axes after; None where it is no view. The batch has the length 1.
_Rule = Callable[[dict[str, Any], Axes, tuple[int, ...]], Axes | None]


def _transpose(params: dict[str, Any], axes: Axes, lengths: tuple[int, ...]) -> Axes | None:
    return tuple(axes[axis] for axis in params["permutation"])


def _squeeze(params: dict[str, Any], axes: Axes, lengths: tuple[int, ...]) -> Axes | None:
    gone = {axis % len(axes) for axis in params["dimensions"]}
    return None if any(axes[axis] is not None for axis in gone) else tuple(
        entry for axis, entry in enumerate(axes) if axis not in gone
    )  # fmt: skip


def _broadcast(params: dict[str, Any], axes: Axes, lengths: tuple[int, ...]) -> Axes | None:
    made: list[int | None] = [None] * len(params["shape"])
    for axis, place in enumerate(params["broadcast_dimensions"]):
        made[place] = axes[axis]
    sizes = [1] * len(made)
    for axis, place in enumerate(params["broadcast_dimensions"]):
        sizes[place] = lengths[axis]
    return tuple(made) if sizes == list(params["shape"]) else None


def _reshape(params: dict[str, Any], axes: Axes, lengths: tuple[int, ...]) -> Axes | None:
    sizes = params["new_sizes"]
    before = [(axis, length) for axis, length in zip(axes[1:], lengths[1:], strict=True) if axis is not None]
    longer = [size for size in sizes[1:] if size != 1]
    # The batch comes first in a reshaped value.
    if params.get("dimensions") or axes[:1] != (0,) or sizes[:1] != (1,) or longer != [length for _, length in before]:
        return None
    rest = iter(before)
    return (0, *(None if size == 1 else next(rest)[0] for size in sizes[1:]))


_RULES: dict[str, _Rule] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
}


def without_views(program: Program) -> Program:
    """The same program, in which views that are equal are one value, and an order of axes is made in one step.

    What nothing reads any more is still in it.
    """
    same: dict[int, int] = {}
    views: dict[int, tuple[int, Axes]] = {}
    known: dict[tuple[int, Axes], int] = {}

    def view_of(value: int) -> tuple[int, Axes]:
        if value not in views:
            # An axis of length 1 is as good as any other.
            shape = program.shapes[value]
            views[value] = value, (0, *(axis if size != 1 else None for axis, size in enumerate(shape, 1)))
            known[views[value]] = value
        return views[value]

    def seen_through(operation: Apply) -> Operation | None:
        """The operation, or a shorter one; None where there is a value like what it makes."""
        params = json.loads(operation.params)
        if operation.kind not in _RULES or len(operation.inputs) != 1 or operation.inputs[0] < 0:
            return operation
        root, axes = view_of(operation.inputs[0])
        lengths = tuple(1 if not axis else program.shapes[root][axis - 1] for axis in axes)
        found = _RULES[operation.kind](_as_tuples(params), axes, lengths)
        if found is None:
            return operation
        (made,), view = operation.outputs, (root, found)
        twin = known.get(view)
        if twin is not None and program.shapes[twin] == program.shapes[made]:
            same[made] = twin
            return None
        views[made] = view
        known.setdefault(view, made)
        order = [axis for axis in found if axis is not None]
        if operation.kind == "transpose" and sorted(order) == list(range(len(program.shapes[root]) + 1)) == [
            *range(len(found))
        ]:
            return dataclasses.replace(operation, inputs=(root,), params=json.dumps({"permutation": order}))
        return operation

    kept: list[Operation] = []
    for operation in program.operations:
        if isinstance(operation, Apply):
            inputs = tuple(same.get(value, value) for value in operation.inputs)
            seen = seen_through(dataclasses.replace(operation, inputs=inputs))
        else:
            seen = dataclasses.replace(operation, x=same.get(operation.x, operation.x))
        kept += [] if seen is None else [seen]
    outputs = tuple(same.get(value, value) for value in program.outputs)
    return dataclasses.replace(program, operations=tuple(kept), outputs=outputs)


def _as_tuples(params: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in params.items()}
