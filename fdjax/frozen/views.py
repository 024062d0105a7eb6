"""Removes reshapes and transpositions of a program that undo each other; see `fdjax.graph.views`."""

from __future__ import annotations

import dataclasses
import json

from fdjax.frozen.program import Apply, Operation, Program
from fdjax.graph.views import Views


def without_views(program: Program) -> Program:
    """Returns the program with equal views as one value, and successive transpositions as one.

    Operations whose results nothing reads any more are still in it.
    """
    shapes = [(1, *shape) for shape in program.shapes]  # as an operation's parameters have the batch
    views, same, kept = Views(shapes), dict[int, int](), list[Operation]()
    for operation in program.operations:
        if not isinstance(operation, Apply):
            kept.append(dataclasses.replace(operation, x=same.get(operation.x, operation.x)))
            continue
        inputs = tuple(same.get(value, value) for value in operation.inputs)
        operation = dataclasses.replace(operation, inputs=inputs)
        if len(inputs) == 1 and inputs[0] >= 0:
            made = operation.outputs[0]
            twin = views.twin(operation.kind, json.loads(operation.params), inputs[0], made)
            if twin is not None and program.shapes[twin] == program.shapes[made]:
                same[made] = twin
                continue
            root, axes = views.of(made)
            order = [axis for axis in axes if axis is not None]
            if operation.kind == "transpose" and len(order) == len(axes) == len(shapes[root]):
                params = json.dumps({"permutation": order})
                operation = dataclasses.replace(operation, inputs=(root,), params=params)
        kept.append(operation)
    outputs = tuple(same.get(value, value) for value in program.outputs)
    return dataclasses.replace(program, operations=tuple(kept), outputs=outputs)
