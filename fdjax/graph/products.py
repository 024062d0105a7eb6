"""MACs of the products and convolutions within any operation, among them those in the body of a loop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fdjax.graph.operations import Operation


def operation_macs(operation: Operation, shapes: Sequence[tuple[int, ...]]) -> int:
    """Counts the multiply-accumulates of an operation's products and convolutions.

    A scan counts as often as it repeats its body, a condition its dearest branch, and a while loop its body once,
    because how often it repeats is not known.

    Args:
      operation: the operation.
      shapes: shape of every value of the network, by number.

    Returns:
      The MACs; 0 for operations of other kinds.
    """
    inputs, outputs = ([shapes[value] for value in values] for values in (operation.inputs, operation.outputs))
    return _macs(operation.kind, operation.params, inputs, outputs)


def _macs(
    kind: str, params: Mapping[str, Any], inputs: Sequence[tuple[int, ...]], outputs: Sequence[tuple[int, ...]]
) -> int:
    if kind == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return math.prod(outputs[0]) * math.prod(inputs[0][axis] for axis in contracted)
    if kind == "conv_general_dilated":
        # Of the kernel [D, C / groups, window], each output takes one of the D.
        features = inputs[1][params["dimension_numbers"].rhs_spec[0]]
        return math.prod(outputs[0]) * math.prod(inputs[1]) // features
    bodies = [_body_macs(body) for value in params.values() for body in _bodies(value)]
    if kind == "cond":
        return max(bodies, default=0)
    return sum(bodies) * int(params["length"] if kind == "scan" else 1)


def _bodies(value: Any) -> list[Any]:
    """Returns the jaxprs that a parameter holds."""
    values = value if isinstance(value, list | tuple) else [value]
    return [getattr(each, "jaxpr", each) for each in values if hasattr(getattr(each, "jaxpr", each), "eqns")]


def _body_macs(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        inputs, outputs = ([tuple(atom.aval.shape) for atom in atoms] for atoms in (equation.invars, equation.outvars))
        total += _macs(equation.primitive.name, equation.params, inputs, outputs)
    return total
