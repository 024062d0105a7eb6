"""Writes the other operations of a frozen network, JAX's primitives, in ONNX.

A map that a layer makes is [B, C, H, W]. Elementwise operations, and those along axes that keep their order, leave it
so; other operations read it in the program's layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fdjax.errors import UserError
from fdjax.frozen.onnx_graph import TO_ONNX, Graph, Value
from fdjax.frozen.program import Apply
from fdjax.graph.primitives import params_from_json

# The place in [B, C, H, W] of each axis of [B, H, W, C].
_AXIS = (0, 2, 3, 1)
_ONE_NODE = {
    "abs": "Abs", "add": "Add", "add_any": "Add", "and": "And", "ceil": "Ceil", "cos": "Cos", "div": "Div",
    "eq": "Equal", "erf": "Erf", "exp": "Exp", "floor": "Floor", "ge": "GreaterOrEqual", "gt": "Greater",
    "le": "LessOrEqual", "log": "Log", "logistic": "Sigmoid", "lt": "Less", "max": "Max", "min": "Min", "mul": "Mul",
    "neg": "Neg", "not": "Not", "or": "Or", "pow": "Pow", "sign": "Sign", "sin": "Sin", "sqrt": "Sqrt", "sub": "Sub",
    "tanh": "Tanh",
}  # fmt: skip
_MADE_OF_NODES = (
    "clamp", "erfc", "exp2", "expm1", "integer_pow", "log1p", "ne", "rsqrt", "select_n", "square",
)  # fmt: skip
_COMPARISONS = ("eq", "ne", "ge", "gt", "le", "lt")
_SAME = ("stop_gradient", "copy", "copy_p", "reduce_precision", "optimization_barrier")


class _Call(NamedTuple):
    """An operation with its inputs.

    Attributes:
      graph: the graph to write into.
      name: the operation's name.
      kind: the primitive's name.
      inputs: values and arrays.
      params: the primitive's parameters.
      shapes: shapes of the outputs, without the batch.
      zeros: makes zeros, [B, *shape].
    """

    graph: Graph
    name: str
    kind: str
    inputs: list[Value | np.ndarray]
    params: dict[str, Any]
    shapes: list[tuple[int, ...]]
    zeros: Callable[[Sequence[int]], str]

    @property
    def values(self) -> list[Value]:
        return [x for x in self.inputs if isinstance(x, Value)]

    @property
    def on_maps(self) -> bool:
        """Whether one of its inputs is [B, C, H, W]."""
        return any(value.is_map for value in self.values)

    @property
    def x(self) -> Value:
        """Its first input."""
        if isinstance(self.inputs[0], Value):
            return self.inputs[0]
        raise self.refused("of an array that does not depend on the image")

    def refused(self, what: str) -> UserError:
        return UserError(
            f"{self.name}: the operation {self.kind!r} {what} cannot be written as ONNX; .stablehlo holds any operation"
        )

    def operand(self, x: Value | np.ndarray, as_map: bool) -> str:
        """Returns the name of an input in one of the layouts."""
        if isinstance(x, Value):
            return self.graph.channels_first(x) if as_map else self.graph.plain(x)
        return _constant(self.graph, x.transpose(TO_ONNX) if as_map and x.ndim == 4 else x)

    def made(self, name: str, as_map: bool = False, dtype: str = "float") -> list[Value]:
        (shape,) = self.shapes
        return [Value.named(shape, dtype, name, as_map)]


def _constant(graph: Graph, array: np.ndarray) -> str:
    return graph.constant(array, {"float": np.float32, "int": np.int64, "bool": np.bool_}[_dtype(array.dtype)])


def _dtype(dtype: Any) -> str:
    if jnp.issubdtype(dtype, jnp.floating):
        return "float"
    return "bool" if np.dtype(dtype) == np.bool_ else "int"


def _dtype_of(x: Value | np.ndarray) -> str:
    return x.dtype if isinstance(x, Value) else _dtype(x.dtype)


def _by_channel_of_image(call: _Call) -> bool:
    """Returns whether an image of 2 to 4 channels is combined with a number for each channel.

    [B, C, H, W] is then faster: along a last axis of so few channels, ONNX Runtime works pixel by pixel.
    """
    height, width, channels = call.shapes[0] if len(call.shapes[0]) == 3 else (1, 1, 0)
    arrays = [x for x in call.inputs if isinstance(x, np.ndarray) and x.size > 1]
    return (
        height * width > 1
        and 1 < channels <= 4
        and all(x.shape == (1, 1, 1, channels) for x in arrays)
        and bool(arrays)
    )


def _affine(call: _Call) -> list[Value] | None:
    """Scales or shifts a map by constants, one for all channels or one for each; None for any other operation."""
    if call.kind not in ("add", "sub", "mul", "div") or len(call.values) != 1:
        return None
    (x,), index = call.values, [isinstance(given, Value) for given in call.inputs].index(True)
    array = call.inputs[1 - index]
    assert isinstance(array, np.ndarray)
    fits = array.size == 1 or array.shape == (1, 1, 1, x.shape[-1])
    if not (x.is_map and x.dtype == _dtype(array.dtype) == "float" and x.shape == call.shapes[0] and fits):
        return None
    numbers = array.astype(np.float64).ravel()
    if call.kind == "add":
        scale, offset = 1.0, numbers
    elif call.kind == "sub":
        scale, offset = (1.0, -numbers) if index == 0 else (-1.0, numbers)
    elif call.kind == "mul":
        scale, offset = numbers, 0.0
    elif index == 0 and numbers.all():
        scale, offset = 1 / numbers, 0.0
    else:
        return None
    return [Value(x.shape, affine=call.graph.as_affine(x).then(scale, offset))]


def _elementwise(call: _Call) -> list[Value]:
    if (scaled := _affine(call)) is not None:
        return scaled
    as_map = call.on_maps or _by_channel_of_image(call)
    dtype = "bool" if call.kind in _COMPARISONS else _dtype_of(call.inputs[-1])
    if call.kind == "add" and _by_channel_of_image(call) and isinstance(call.inputs[1], np.ndarray):
        # Quantization leaves Sub as it is. An integer Add of a number for each channel takes longer than the network.
        names = [call.operand(x, as_map) for x in (call.inputs[0], -call.inputs[1])]
        return call.made(call.graph.op("Sub", *names), as_map, dtype)
    names = [call.operand(x, as_map) for x in call.inputs]
    return call.made(_nodes(call, names), as_map, dtype)


def _nodes(call: _Call, names: list[str]) -> str:
    graph, kind = call.graph, call.kind
    scalars = [x.item() if isinstance(x, np.ndarray) and x.size == 1 else None for x in call.inputs]
    match kind:
        case "max" | "min" if scalars[0] is not None or scalars[1] is not None:
            # Engines fuse Relu and Clip with the layer before, but not Max and Min.
            x, bound = (names[1], scalars[0]) if scalars[0] is not None else (names[0], scalars[1])
            if kind == "max" and bound == 0:
                return graph.op("Relu", x)
            limit = graph.constant(bound)
            return graph.op("Clip", x, limit) if kind == "max" else graph.op("Clip", x, "", limit)
        case "clamp":
            low, x, high = names
            if scalars[0] is not None and scalars[2] is not None:
                return graph.op("Clip", x, graph.constant(scalars[0]), graph.constant(scalars[2]))
            return graph.op("Min", graph.op("Max", x, low), high)
        case "select_n":
            if len(names) != 3 or _dtype_of(call.inputs[0]) != "bool":
                raise call.refused("between more than two")
            return graph.op("Where", names[0], names[2], names[1])
        case "integer_pow":
            power = call.params["y"]
            return graph.op("Mul", names[0], names[0]) if power == 2 else graph.op("Pow", *names, graph.constant(power))
        case "square":
            return graph.op("Mul", names[0], names[0])
        case "rsqrt":
            return graph.op("Reciprocal", graph.op("Sqrt", *names))
        case "ne":
            return graph.op("Not", graph.op("Equal", *names))
        case "log1p":
            return graph.op("Log", graph.op("Add", *names, graph.constant(1.0)))
        case "expm1":
            return graph.op("Sub", graph.op("Exp", *names), graph.constant(1.0))
        case "erfc":
            return graph.op("Sub", graph.constant(1.0), graph.op("Erf", *names))
        case "exp2":
            return graph.op("Pow", graph.constant(2.0), *names)
    return graph.op(_ONE_NODE[kind], *names)


def _convert(call: _Call) -> list[Value]:
    from onnx import TensorProto

    x, dtype = call.x, _dtype(call.params["new_dtype"])
    if x.dtype == dtype:
        return [x]
    to = {"float": TensorProto.FLOAT, "int": TensorProto.INT64, "bool": TensorProto.BOOL}[dtype]
    return call.made(call.graph.op("Cast", call.operand(x, x.is_map), to=to), x.is_map, dtype)


def _stays_in_order(axes: Sequence[int]) -> bool:
    """Whether axes of [B, H, W, C] have the same order in [B, C, H, W]."""
    places = [_AXIS[axis] for axis in axes]
    return places == sorted(places)


def _reduce(call: _Call) -> list[Value]:
    graph, x, axes = call.graph, call.x, tuple(call.params["axes"])
    as_map = x.is_map and _stays_in_order([axis for axis in range(4) if axis not in axes])
    name = call.operand(x, as_map)
    axes = [_AXIS[axis] for axis in axes] if as_map else list(axes)
    if call.kind == "reduce_sum":
        return call.made(graph.op("ReduceSum", name, graph.integers(*axes), keepdims=0))
    return call.made(
        graph.op({"reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}[call.kind], name, axes=axes, keepdims=0)
    )


def _reduce_window(call: _Call) -> list[Value]:
    params, graph = call.params, call.graph
    window, padding = params["window_dimensions"], params["padding"]
    moved = [*(axis for axis in range(len(window)) if window[axis] > 1 or params["window_strides"][axis] > 1)]
    dilated = any(side > 1 for side in (*params["base_dilation"], *params["window_dilation"]))
    if len(window) != 4 or not {1, 2}.issuperset(moved) or dilated or any(min(pair) < 0 for pair in padding):
        raise call.refused("with windows that do not move along rows and columns")
    how: dict[str, Any] = {
        "kernel_shape": list(window[1:3]),
        "strides": list(params["window_strides"][1:3]),
        "pads": [padding[1][0], padding[2][0], padding[1][1], padding[2][1]],
    }
    x = graph.channels_first(call.x)
    if call.kind == "reduce_window_max":
        return call.made(graph.op("MaxPool", x, **how), as_map=True)
    mean = graph.op("AveragePool", x, count_include_pad=1, **how)
    made = Value(call.shapes[0], channels_first=mean)
    return [Value(made.shape, affine=graph.as_affine(made).then(float(window[1] * window[2]), 0.0))]


def _pad(call: _Call) -> list[Value]:
    x, (_, value), config = call.x, call.inputs, call.params["padding_config"]
    if any(before < 0 or after < 0 for before, after, _ in config) or isinstance(value, Value):
        raise call.refused("with padding below zero")
    if any(inside for *_, inside in config):
        return _spread(call, [inside for *_, inside in config])
    order = TO_ONNX if x.is_map else range(len(config))
    pads = [int(config[axis][side]) for side in (0, 1) for axis in order]
    filler = _constant(call.graph, value.astype(np.float32) if x.dtype == "float" else value)
    name = call.graph.op("Pad", call.operand(x, x.is_map), call.graph.integers(*pads), filler)
    return call.made(name, x.is_map, x.dtype)


def _spread(call: _Call, inside: Sequence[int]) -> list[Value]:
    """Puts zeros between the pixels of a map, for a transposed convolution."""
    graph, filler = call.graph, call.inputs[1]
    alone = all((low, high) == (0, 0) for low, high, _ in call.params["padding_config"])
    if len(inside) != 4 or inside[0] or inside[3] or not alone or isinstance(filler, Value) or filler.any():
        raise call.refused("with padding inside of anything but a map")
    (height, width, channels), (down, right) = call.x.shape, (inside[1] + 1, inside[2] + 1)
    apart = graph.reshape(graph.channels_first(call.x), [-1, channels, height, 1, width, 1])
    after = graph.op("Pad", apart, graph.integers(*[0] * 9, down - 1, 0, right - 1), graph.constant(0.0))
    whole = graph.reshape(after, [-1, channels, height * down, width * right])
    return call.made(graph.slice(whole, [0, 0], list(call.shapes[0][:2]), [2, 3]), as_map=True)


def _slice(call: _Call) -> list[Value]:
    x, params = call.x, call.params
    cut = [axis for axis in range(1, len(x.shape) + 1) if call.shapes[0][axis - 1] != x.shape[axis - 1]]
    if not cut:
        return [x]
    starts, stops = ([int(params[name][axis]) for axis in cut] for name in ("start_indices", "limit_indices"))
    steps = [] if params["strides"] is None else [int(params["strides"][axis]) for axis in cut]
    axes = [_AXIS[axis] for axis in cut] if x.is_map else cut
    name = call.graph.slice(call.operand(x, x.is_map), starts, stops, axes, *steps)
    return call.made(name, x.is_map, x.dtype)


def _split(call: _Call) -> list[Value]:
    x, axis = call.x, call.params["axis"]
    names = call.graph.split(call.operand(x, x.is_map), call.params["sizes"], _AXIS[axis] if x.is_map else axis)
    return [Value.named(shape, x.dtype, name, x.is_map) for shape, name in zip(call.shapes, names, strict=True)]


def _concatenate(call: _Call) -> list[Value]:
    as_map, axis, names = call.on_maps, call.params["dimension"], []
    for x in call.inputs:
        name = call.operand(x, as_map)
        if isinstance(x, np.ndarray):
            # The array is repeated for each image.
            name = call.graph.op("Add", call.zeros([1] * (x.ndim - 1)), name)
        names.append(name)
    return call.made(call.graph.concat(names, _AXIS[axis] if as_map else axis), as_map, _dtype_of(call.inputs[0]))


def _reshape(call: _Call) -> list[Value]:
    return call.made(call.graph.reshape(call.graph.plain(call.x), [-1, *call.shapes[0]]), dtype=call.x.dtype)


def _broadcast(call: _Call) -> list[Value]:
    (shape,), dimensions = call.shapes, call.params["broadcast_dimensions"]
    if isinstance(array := call.inputs[0], np.ndarray):
        return _broadcast_array(call, array)
    x = call.x
    if not dimensions or dimensions[0] != 0:
        raise call.refused("that moves the batch")
    sides = [1] * len(shape)
    for axis, side in zip(dimensions[1:], x.shape, strict=True):
        sides[axis - 1] = side
    name = call.graph.plain(x)
    if tuple(sides) != x.shape:
        name = call.graph.reshape(name, [-1, *sides])
    if tuple(sides) != shape:
        name = call.graph.op("Expand", name, call.graph.integers(1, *shape))
    return call.made(name, dtype=x.dtype)


def _broadcast_array(call: _Call, array: np.ndarray) -> list[Value]:
    """Repeats an array for each image."""
    (shape,), dtype = call.shapes, _dtype(array.dtype)
    if dtype != "float":
        raise call.refused("of integers")
    sides = [1] * (len(shape) + 1)
    for axis, side in zip(call.params["broadcast_dimensions"], array.shape, strict=True):
        sides[axis] = side
    name = call.zeros(shape)
    return call.made(call.graph.op("Add", name, _constant(call.graph, array.reshape(sides))) if array.any() else name)


def _transpose(call: _Call) -> list[Value]:
    x, order = call.x, call.params["permutation"]
    if x.is_map:
        order = [_AXIS[axis] for axis in order]
    name = call.operand(x, x.is_map)
    if order[0] != 0:
        raise call.refused("that moves the batch")
    return call.made(call.graph.op("Transpose", name, perm=list(order)), dtype=x.dtype)


def _dot_general(call: _Call) -> list[Value]:
    (contract, batch), (shape,) = call.params["dimension_numbers"], call.shapes
    if not isinstance(call.inputs[0], Value) or (
        isinstance(call.inputs[1], Value) and (*batch[0][:1], *batch[1][:1]) != (0, 0)
    ):
        raise call.refused("across images")
    if isinstance(call.inputs[1], np.ndarray) and batch[0]:
        raise call.refused("of an array with a batch")
    sides = []
    for side, x in enumerate(call.inputs):
        rank = x.ndim if isinstance(x, np.ndarray) else len(x.shape) + 1
        lengths = list(x.shape) if isinstance(x, np.ndarray) else [-1, *x.shape]
        free = [axis for axis in range(rank) if axis not in (*contract[side], *batch[side])]
        inner = int(np.prod([lengths[axis] for axis in contract[side]]))
        if isinstance(x, np.ndarray):
            matrix = x.transpose(*contract[side], *free).reshape(inner, -1)
            sides.append(_constant(call.graph, matrix))
            continue
        rows, last = [*batch[side], *free], list(contract[side])
        order = [*batch[side], *contract[side], *free] if side else [*rows, *last]
        name = call.graph.plain(x)
        if order != list(range(rank)):
            name = call.graph.op("Transpose", name, perm=order)
        outer = int(np.prod([lengths[axis] for axis in free])) if batch[side] else -1
        sizes = [-1, *((inner, outer) if side else (outer, inner))] if batch[side] else [-1, inner]
        sides.append(call.graph.reshape(name, sizes))
    return call.made(call.graph.reshape(call.graph.op("MatMul", *sides), [-1, *shape]))


def _conv(call: _Call) -> list[Value]:
    params, (_, kernel) = call.params, call.inputs
    numbers = params["dimension_numbers"]
    usual = numbers.lhs_spec == numbers.out_spec == (0, 3, 1, 2) and numbers.rhs_spec == (3, 2, 0, 1)
    negative = any(min(pair) < 0 for pair in params["padding"])
    if not usual or negative or set(params["lhs_dilation"]) != {1} or isinstance(kernel, Value):
        raise call.refused("of this kind")
    (top, bottom), (left, right) = params["padding"]
    name = call.graph.conv(
        call.graph.channels_first(call.x),
        kernel.transpose(3, 2, 0, 1),
        strides=list(params["window_strides"]),
        dilations=list(params["rhs_dilation"]),
        pads=[top, left, bottom, right],
        group=params["feature_group_count"],
    )
    return call.made(name, as_map=True)


_FUNCTIONS: dict[str, Callable[[_Call], list[Value]]] = {
    **dict.fromkeys((*_ONE_NODE, *_MADE_OF_NODES), _elementwise),
    **dict.fromkeys(_SAME, lambda call: call.values),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _reduce),
    **dict.fromkeys(("reduce_window_max", "reduce_window_sum"), _reduce_window),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "convert_element_type": _convert,
    "dot_general": _dot_general,
    "pad": _pad,
    "slice": _slice,
    "split": _split,
    "transpose": _transpose,
}


def apply_primitive(
    graph: Graph,
    operation: Apply,
    inputs: list[Value | np.ndarray],
    shapes: list[tuple[int, ...]],
    zeros: Callable[[Sequence[int]], str],
) -> list[Value]:
    """Writes an operation.

    Args:
      graph: the graph to write into.
      operation: the operation.
      inputs: its inputs: values and arrays.
      shapes: shapes of its outputs, without the batch.
      zeros: makes zeros, [B, *shape].

    Returns:
      The values that it makes.

    Raises:
      UserError: if the primitive, or this use of it, cannot be written as ONNX; the message names the operation.
    """
    params = params_from_json(json.loads(operation.params))
    call = _Call(graph, operation.name, operation.kind, inputs, params, shapes, zeros)
    if operation.kind not in _FUNCTIONS:
        raise call.refused("")
    return _FUNCTIONS[operation.kind](call)
