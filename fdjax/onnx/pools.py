"""ONNX's pools and reductions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdjax.onnx.values import Call, Tensor, Unsupported, as_in_onnx


def pads(call: Call, spatial: Sequence[int], window: Sequence[int]) -> list[tuple[int, int]]:
    """Returns what a window adds to a map.

    Args:
      call: the node's execution.
      spatial: rows and columns of the map.
      window: rows and columns of the window.

    Returns:
      What is added before and after each axis.
    """
    strides = call.attributes.get("strides", [1] * len(window))
    dilations = call.attributes.get("dilations", [1] * len(window))
    auto = call.attributes.get("auto_pad", "NOTSET")
    if auto in ("NOTSET", "VALID"):
        none = [0] * 2 * len(window)
        added = call.attributes.get("pads", none) if auto == "NOTSET" else none
        return list(zip(added[: len(window)], added[len(window) :], strict=True))
    found = []
    for size, side, stride, dilation in zip(spatial, window, strides, dilations, strict=True):
        total = max((math.ceil(size / stride) - 1) * stride + (side - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        found.append((small, large) if auto == "SAME_UPPER" else (large, small))
    return found


def _window_pads(call: Call, spatial: Sequence[int], window: Sequence[int]) -> list[tuple[int, int]]:
    """As `pads`; with ceil_mode, what completes the last windows is added, too."""
    added = pads(call, spatial, window)
    if not call.attributes.get("ceil_mode"):
        return added
    strides = call.attributes.get("strides", [1] * len(window))
    found = []
    for size, side, stride, (before, after) in zip(spatial, window, strides, added, strict=True):
        count = math.ceil((size + before + after - side) / stride) + 1
        if (count - 1) * stride >= size + before:  # A window may not begin in what is added at the end.
            count -= 1
        found.append((before, max(after, (count - 1) * stride + side - size - before)))
    return found


def _pooled(call: Call, start: Any, function: Callable[..., Any], added: list[tuple[int, int]]) -> jax.Array:
    window, strides = call.attributes["kernel_shape"], call.attributes.get("strides", (1, 1))
    if tuple(call.attributes.get("dilations", (1, 1))) != (1, 1):
        raise Unsupported("pools are read without dilations")
    return lax.reduce_window(call.image(), start, function, (1, *window, 1), (1, *strides, 1), ((0, 0), *added, (0, 0)))


def _max_pool(call: Call) -> Tensor:
    added = _window_pads(call, call.image().shape[1:3], call.attributes["kernel_shape"])
    return Tensor(_pooled(call, -jnp.inf, lax.max, added), channels_last=True)


def _average_pool(call: Call) -> Tensor:
    images, window = call.image(), call.attributes["kernel_shape"]
    spatial, strides = images.shape[1:3], call.attributes.get("strides", (1, 1))
    added, asked = _window_pads(call, spatial, window), pads(call, spatial, window)
    sums = _pooled(call, 0.0, lax.add, added)
    # How many pixels each window counts: those of the image and, if asked for, of the padding that the file names.
    counted = []
    for size, side, stride, (before, _), (first, final) in zip(spatial, window, strides, added, asked, strict=True):
        low, high = (-first, size + final) if call.attributes.get("count_include_pad") else (0, size)
        starts = np.arange(sums.shape[1 + len(counted)]) * stride - before
        counted.append(np.minimum(starts + side, high) - np.maximum(starts, low))
    counts = np.outer(*counted)
    if (counts == counts[0, 0]).all():
        return Tensor(sums / np.float32(counts[0, 0]), channels_last=True)
    return Tensor(sums / jnp.asarray(counts, jnp.float32)[:, :, None], channels_last=True)


def _reduced(function: Callable[..., jax.Array]) -> Callable[[Call], Tensor]:
    def call_it(call: Call) -> Tensor:
        value = call.tensor()
        axes = call.known(1, "axes")
        if axes is None or axes == []:
            if call.attributes.get("noop_with_empty_axes"):
                return value
            axes = range(value.ndim)
        keep = bool(call.attributes.get("keepdims", 1))
        over = tuple(value.axis(axis) for axis in axes)
        made = function(value.array, axis=over, keepdims=True)
        if keep:
            return value.like(made)
        gone = {axis % value.ndim for axis in axes}
        if value.channels_last and gone == {2, 3}:
            return Tensor(made.reshape(made.shape[0], made.shape[3]))
        made = as_in_onnx(value.like(made))
        return Tensor(made.reshape([size for at, size in enumerate(made.shape) if at not in gone]))

    return call_it


def _length(values: jax.Array, **options: Any) -> jax.Array:
    squares = jnp.square(values).sum(**options)
    some = squares > 0  # The gradient of the root at 0 is no number.
    return jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1)), 0)


def _global_pool(function: Callable[..., jax.Array]) -> Callable[[Call], Tensor]:
    return lambda call: Tensor(function(call.image(), axis=(1, 2), keepdims=True), channels_last=True)


POOLS: Mapping[str, Callable[[Call], Tensor]] = {
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_pool(jnp.mean),
    "GlobalMaxPool": _global_pool(jnp.max),
    "ReduceMean": _reduced(jnp.mean),
    "ReduceSum": _reduced(jnp.sum),
    "ReduceMax": _reduced(jnp.max),
    "ReduceMin": _reduced(jnp.min),
    "ReduceL2": _reduced(_length),
}
