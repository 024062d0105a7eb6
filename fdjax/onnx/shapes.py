"""ONNX's operators that only move, cut and repeat numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jax import lax

from fdjax.onnx.values import (
    TO_FIRST,
    TO_LAST,
    Call,
    Tensor,
    Unsupported,
    Value,
    as_in_onnx,
    with_channels_last,
)


def _reshape(call: Call) -> Tensor:
    value, wanted = call.tensor(), list(call.known(1, "shape"))
    shape = value.shape
    if not call.attributes.get("allowzero"):
        wanted = [shape[at] if size == 0 else size for at, size in enumerate(wanted)]
    exported, images = call.batch
    if exported not in (None, images) and wanted and wanted[0] == exported and shape[0] == images:
        wanted[0] = images  # The file was exported for another number of images.
    if value.channels_last and shape[2:] == (1, 1) and len(wanted) == 2 and wanted in ([shape[0], -1], [*shape[:2]]):
        return Tensor(value.array.reshape(shape[:2]))
    return Tensor(as_in_onnx(value).reshape(wanted))


def _flatten(call: Call) -> Tensor:
    value, axis = call.tensor(), call.attributes.get("axis", 1)
    axis = axis % value.ndim if axis < 0 else axis
    if value.channels_last and axis == 1 and value.shape[2:] == (1, 1):
        return Tensor(value.array.reshape(value.shape[:2]))
    return Tensor(as_in_onnx(value).reshape(math.prod(value.shape[:axis]), -1))


def _transpose(call: Call) -> Tensor:
    value = call.tensor()
    order = tuple(call.attributes.get("perm", range(value.ndim)[::-1]))
    if value.channels_last and order == TO_LAST:
        return Tensor(value.array)
    if not value.channels_last and order == TO_FIRST:
        return Tensor(value.array, channels_last=True)
    return Tensor(as_in_onnx(value).transpose(order))


def _squeeze(call: Call) -> Tensor:
    value, axes = call.tensor(), call.known(1, "axes")
    shape = value.shape
    if axes is None:  # However few images there are, their axis stays.
        axes = [at for at, size in enumerate(shape) if size == 1 and at]
    gone = {at % len(shape) for at in axes}
    if value.channels_last and gone == {2, 3}:
        return Tensor(value.array.reshape(shape[:2]))
    return Tensor(as_in_onnx(value).reshape([size for at, size in enumerate(shape) if at not in gone]))


def _unsqueeze(call: Call) -> Tensor:
    value, axes = call.tensor(), call.known(1, "axes")
    if value.ndim == 2 and sorted(axes) in ([2, 3], [-2, -1]):
        return Tensor(value.array[:, None, None, :], channels_last=True)
    ndim = value.ndim + len(axes)
    return Tensor(jnp.expand_dims(as_in_onnx(value), [axis % ndim for axis in axes]))


def _concat(call: Call) -> Tensor:
    values = [call.tensor(at) for at in range(len(call.inputs))]
    if any(value.channels_last for value in values):
        values = [Tensor(with_channels_last(value), channels_last=True) for value in values]
    return values[0].like(jnp.concatenate([value.array for value in values], values[0].axis(call.attributes["axis"])))


def _split(call: Call) -> tuple[Tensor, ...]:
    value = call.tensor()
    axis = call.attributes.get("axis", 0)
    sizes = call.known(1, "split")
    if sizes is None:
        count = call.outputs
        size = math.ceil(value.shape[axis] / count)
        sizes = [size] * (count - 1) + [value.shape[axis] - size * (count - 1)]
    ends = np.cumsum(sizes)
    axis = value.axis(axis)
    return tuple(
        value.like(lax.slice_in_dim(value.array, end - size, end, axis=axis))
        for end, size in zip(ends.tolist(), sizes, strict=True)
    )


def _slice(call: Call) -> Tensor:
    value = call.tensor()
    starts, ends = call.known(1, "starts"), call.known(2, "ends")
    axes = call.known(3, "axes", list(range(len(starts))))
    steps = call.known(4, "steps", [1] * len(starts))
    cuts = [slice(None)] * value.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # The end before the first element, going backwards, is written as a number below any size.
        stop = None if step < 0 and end < -value.shape[axis] else end
        cuts[value.axis(axis)] = slice(start, stop, step)
    return value.like(value.array[tuple(cuts)])


def _gather(call: Call) -> Tensor:
    value, places = call.tensor(), call.inputs[1]
    if isinstance(places, Tensor):
        raise Unsupported("its places depend on the image")
    assert places is not None
    axis = call.attributes.get("axis", 0)
    places = places % value.shape[axis]
    if places.ndim == 0:
        # Slices are followed through a network where gathers are not.
        return Tensor(lax.index_in_dim(as_in_onnx(value), int(places), axis, keepdims=False))
    if places.ndim == 1 and (np.diff(places) == 1).all():
        return value.like(lax.slice_in_dim(value.array, int(places[0]), int(places[-1]) + 1, axis=value.axis(axis)))
    if places.ndim == 1:
        return value.like(jnp.take(value.array, places, value.axis(axis)))
    return Tensor(jnp.take(as_in_onnx(value), places, axis))


def _pad(call: Call) -> Tensor:
    value, pads = call.tensor(), call.known(1, "pads")
    mode = call.attributes.get("mode", "constant")
    fill = call.known(2, "value", 0.0)
    axes = call.known(3, "axes", list(range(value.ndim)))
    if mode not in ("constant", "reflect", "edge"):
        raise Unsupported(f"its mode is {mode}")
    widths = [(0, 0)] * value.ndim
    for at, axis in enumerate(axes):
        widths[value.axis(axis)] = (pads[at], pads[at + len(axes)])
    if any(min(pair) < 0 for pair in widths):
        raise Unsupported("it pads by a negative number")
    options = {"constant_values": np.float32(fill)} if mode == "constant" else {}
    return value.like(jnp.pad(value.array, widths, mode=mode, **options))


def _expand(call: Call) -> Tensor:
    value, wanted = call.tensor(), tuple(call.known(1, "shape"))
    return Tensor(jnp.broadcast_to(as_in_onnx(value), np.broadcast_shapes(value.shape, wanted)))


def _repeats(call: Call) -> bool:
    """Whether enlarging by whole numbers repeats each pixel."""
    if call.opset < 11:
        return True
    place = call.attributes.get("coordinate_transformation_mode", "half_pixel")
    rounding = call.attributes.get("nearest_mode", "round_prefer_floor")
    if place == "asymmetric":
        return rounding == "floor"
    return place in ("half_pixel", "pytorch_half_pixel") and rounding in ("round_prefer_floor", "round_prefer_ceil")


def _resize(call: Call) -> Tensor:
    value = call.tensor()
    images = with_channels_last(value)
    scales, sizes = call.known(2 if call.opset > 10 else 1, "scales"), call.known(3, "sizes")
    if not scales and sizes:
        scales = [wanted / size for wanted, size in zip(sizes, value.shape, strict=False)]
    if not scales or len(scales) != 4 or "axes" in call.attributes or list(scales[:2]) != [1, 1]:
        raise Unsupported("only rows and columns are enlarged, by four scales or sizes")
    factors = scales[2:]
    nearest = call.attributes.get("mode", "nearest") == "nearest" and _repeats(call)
    if not nearest or any(factor < 1 or factor % 1 for factor in factors):
        raise Unsupported("images are enlarged to the nearest pixel by whole numbers only")
    for axis, factor in enumerate(factors):
        images = jnp.repeat(images, int(factor), axis=1 + axis)
    return Tensor(images, channels_last=True)


def _depth_to_space(call: Call) -> Tensor:
    values, side = call.plain(), call.attributes["blocksize"]
    batch, channels, rows, columns = values.shape
    small = channels // side**2
    if call.attributes.get("mode", "DCR") == "DCR":
        parts = values.reshape(batch, side, side, small, rows, columns).transpose(0, 3, 4, 1, 5, 2)
    else:
        parts = values.reshape(batch, small, side, side, rows, columns).transpose(0, 1, 4, 2, 5, 3)
    return Tensor(parts.reshape(batch, small, rows * side, columns * side))


SHAPES: Mapping[str, Callable[[Call], Value | tuple[Tensor, ...]]] = {
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Pad": _pad,
    "Expand": _expand,
    "Resize": _resize,
    "Upsample": _resize,
    "DepthToSpace": _depth_to_space,
}
