"""The effect of each operation on channels: one rule per kind of operation, for the walk in `fdjax.graph.channels`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from fdjax.graph.identity import Ids, Live, Mixing
from fdjax.graph.operations import Operation

if TYPE_CHECKING:
    from fdjax.graph.channels import ChannelWalk

# Elementwise operations on one value.
UNARY = frozenset(
    """abs cbrt ceil convert_element_type copy copy_p cos erf erf_inv erfc exp exp2 expm1 floor integer_pow is_finite
    log log1p logistic neg not reduce_precision round rsqrt sign sin sqrt square stop_gradient tan tanh""".split()  # noqa: SIM905
)
# Elementwise operations on several values.
SEVERAL = frozenset(
    """add add_any and atan2 clamp div eq ge gt le lt max min mul ne nextafter or pow rem select_n sub xor""".split()  # noqa: SIM905
)
REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin")


# A rule sets the channels of the operation's outputs, or returns why the operation is not understood.
Rule = Callable[["ChannelWalk", int, Operation], "str | None"]


def _first_live(walk: ChannelWalk, operation: Operation) -> tuple[int, Live]:
    value = next(value for value in operation.inputs if value in walk.live)
    return value, walk.live[value]


def _elementwise(walk: ChannelWalk, index: int, operation: Operation) -> str | None:
    shape = walk.shape(operation.outputs[0])
    with_channels = [value for value in operation.inputs if value in walk.live and walk.live[value].ids is not None]
    if not with_channels:
        walk.set(operation.outputs[0], None, None)
        return None
    first = next((walk.live[value] for value in with_channels if walk.shape(value) == shape), None)
    if first is None or first.axis is None or first.ids is None:
        return f"{operation.kind} of values of different shapes"
    for value in with_channels:
        other, sides = walk.live[value], walk.shape(value)
        if other.axis != first.axis:
            return f"{operation.kind} of values whose channels lie on different axes"
        # A map of one pixel broadcasts to any map (squeeze-and-excite); a map of one channel does not.
        if len(sides) != len(shape) or sides[first.axis] != shape[first.axis]:
            return f"{operation.kind} of values with different numbers of channels"
    for value in with_channels:
        ids = walk.live[value].ids
        assert ids is not None
        walk.classes.join(first.ids, ids)
    walk.set(operation.outputs[0], first.axis, first.ids)
    return None


def _reduction(walk: ChannelWalk, index: int, operation: Operation) -> str | None:
    _, live = _first_live(walk, operation)
    axes = operation.params["axes"]
    if live.axis is None:
        walk.set(operation.outputs[0], None, None)
        return None
    if live.axis in axes:
        return f"{operation.kind} over channels"
    walk.set(operation.outputs[0], live.axis - sum(axis < live.axis for axis in axes), live.ids)
    return None


def _window(walk: ChannelWalk, index: int, operation: Operation) -> str | None:
    _, live = _first_live(walk, operation)
    if live.axis is None or operation.params["window_dimensions"][live.axis] != 1:
        return f"{operation.kind} over channels"
    walk.set(operation.outputs[0], live.axis, live.ids)
    return None


def _pad(walk: ChannelWalk, index: int, operation: Operation) -> str | None:
    if operation.inputs[0] not in walk.live:
        return "pad with a value that depends on the image"
    live = walk.live[operation.inputs[0]]
    if live.axis is None:
        return "pad of a value without channels"
    low, high, inner = (int(n) for n in operation.params["padding_config"][live.axis])
    if inner or low < 0 or high < 0:
        return "pad between channels"
    ids = live.ids
    if low or high:
        assert ids is not None
        ids = np.concatenate([walk.classes.fresh(low), ids, walk.classes.fresh(high)])
    walk.set(operation.outputs[0], live.axis, ids)
    return None


def _reshape(walk: ChannelWalk, index: int, operation: Operation) -> str | None:
    value, live = _first_live(walk, operation)
    before, after = walk.shape(value), walk.shape(operation.outputs[0])
    if live.axis is None:
        walk.set(operation.outputs[0], None, None)
        return None
    first, batch = [shape[0] if shape else 1 for shape in (before, after)], walk.batch
    if (first[0] == batch) != (first[1] == batch) and max(first) > batch:
        return f"{operation.kind} that merges images with pixels"
    ahead, seen = math.prod(before[: live.axis]), 1
    for axis, side in enumerate(after):
        # The first axis of both holds the images, also where a map has one channel.
        if seen == ahead and side == before[live.axis] and (axis > 0) == (live.axis > 0):
            walk.set(operation.outputs[0], axis, live.ids)
            return None
        seen *= side
    if operation.kind == "reshape" and walk.shuffle(index, operation):
        return None
    return f"{operation.kind} that splits or merges channels"


def _broadcast(walk: ChannelWalk, index: int, operation: Operation) -> str | None:
    value, live = _first_live(walk, operation)
    if live.axis is None:
        walk.set(operation.outputs[0], None, None)
        return None
    axis = operation.params["broadcast_dimensions"][live.axis]
    if walk.shape(operation.outputs[0])[axis] != walk.shape(value)[live.axis]:
        return "broadcast of one channel to several"
    walk.set(operation.outputs[0], axis, live.ids)
    return None


def _transpose(walk: ChannelWalk, index: int, operation: Operation) -> str | None:
    _, live = _first_live(walk, operation)
    axis = None if live.axis is None else operation.params["permutation"].index(live.axis)
    walk.set(operation.outputs[0], axis, live.ids)
    return None


def _concatenate(walk: ChannelWalk, index: int, operation: Operation) -> str | None:
    dimension, parts = operation.params["dimension"], []
    axes = {walk.live[value].axis for value in operation.inputs if value in walk.live}
    if len(axes) > 1 or None in axes:
        return "concatenate of values whose channels lie on different axes"
    axis = next(axis for axis in axes if axis is not None)
    for value in operation.inputs:
        live = walk.live.get(value)
        # A constant part gets fresh channels.
        parts.append(live.ids if live is not None else walk.classes.fresh(walk.shape(value)[axis]))
    if axis == dimension:
        walk.set(operation.outputs[0], axis, np.concatenate([part for part in parts if part is not None]))
        return None
    for part in parts[1:]:
        walk.classes.join(parts[0], part)
    walk.set(operation.outputs[0], axis, parts[0])
    return None


def _slice(walk: ChannelWalk, index: int, operation: Operation) -> str | None:
    _, live = _first_live(walk, operation)
    ids = live.ids
    if live.axis is not None and ids is not None:
        params, axis = operation.params, live.axis
        step = params["strides"][axis] if params["strides"] else 1
        ids = ids[params["start_indices"][axis] : params["limit_indices"][axis] : step]
    walk.set(operation.outputs[0], live.axis, ids)
    return None


def _split(walk: ChannelWalk, index: int, operation: Operation) -> str | None:
    _, live = _first_live(walk, operation)
    start = 0
    for value, size in zip(operation.outputs, operation.params["sizes"], strict=True):
        ids = live.ids
        if live.axis == operation.params["axis"] and ids is not None:
            ids = ids[start : start + size]
        walk.set(value, live.axis, ids)
        start += size
    return None


def _reverse(walk: ChannelWalk, index: int, operation: Operation) -> str | None:
    _, live = _first_live(walk, operation)
    if live.axis in operation.params["dimensions"]:
        return "rev of channels"
    walk.set(operation.outputs[0], live.axis, live.ids)
    return None


def _pin_constant_kernel(walk: ChannelWalk, kernel: int, reads: Ids, writes: Ids) -> None:
    """Pins the channels of a layer whose kernel is no variable: a masked function knows layers by their paths."""
    if not walk.kernel_of(kernel):
        walk.pin(np.concatenate([reads, writes]), "a layer with a constant kernel reads or writes it")


def _conv(walk: ChannelWalk, index: int, operation: Operation) -> str | None:
    image, kernel = operation.inputs
    if image not in walk.live or kernel in walk.live:
        return "a convolution whose kernel depends on the image"
    params, shape = operation.params, walk.shape(image)
    dimensions = params["dimension_numbers"]
    live, axis = walk.live[image], dimensions.lhs_spec[1]
    if params["batch_group_count"] != 1 or live.axis != axis or live.ids is None:
        return "a convolution over an axis that does not hold the channels"
    kernel_shape, output = walk.shape(kernel), operation.outputs[0]
    features, groups = kernel_shape[dimensions.rhs_spec[0]], params["feature_group_count"]
    depthwise = groups == shape[axis] == features and groups > 1
    writes = live.ids if depthwise else walk.classes.fresh(features)
    if not depthwise:
        _pin_constant_kernel(walk, kernel, live.ids, writes)
    walk.set(output, dimensions.out_spec[1], writes)
    walk.mixing.append(
        Mixing(
            operation=index,
            kind="depthwise" if depthwise else "conv",
            kernel=walk.kernel_of(kernel),
            value=image,
            reads=live.ids,
            writes=writes,
            in_size=tuple(shape[axis] for axis in dimensions.lhs_spec[2:]),
            out_size=tuple(walk.shape(output)[axis] for axis in dimensions.out_spec[2:]),
            window=tuple(kernel_shape[axis] for axis in dimensions.rhs_spec[2:]),
            stride=tuple(params["window_strides"]),
            groups=groups,
            in_place=all(step == 1 for step in params["lhs_dilation"]) and not np.any(params["padding"]),
        )
    )
    return None


def _dot(walk: ChannelWalk, index: int, operation: Operation) -> str | None:
    (contracted, batch) = operation.params["dimension_numbers"]
    live_inputs = [value in walk.live for value in operation.inputs]
    if all(live_inputs):
        return "a product of two values that depend on the image"
    side = live_inputs.index(True)
    value, other = operation.inputs[side], operation.inputs[1 - side]
    live, shape, output = walk.live[value], walk.shape(value), operation.outputs[0]
    own, kernels = contracted[side], contracted[1 - side]
    if batch[side] or live.ids is None or live.axis is None:
        return "a batched product, or one of a value without channels"
    free: list[int] = [axis for axis in range(len(shape)) if axis not in own]
    kernel_free = len(walk.shape(other)) - len(kernels)
    offset = 0 if side == 0 else kernel_free
    if live.axis not in own:
        # A product over pixels leaves the channels as they are.
        walk.set(output, offset + free.index(live.axis), live.ids)
        return None
    if len(own) != 1 or kernel_free != 1:
        return "a product over channels and more"
    (features,) = (side for axis, side in enumerate(walk.shape(other)) if axis not in kernels)
    writes = walk.classes.fresh(features)
    _pin_constant_kernel(walk, other, live.ids, writes)
    walk.set(output, len(free) if side == 0 else 0, writes)
    # Where pixels have been merged with the images, they are counted.
    merged = shape[free[0]] // walk.batch
    spatial = (*((merged,) if merged > 1 else ()), *(shape[axis] for axis in free[1:]))
    ones = (1,) * len(spatial)
    walk.mixing.append(
        Mixing(index, "dense", walk.kernel_of(other), value, live.ids, writes, spatial, spatial, ones, ones, 1)
    )
    return None


_RULES: Mapping[str, Rule] = {
    "pad": _pad,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "concatenate": _concatenate,
    "slice": _slice,
    "split": _split,
    "rev": _reverse,
    "conv_general_dilated": _conv,
    "dot_general": _dot,
}


def rule_of(kind: str) -> Rule | None:
    """Returns the rule for a kind of operation, or None if there is none."""
    if kind.startswith("reduce_window"):
        return _window
    if kind in REDUCTIONS:
        return _reduction
    return _RULES.get(kind) or (_elementwise if kind in UNARY | SEVERAL else None)
