"""Writes the other operations of a frozen network: the JAX primitives for which there are kernels."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fdjax.errors import UserError
from fdjax.frozen.native.calls import Calls
from fdjax.frozen.native.layout import floats_of
from fdjax.frozen.native.source import Raw, Source, cpp, round8
from fdjax.frozen.native.statements import place
from fdjax.frozen.program import Apply, Take
from fdjax.graph.primitives import bind, params_from_json

Shapes = Sequence[tuple[int, ...]]

# Formulas of one or two operands, on vectors.
_BINARY = {
    "add": "a + b",
    "sub": "a - b",
    "mul": "a * b",
    "div": "a / b",
    "max": "a > b ? a : b",
    "min": "a < b ? a : b",
    # A truth value is 1 or 0.
    **{
        kind: f"a {sign} b ? decltype(a){{}} + 1.0f : decltype(a){{}}"
        for kind, sign in {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}.items()
    },
}
_UNARY = {"neg": "-a", "abs": "a < 0.0f ? -a : a", "square": "a * a"}
# Formulas of one number, which are applied lane by lane.
_SCALAR = {
    "exp": "std::exp(v)",
    "expm1": "std::expm1(v)",
    "log": "std::log(v)",
    "log1p": "std::log1p(v)",
    "tanh": "std::tanh(v)",
    "logistic": "1.0f / (1.0f + std::exp(-v))",
    "sqrt": "std::sqrt(v)",
    "rsqrt": "1.0f / std::sqrt(v)",
    "erf": "std::erf(v)",
}
_COPIES = ("convert_element_type", "copy", "copy_p", "stop_gradient", "reduce_precision", "optimization_barrier")
_SHAPED = ("reshape", "squeeze", "expand_dims", "broadcast_in_dim")
SUPPORTED = (
    *_BINARY, *_UNARY, *_SCALAR, *_COPIES, *_SHAPED, "select_n", "clamp", "integer_pow", "reduce_sum",
    "reduce_window_max", "reduce_window_sum", "slice", "pad", "concatenate",
)  # fmt: skip


def dims_of(shape: Sequence[int]) -> tuple[int, int]:
    """Returns (pixels, channels) of a shape."""
    return math.prod(shape[:-1]), (*shape, 1)[len(shape) - 1] if shape else 1


class ApplyEmitter:
    """Writes the statements of one operation."""

    def __init__(self, source: Source, calls: Calls, operation: Apply, shapes: Shapes, arrays: Mapping[str, Any]):
        self.source, self.calls, self.operation, self.shapes, self.arrays = source, calls, operation, shapes, arrays
        self.params = params_from_json(json.loads(operation.params))
        self.shape = shapes[operation.outputs[0]]
        self.y, self.image = calls.result(operation.outputs[0]), floats_of(self.shape)

    def emit(self) -> None:
        kind = self.operation.kind
        if kind in _BINARY:
            self._elementwise(_BINARY[kind])
        elif kind in _UNARY:
            self._elementwise(_UNARY[kind])
        elif kind in _SCALAR:
            self._elementwise(f"each_lane(a, [](float v) {{ return {_SCALAR[kind]}; }})")
        elif kind == "integer_pow" and 1 <= self.params["y"] <= 4:
            self._elementwise(" * ".join("a" * self.params["y"]))
        elif kind in _COPIES:
            # Numbers are floats here, conditions are 0 and 1.
            if jnp.issubdtype(self.params.get("new_dtype", jnp.float32), jnp.integer):
                self._refuse(", to integers")
            self._elementwise("a")
        elif kind == "clamp":
            self._clamp()
        elif kind == "select_n" and len(self.operation.inputs) == 3:
            self._select()
        elif kind in _SHAPED:
            self._shaped()
        elif kind in ("reduce_sum", "reduce_window_max", "reduce_window_sum", "slice", "pad", "concatenate"):
            getattr(self, f"_{kind}")()
        else:
            self._refuse()

    def _refuse(self, why: str = "") -> None:
        raise UserError(
            f"the operation {self.operation.kind} ({self.operation.name}{why}) has no kernel in native code, which "
            f"knows {', '.join(SUPPORTED)}: use another engine for this network"
        )

    # Operands

    def _operand(self, value: int) -> tuple[str, int]:
        """Returns the address of image i of an elementwise operation's operand, and its floats from pixel to pixel."""
        pixels, channels = dims_of(self.shape)
        pitch = round8(channels)
        if value < 0:
            return self._constant(self.arrays[f"{self.operation.name}/arg{-1 - value}"])
        own_pixels, own_channels = dims_of(self.shapes[value])
        if own_channels != channels or own_pixels not in (1, pixels):
            self._refuse(f", of shapes {self.shapes[value]} and {self.shape}")
        return (
            f"{self.calls.value(value)} + i * {floats_of(self.shapes[value])}",
            pitch if own_pixels == pixels > 1 else 0,
        )

    def _constant(self, given: np.ndarray) -> tuple[str, int]:
        """Does as `_operand` for an array."""
        array, (_, channels) = np.asarray(given, np.float32), dims_of(self.shape)
        pitch, uniform = round8(channels), all(side == 1 for side in array.shape[:-1])
        shape = (channels,) if uniform else self.shape
        array = np.broadcast_to(array.reshape(array.shape[-1:] if uniform else array.shape[-len(self.shape) :]), shape)
        array = np.pad(array.reshape(-1, channels), ((0, 0), (0, pitch - channels)))
        return f"{{w}} + {self.source.weight(array)}", 0 if uniform else pitch

    def _elementwise(self, formula: str, first: int = 0, second: int = -1) -> None:
        pixels, channels = dims_of(self.shape)
        (a, step_a), (b, step_b) = (self._operand(self.operation.inputs[k]) for k in (first, second))
        function = f"[](auto a, auto b) {{ (void)b; return {formula}; }}"
        numbers = f"{pixels}, {round8(channels)}, {a}, {step_a}, {b}, {step_b}"
        self.calls.each(f"elementwise({numbers}, {self.y} + i * {self.image}, {function});")

    def _clamp(self) -> None:
        self._elementwise("a > b ? a : b", 1, 0)
        pixels, channels = dims_of(self.shape)
        high, step = self._operand(self.operation.inputs[2])
        y = f"{self.y} + i * {self.image}"
        numbers = f"{pixels}, {round8(channels)}, {y}, {round8(channels)}, {high}, {step}, {y}"
        self.calls.each(f"elementwise({numbers}, [](auto a, auto b) {{ return a < b ? a : b; }});")

    def _select(self) -> None:
        pixels, channels = dims_of(self.shape)
        operands = ", ".join(f"{x}, {step}" for x, step in map(self._operand, self.operation.inputs))
        self.calls.each(f"selected({pixels}, {round8(channels)}, {operands}, {self.y} + i * {self.image});")

    # Shapes

    def _value(self) -> tuple[int, tuple[int, ...], str]:
        value = self.operation.inputs[0]
        if value < 0:
            self._refuse(", of a constant")
        return value, self.shapes[value], f"{self.calls.value(value)} + i * {floats_of(self.shapes[value])}"

    def _copy(self, shape: Sequence[int], x: str, x_strides: Sequence[int], y: str, y_strides: Sequence[int]) -> None:
        missing = 6 - len(shape)
        if missing < 0:
            self._refuse(f", of {len(shape)} axes")
        sizes = [1] * missing + list(shape), *([0] * missing + list(s) for s in (x_strides, y_strides))
        part = self.source.constant(Raw(cpp(sizes)), self.operation.kind, "Strided")
        self.calls.each(f"copy_strided({part}, {x}, {y});")

    def _shaped(self) -> None:
        if self.operation.inputs[0] < 0 and self.operation.kind == "broadcast_in_dim":
            given = self.arrays[f"{self.operation.name}/arg{-1 - self.operation.inputs[0]}"]
            made = np.asarray(bind("broadcast_in_dim", self.params, [np.asarray(given, np.float32)])[0])
            (x, step), (pixels, channels) = self._constant(made), dims_of(self.shape)
            numbers = f"{pixels}, {round8(channels)}, {x}, {step}, {x}, {step}"
            self.calls.each(f"elementwise({numbers}, {self.y} + i * {self.image}, [](auto a, auto) {{ return a; }});")
            return
        _, shape, x = self._value()
        y = f"{self.y} + i * {self.image}"
        if self.operation.kind == "broadcast_in_dim":
            axes = [axis - 1 for axis in self.params["broadcast_dimensions"][1:]]
            strides, own = [0] * len(self.shape), strides_of(shape)
            for axis, place in enumerate(axes):
                strides[place] = 0 if shape[axis] == 1 else own[axis]
            self._copy(self.shape, x, strides, y, strides_of(self.shape))
            return
        if dims_of(shape) == dims_of(self.shape):
            self._copy(dims_of(shape), x, (round8(dims_of(shape)[1]), 1), y, (round8(dims_of(shape)[1]), 1))
            return
        # The channels' padding differs, so the value is copied without padding first.
        total = math.prod(shape)
        dense = f"{self.calls.temporary(total)} + i * {total}"
        for (pixels, channels), gaps in ((dims_of(shape), True), (dims_of(self.shape), False)):
            inside, outside = (channels, 1), (round8(channels), 1)
            ends = (x, outside, dense, inside) if gaps else (dense, inside, y, outside)
            self._copy((pixels, channels), *ends)

    def _slice(self) -> None:
        _, shape, x = self._value()
        starts, own = self.params["start_indices"][1:], strides_of(shape)
        steps = (self.params["strides"] or (1,) * (len(shape) + 1))[1:]
        first = sum(start * stride for start, stride in zip(starts, own, strict=True))
        strides = [step * stride for step, stride in zip(steps, own, strict=True)]
        self._copy(self.shape, f"{x} + {first}", strides, f"{self.y} + i * {self.image}", strides_of(self.shape))

    def _pad(self) -> None:
        _, shape, x = self._value()
        fill = self.operation.inputs[1]
        array = self.arrays.get(f"{self.operation.name}/arg{-1 - fill}") if fill < 0 else None
        edges = self.params["padding_config"][1:]
        if array is None or any(min(edge) < 0 for edge in edges):
            self._refuse(", with padding that is negative or computed")
        number = float(np.asarray(array).reshape(-1)[0])
        filled = cpp(number) if math.isfinite(number) else f"{'-' if number < 0 else ''}INFINITY"
        strides = strides_of(self.shape)
        first = sum(edge[0] * stride for edge, stride in zip(edges, strides, strict=True))
        inner = [(edge[2] + 1) * stride for edge, stride in zip(edges, strides, strict=True)]
        self.calls.add(f"std::fill_n({self.y}, n * {self.image}, float({filled}));")
        self._copy(shape, x, strides_of(shape), f"{self.y} + i * {self.image} + {first}", inner)

    def _concatenate(self) -> None:
        axis, at, strides = self.params["dimension"] - 1, 0, strides_of(self.shape)
        for value in self.operation.inputs:
            if value < 0:
                self._refuse(", of a constant")
            shape = self.shapes[value]
            x = f"{self.calls.value(value)} + i * {floats_of(shape)}"
            self._copy(shape, x, strides_of(shape), f"{self.y} + i * {self.image} + {at * strides[axis]}", strides)
            at += shape[axis]

    # Reductions

    def _reduce_sum(self) -> None:
        _, shape, x = self._value()
        axes = [axis - 1 for axis in self.params["axes"]]
        if axes != list(range(len(shape) - 1)):
            self._refuse(f", over the axes {tuple(self.params['axes'])}")
        pixels, channels = dims_of(shape)
        self.calls.each(f"sum_pixels({pixels}, {round8(channels)}, 1.0f, {x}, {self.y} + i * {self.image});")

    def _reduce_window_max(self) -> None:
        self._pool(largest=True)

    def _reduce_window_sum(self) -> None:
        self._pool(largest=False)

    def _pool(self, *, largest: bool) -> None:
        _, shape, x = self._value()
        window, strides, padding = (self.params[k] for k in ("window_dimensions", "window_strides", "padding"))
        dilations = {*self.params["base_dilation"], *self.params["window_dilation"]}
        if len(shape) != 3 or window[0] != 1 or window[3] != 1 or dilations != {1} or np.min(padding) < 0:
            self._refuse(f", with the window {tuple(window)}")
        fields = (*shape[:2], round8(shape[2]), *self.shape[:2], *window[1:3], *strides[1:3], padding[1][0],
                  padding[2][0], largest)  # fmt: skip
        part = self.source.constant(Raw(cpp(fields)), self.operation.name, "Pool")
        self.calls.each(f"pool({part}, {x}, {self.y} + i * {self.image});")


def strides_of(shape: Sequence[int]) -> list[int]:
    """Returns the stride of each axis of a value, in floats."""
    if not shape:
        return []
    strides, step = [1], round8(shape[-1])
    for side in reversed(shape[1:-1]):
        strides.append(step)
        step *= side
    return [step, *reversed(strides[1:]), 1] if len(shape) > 1 else [1]


def emit_take(source: Source, calls: Calls, operation: Take, shapes: Shapes) -> None:
    """Adds a selection of channels."""
    (pixels, channels), outputs = dims_of(shapes[operation.x]), len(operation.indices)
    x, y = calls.value(operation.x), calls.result(operation.y)
    place(source, calls, pixels, channels, operation.indices, np.zeros(outputs, np.float32), "none", x, y)
