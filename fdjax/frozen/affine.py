"""Rules for affine and elementwise operations, whose scales and offsets are carried along with a value.

A rule returns the `Held` of the operation's result, or None if it does not apply.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fdjax.frozen.layers import Held, canonical_shape, uniform
from fdjax.frozen.program import Activation
from fdjax.graph.channel_rules import SEVERAL, UNARY
from fdjax.graph.operations import Operation
from fdjax.graph.primitives import bind

if TYPE_CHECKING:
    from fdjax.frozen.folding import Folding

# Operations that are the identity in a network that computes in float32.
_NOTHING = ("convert_element_type", "copy", "copy_p", "stop_gradient", "reduce_precision")


def _shifted(folding: Folding, operation: Operation) -> Held | None:
    """Handles additions and subtractions."""
    sign = -1.0 if operation.kind == "sub" else 1.0
    first, second = operation.inputs[:2]
    if folding.is_live(first) and folding.is_live(second):
        same = folding.shape_of(first) == folding.shape_of(second)
        return folding.combine(operation, sign) if same else None
    live, constant = (first, second) if folding.is_live(first) else (second, first)
    held, vector = folding.held(live), folding.vector(constant, live)
    if vector is None or held.order is None:
        return None
    if live == first:
        return dataclasses.replace(held, offset=held.offset + sign * vector)
    if sign > 0:
        return dataclasses.replace(held, offset=held.offset + vector)
    scale = -np.ones(len(vector)) if held.scale is None else -held.scale
    return dataclasses.replace(held, scale=scale, offset=vector - held.offset)


def _scaled(folding: Folding, operation: Operation) -> Held | None:
    """Handles multiplications and divisions by values that do not depend on the image."""
    first, second = operation.inputs
    if folding.is_live(first) and folding.is_live(second):
        return None
    live, constant = (first, second) if folding.is_live(first) else (second, first)
    held, vector = folding.held(live), folding.vector(constant, live)
    if vector is None or held.order is None or (operation.kind == "div" and live != first):
        return None
    factor = 1 / vector if operation.kind == "div" else vector
    scale = factor if held.scale is None else held.scale * factor
    return dataclasses.replace(held, scale=scale, offset=held.offset * factor)


def _negated(folding: Folding, operation: Operation) -> Held | None:
    held = folding.held(operation.inputs[0])
    if held.order is None:
        return None
    scale = -np.ones(held.offset.shape[-1]) if held.scale is None else -held.scale
    return dataclasses.replace(held, scale=scale, offset=-held.offset)


def _passed(folding: Folding, operation: Operation) -> Held | None:
    """Handles operations that are the identity; a conversion is one if its result is floating point.

    Images of integers are floating point in a frozen network; other integers and conditions are not.
    """
    (value,), (output,) = operation.inputs, operation.outputs
    if operation.kind == "convert_element_type" and not (
        folding.is_floating(output) and (folding.is_floating(value) or folding.is_image(value))
    ):
        return None
    return dataclasses.replace(folding.held(value))


def _activation(folding: Folding, operation: Operation) -> Held | None:
    """Handles max(x, 0), and min(x, 6) after it, which become the activation of the layer before."""
    lives = [value for value in operation.inputs if folding.is_live(value)]
    if len(lives) > 1 or folding.held(lives[0]).order is None:
        return None
    (bound,) = (folding.constant(value) for value in operation.inputs if value != lives[0])
    key = (operation.kind, float(bound.reshape(-1)[0])) if bound.size == 1 else None
    before, after = _ACTIVATIONS.get(key, (None, None))
    if before is None or after is None:
        return None
    held = folding.settled(lives[0]) if operation.kind == "max" else folding.held(lives[0])
    assert held.order is not None
    plain = held.scale is None and not held.offset[..., held.order].any()
    clip = np.maximum if operation.kind == "max" else np.minimum
    present = np.zeros(held.offset.shape[-1], bool)
    present[held.order] = True
    offset = uniform(np.where(present, 0.0, clip(held.offset, key[1] if key else 0.0)))
    if plain and held.activation in (after, "relu6"):
        return dataclasses.replace(held, offset=offset)
    if held.layer is None or held.activation != before or held.layer.pooled or not plain:
        return None
    held.layer.activation = after
    return dataclasses.replace(held, offset=offset, activation=after)


# (operation, bound) -> the activation of the value before the operation, and after it.
_ACTIVATIONS: Mapping[Any, tuple[Activation, Activation]] = {
    ("max", 0.0): ("none", "relu"),
    ("min", 6.0): ("relu", "relu6"),
}


def _with_batch(array: np.ndarray, rank: int) -> np.ndarray:
    """Adds leading axes of length 1 to an array, up to `rank` axes."""
    return array.reshape(*(1,) * (rank - array.ndim), *array.shape)


def _elementwise_constant(
    folding: Folding, operation: Operation, constants: Sequence[np.ndarray], channels: int
) -> np.ndarray:
    """Applies an elementwise operation to the parts of its inputs that are the same for all images, [C] or [..., C]."""
    shape = np.broadcast_shapes((channels,), *(array.shape for array in constants if array.size > 1))
    filled = []
    for value, array in zip(operation.inputs, constants, strict=True):
        typed = array.astype(folding.host_dtype(value))
        filled.append(np.broadcast_to(typed.reshape(()) if array.size == 1 else typed, shape))
    return np.asarray(bind(operation.kind, operation.params, filled)[0], np.float64)


def _nonlinear(folding: Folding, operation: Operation) -> Held | None:
    """Handles any other elementwise operation: applies it to the kept channels, and to the constant channels."""
    output = operation.outputs[0]
    shape, axis = folding.shape_of(output), folding.axis_of(output)
    lives = [value for value in operation.inputs if folding.is_live(value)]
    if axis is None or any(folding.held(v).order is None or folding.axis_of(v) != axis for v in lives):
        return None
    if any(len(folding.shape_of(v)) != len(shape) or folding.shape_of(v)[axis] != shape[axis] for v in lives):
        return None
    order, channels = folding.order_of(output), shape[axis]
    kept_shape = (*canonical_shape(shape, axis)[1:-1], len(order))
    arguments: list[int | np.ndarray] = []
    constants: list[np.ndarray] = []
    for value in operation.inputs:
        if folding.is_live(value):
            held = folding.settled(value)
            arguments.append(folding.base_of(value))
            constants.append(held.offset)
        else:
            array = folding.constant(value)
            if array.size > 1:
                array = np.moveaxis(np.broadcast_to(array, shape), axis, -1)[0]
                array = uniform(array) if np.issubdtype(array.dtype, np.floating) else array
            constants.append(array)
            arguments.append(_with_batch(array[..., order], len(shape)) if array.size > 1 else array)
    offset = _elementwise_constant(folding, operation, constants, channels)
    present = np.zeros(channels, bool)
    present[order] = True
    offset = uniform(np.where(present, 0.0, offset))
    if not len(order):
        return Held(None, order, None, offset)
    made = folding.builder.emit(operation.kind, arguments, kept_shape, operation.params)
    return Held(made, order, None, offset)


_RULES: Mapping[str, Callable[[Folding, Operation], Held | None]] = {
    **dict.fromkeys(_NOTHING, _passed),
    "add": _shifted,
    "add_any": _shifted,
    "sub": _shifted,
    "mul": _scaled,
    "div": _scaled,
    "neg": _negated,
    "max": _activation,
    "min": _activation,
}


def apply_rule(folding: Folding, operation: Operation) -> Held | None:
    """Returns the `Held` of an affine or elementwise operation's result; None if no rule applies to the operation."""
    rule = _RULES.get(operation.kind)
    if operation.kind not in _NOTHING:
        for value in operation.inputs:
            if folding.is_live(value) and folding.is_image(value) and not folding.is_floating(value):
                raise ValueError(
                    f"{operation.kind} of images of integers, which a frozen network takes as floating point: convert "
                    "them to it first"
                )
    # Integers are not scaled and shifted: their arithmetic rounds.
    if operation.kind not in _NOTHING and not folding.is_floating(operation.outputs[0]):
        rule = None
    held = rule(folding, operation) if rule is not None else None
    if held is None and operation.kind in UNARY | SEVERAL:
        held = _nonlinear(folding, operation)
    return held
