"""Applies operations that carry channels along, or move them, to the channels that a frozen network keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fdjax.frozen.layers import Held, canonical_shape, places, uniform
from fdjax.graph.operations import Operation
from fdjax.graph.primitives import bind

if TYPE_CHECKING:
    from fdjax.frozen.folding import Folding

Params = Mapping[str, Any]
# The operation's parameters for the kept channels, and for each channel of the result its position in the
# (concatenated) inputs; None: channels do not move.
Adapted = tuple[Params, np.ndarray | None]


def carry(folding: Folding, operation: Operation) -> dict[int, Held] | None:
    """Applies an operation to the kept channels; returns the `Held` of its results, or None if it needs all channels.

    Raises:
      ValueError: if a frozen network has no form for the operation.
    """
    lives = [value for value in operation.inputs if folding.is_live(value)]
    if any(folding.held(value).order is None for value in lives):
        return None
    if operation.kind == "split":
        return _split(folding, operation)
    output = operation.outputs[0]
    if folding.axis_of(output) is None:
        return None
    pooled = _pooled(folding, operation)
    if pooled is not None:
        return {output: pooled}
    adapt = _ADAPT.get(operation.kind) or (_same if operation.kind.startswith("reduce") else None)
    if adapt is None:
        return None
    order, axis, shape = folding.order_of(output), folding.axis_of(output), folding.shape_of(output)
    assert axis is not None
    constant = constant_result(folding, operation, [folding.settled(value).offset for value in lives])
    if not _joins_constants(folding, operation):
        constant[..., order[~_added(folding, operation)[order]]] = 0.0
    if not len(order):
        return {output: Held(None, order, None, uniform(constant))}
    made = _applied(folding, operation, adapt, order, axis, shape)
    return {output: Held(made, order, None, uniform(constant))}


def _joins_constants(folding: Folding, operation: Operation) -> bool:
    """Whether constants, such as a learned token, are joined to one value that depends on an image."""
    lives = [folding.is_live(value) for value in operation.inputs]
    if operation.kind != "concatenate" or all(lives):
        return False
    if sum(lives) > 1 or operation.params["dimension"] == folding.axis_of(operation.outputs[0]):
        raise ValueError("a constant is concatenated to channels; a frozen network has no form for it")
    return True


def _added(folding: Folding, operation: Operation) -> np.ndarray:
    """Returns which channels of the result are new ones that hold a constant, bool [C]: those that a pad adds."""
    output = operation.outputs[0]
    axis = folding.axis_of(output)
    assert axis is not None
    added = np.zeros(folding.shape_of(output)[axis], bool)
    if operation.kind == "pad":
        low, high, _ = (int(n) for n in operation.params["padding_config"][axis])
        added[:low] = added[len(added) - high :] = True
    return added


def _applied(
    folding: Folding, operation: Operation, adapt: Any, order: np.ndarray, axis: int, shape: tuple[int, ...]
) -> int:
    """Emits the operation for the kept channels of its inputs; returns the result, channels last."""
    if _joins_constants(folding, operation):
        return _padded(folding, operation, order, axis, shape)
    arguments: list[int | np.ndarray] = []
    lying: list[np.ndarray] = []
    start = 0
    for value in operation.inputs:
        if not folding.is_live(value):
            arguments.append(folding.constant(value))
            continue
        held = folding.settled(value)
        assert held.order is not None
        at = folding.axis_of(value)
        assert at is not None
        # A part of which nothing is kept is left out.
        if len(held.order) or operation.kind != "concatenate":
            arguments.append(folding.graph_layout(folding.base_of(value), value))
            lying.append(held.order + start)
        start += folding.shape_of(value)[at]
    params, sources = adapt(folding, operation, len(lying[0]) if operation.kind != "concatenate" else 0)
    over_channels = operation.kind == "concatenate" and operation.params["dimension"] == axis
    at_hand = np.concatenate(lying) if over_channels else lying[0]
    sides = list(shape)
    sides[axis] = len(at_hand)
    made = folding.canonical(folding.builder.emit(operation.kind, arguments, sides[1:], params), operation.outputs[0])
    wanted = order if sources is None else sources[order]
    indices = places(wanted, at_hand)
    return made if indices is None else folding.builder.take(made, indices)


def _padded(folding: Folding, operation: Operation, order: np.ndarray, axis: int, shape: tuple[int, ...]) -> int:
    """Emits zeros in the place of constants that are joined to a value; the constants are part of the offset."""
    (live,) = (value for value in operation.inputs if folding.is_live(value))
    dimension, at = operation.params["dimension"], operation.inputs.index(live)
    sizes = [folding.shape_of(value)[dimension] for value in operation.inputs]
    config = [(0, 0, 0)] * len(shape)
    config[dimension] = (sum(sizes[:at]), sum(sizes[at + 1 :]), 0)
    base = folding.graph_layout(folding.base_of(live), live)
    sides = list(shape)
    sides[axis] = len(order)
    made = folding.builder.emit("pad", [base, np.zeros(())], sides[1:], {"padding_config": tuple(config)})
    return folding.canonical(made, operation.outputs[0])


def constant_result(folding: Folding, operation: Operation, offsets: Sequence[np.ndarray]) -> np.ndarray:
    """Applies an operation to the parts of its inputs that are the same for all images.

    Args:
      folding: the folding, which knows the operation's values.
      operation: an operation of one result, which has channels.
      offsets: those parts of its live inputs, [C] or [..., C] each.

    Returns:
      That part of its result, [C] or [..., C], float64.
    """
    output = operation.outputs[0]
    axis, shape = folding.axis_of(output), folding.shape_of(output)
    assert axis is not None
    fills = [
        folding.constant(value)
        for value in operation.inputs
        if not folding.is_live(value) and operation.kind in ("pad", "concatenate")
    ]
    if not any(offset.any() for offset in offsets) and not any(np.any(fill) for fill in fills):
        return np.zeros(shape[axis])
    remaining, inputs = iter(offsets), []
    for value in operation.inputs:
        if folding.is_live(value):
            at, sides = folding.axis_of(value), folding.shape_of(value)
            assert at is not None
            full = np.broadcast_to(next(remaining), canonical_shape(sides, at))
            inputs.append(np.moveaxis(full, -1, at).astype(np.float32))
        else:
            array = folding.constant(value)
            inputs.append(array.astype(np.float32) if np.issubdtype(array.dtype, np.floating) else array)
    made = np.asarray(bind(operation.kind, operation.params, inputs)[0], np.float64)
    return np.moveaxis(made, axis, -1)[0].copy()


def _pooled(folding: Folding, operation: Operation) -> Held | None:
    """Handles the sum over the map of a pointwise layer's output: the layer computes the mean itself.

    It then does not have to bring to pixels what is constant in every block.
    """
    if operation.kind != "reduce_sum":
        return None
    value = operation.inputs[0]
    held, axis, rank = folding.held(value), folding.axis_of(value), len(folding.shape_of(value))
    if set(operation.params["axes"]) != set(range(1, rank)) - {axis} or held.base is None or rank != 4:
        return None
    held = folding.settled(value)
    layer = held.layer
    # This gains time only if the layer is wrapped and its output is masked.
    if layer is None or layer.kind != "pointwise" or layer.block == 1 or layer.pooled or held.offset.ndim > 1:
        return None
    pixels = float(np.prod(layer.size))
    layer.pooled, layer.y = True, folding.builder.value((len(layer.y_order),))
    channels = held.offset.shape[-1]
    return Held(layer.y, held.order, np.full(channels, pixels), held.offset * pixels, layer)


# The functions below change an operation's parameters for `kept` channels.


def _same(folding: Folding, operation: Operation, kept: int) -> Adapted:
    return operation.params, None


def _reshape(folding: Folding, operation: Operation, kept: int) -> Adapted:
    sizes = list(folding.shape_of(operation.outputs[0]))
    sizes[folding.axis_of(operation.outputs[0]) or 0] = kept
    name = "new_sizes" if operation.kind == "reshape" else "shape"
    return {**operation.params, name: tuple(sizes)}, None


def _pad(folding: Folding, operation: Operation, kept: int) -> Adapted:
    axis = folding.axis_of(operation.inputs[0]) or 0
    config = [tuple(int(n) for n in item) for item in operation.params["padding_config"]]
    low, high, _ = config[axis]
    config[axis] = (0, 0, 0)
    params = {**operation.params, "padding_config": tuple(config)}
    if not low and not high:
        return params, None
    channels = folding.shape_of(operation.inputs[0])[axis]
    return params, np.concatenate([np.full(low, -1), np.arange(channels), np.full(high, -1)])


def _slice(folding: Folding, operation: Operation, kept: int) -> Adapted:
    axis, params = folding.axis_of(operation.inputs[0]) or 0, operation.params
    starts, limits = list(params["start_indices"]), list(params["limit_indices"])
    strides = list(params["strides"] or (1,) * len(starts))
    sources = np.arange(folding.shape_of(operation.inputs[0])[axis])[starts[axis] : limits[axis] : strides[axis]]
    starts[axis], limits[axis], strides[axis] = 0, kept, 1
    adapted = {"start_indices": tuple(starts), "limit_indices": tuple(limits), "strides": tuple(strides)}
    return {**params, **adapted}, sources


_ADAPT: Mapping[str, Callable[[Folding, Operation, int], Adapted]] = {
    "reshape": _reshape,
    "broadcast_in_dim": _reshape,
    "squeeze": _same,
    "expand_dims": _same,
    "transpose": _same,
    "concatenate": _same,
    "rev": _same,
    "pad": _pad,
    "slice": _slice,
}


def _split(folding: Folding, operation: Operation) -> dict[int, Held]:
    """Handles a split as one slice for each part."""
    axis, start, found = operation.params["axis"], 0, {}
    shape = folding.shape_of(operation.inputs[0])
    for value, size in zip(operation.outputs, operation.params["sizes"], strict=True):
        starts, limits = [0] * len(shape), list(shape)
        starts[axis], limits[axis] = start, start + size
        params = {"start_indices": tuple(starts), "limit_indices": tuple(limits), "strides": None}
        held = carry(folding, Operation("slice", operation.inputs, (value,), params, operation.source))
        assert held is not None
        found |= held
        start += size
    return found
