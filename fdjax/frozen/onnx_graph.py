"""Builds an ONNX graph of nodes and constants; equal constants are stored once."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import string
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fdjax.errors import UserError
from fdjax.frozen.products import Indices
from fdjax.frozen.program import Activation

# The permutation of axes from [B, H, W, C] to ONNX's [B, C, H, W], and its inverse.
TO_ONNX, FROM_ONNX = (0, 3, 1, 2), (0, 2, 3, 1)
# Attributes of a convolution that are left out because they are ONNX's defaults.
_DEFAULTS = {"strides": [1, 1], "dilations": [1, 1], "pads": [0, 0, 0, 0], "group": 1}
# The names of the input and the output of a network that has one of each.
INPUT, OUTPUT = "images", "logits"
# Rows and columns of a bias count as equal if they differ by less than this, relative to the largest value.
_SAME = 1e-6


@dataclasses.dataclass(frozen=True)
class Affine:
    """`scale * base + offset` of a map, which is written when something reads it.

    Attributes:
      base: name of a map, [B, C, H, W].
      scale: [C].
      offset: [C].
    """

    base: str
    scale: np.ndarray
    offset: np.ndarray

    def then(self, scale: np.ndarray | float, offset: np.ndarray | float) -> Affine:
        """Scales and shifts the map.

        Args:
          scale: a number, or one for each channel, [C].
          offset: the same.

        Returns:
          `scale * self + offset`.
        """
        return Affine(self.base, self.scale * scale, self.offset * scale + offset)


@dataclasses.dataclass
class Value:
    """A value of the program in the graph; a layout of a map is made when it is first needed.

    Attributes:
      shape: the shape without the batch.
      dtype: "float", "int" or "bool".
      plain: its name in the program's layout; None if it has not been made.
      channels_first: its name as [B, C, H, W]; None if it has not been made.
      affine: what it is of another map, if it is made as [B, C, H, W] only when it is needed.
    """

    shape: tuple[int, ...]
    dtype: str = "float"
    plain: str | None = None
    channels_first: str | None = None
    affine: Affine | None = None

    @classmethod
    def named(cls, shape: tuple[int, ...], dtype: str, name: str, as_map: bool) -> Value:
        """Returns a value that has been made under a name, as [B, C, H, W] or in the program's layout."""
        return cls(shape, dtype, plain=None if as_map else name, channels_first=name if as_map else None)

    @property
    def is_map(self) -> bool:
        """Whether it has been made as [B, C, H, W], or is as soon as it is needed."""
        return self.channels_first is not None or self.affine is not None


class Graph:
    """Nodes and constants; the methods add some and return the name of a value."""

    def __init__(self) -> None:
        from onnx import TensorProto, helper, numpy_helper

        self._helper, self._numpy, self._types = helper, numpy_helper, TensorProto
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._known: dict[Any, str] = {}
        self._names = _short_names()

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Adds a constant, unless there is an equal one."""
        array = np.array(value, dtype, order="C")
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            name = self._known[key] = next(self._names)
            # Small integers take a byte each unless they are stored as raw data.
            kind = {"int32": self._types.INT32, "int64": self._types.INT64}.get(array.dtype.name)
            small = kind is not None and self._helper.make_tensor(name, kind, array.shape, array.ravel())
            self.constants.append(small or self._numpy.from_array(array, name))
        return self._known[key]

    def integers(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def indices(self, values: Iterable[int]) -> str:
        """Adds int32 indices of a gather."""
        return self.constant(list(values), np.int32)

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Adds a node with one output."""
        name = output or next(self._names)
        self.nodes.append(self._helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def once(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node of constants, unless there is an equal one."""
        key = (kind, inputs, repr(attributes))
        if key not in self._known:
            self._known[key] = self.op(kind, *inputs, **attributes)
        return self._known[key]

    def split(self, x: str, sizes: Sequence[int], axis: int) -> list[str]:
        """Splits an axis into parts of these sizes."""
        if len(sizes) == 1:
            return [x]
        names = [next(self._names) for _ in sizes]
        self.nodes.append(self._helper.make_node("Split", [x, self.integers(*sizes)], names, axis=axis))
        return names

    def add(self, values: Sequence[str]) -> str:
        return functools.reduce(lambda a, b: self.op("Add", a, b), values)

    def concat(self, values: Sequence[str], axis: int) -> str:
        return values[0] if len(values) == 1 else self.op("Concat", *values, axis=axis)

    def slice(self, x: str, starts: Sequence[int], stops: Sequence[int], axes: Sequence[int], *steps: int) -> str:
        bounds = [self.integers(*values) for values in (starts, stops, axes)]
        return self.op("Slice", x, *bounds, *([self.integers(*steps)] if steps else []))

    def take(self, x: str, indices: Indices | None, width: int, axis: int = 1, rank: int = 4) -> str:
        """Selects channels of a value that has `width` of them; the index -1 stands for a channel of zeros."""
        if indices is None or indices == tuple(range(width)):
            return x
        if -1 not in indices and indices == tuple(range(indices[0], indices[0] + len(indices))):
            return self.slice(x, [indices[0]], [indices[-1] + 1], [axis])
        if -1 in indices:
            pads = [0] * (2 * rank)
            pads[rank + axis] = 1
            x = self.op("Pad", x, self.integers(*pads))
        return self.op("Gather", x, self.indices(width if i < 0 else i for i in indices), axis=axis)

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        return self.op("Reshape", x, self.integers(*shape))

    def activate(self, x: str, activation: Activation) -> str:
        if activation == "relu6":
            return self.op("Clip", x, self.constant(0.0), self.constant(6.0))
        return self.op("Relu", x) if activation == "relu" else x

    def bias(self, x: str, bias: np.ndarray) -> str:
        """Adds a bias to a map.

        Args:
          x: name of the map, [B, C, H, W].
          bias: [C] or [H, W, C].

        Returns:
          The name of the sum.
        """
        if bias.ndim == 1:
            return self.op("Add", x, self.constant(bias[None, :, None, None]))
        name, small = bias.transpose(2, 0, 1), bias.transpose(2, 0, 1)
        # The bias that removed channels leave differs only near the borders, so equal rows and columns are stored once.
        expand = []
        for axis in (1, 2):
            first, inverse = _distinct(small, axis)
            if len(first) < small.shape[axis]:
                small = np.take(small, first, axis)
                expand.append((axis, inverse))
        name = self._product(small)
        for axis, inverse in expand:
            name = self.once("Gather", name, self.indices(inverse), axis=axis)
        return self.op("Add", x, name)

    def _product(self, array: np.ndarray) -> str:
        """Adds a constant [C, H, W], as a product of two if those are smaller, as for few removed channels."""
        flat = array.reshape(len(array), -1).astype(np.float64)
        left, values, right = np.linalg.svd(flat, full_matrices=False)
        rank = int((values > _SAME * values[0]).sum())
        if rank * sum(flat.shape) > 0.9 * flat.size:
            return self.constant(array)
        product = self.once("MatMul", self.constant(left[:, :rank] * values[:rank]), self.constant(right[:rank]))
        return self.once("Reshape", product, self.integers(*array.shape))

    def conv(self, x: str, kernel: np.ndarray, bias: np.ndarray | None = None, **attributes: Any) -> str:
        """Adds a convolution.

        Args:
          x: name of the map, [B, C, H, W].
          kernel: [D, C / groups, rows, columns].
          bias: [D], or None.
          **attributes: ONNX's attributes, such as `strides`.

        Returns:
          The name of the result.
        """
        extra = [] if bias is None else [self.constant(bias)]
        named = {name: value for name, value in attributes.items() if value != _DEFAULTS.get(name)}
        return self.op("Conv", x, self.constant(kernel), *extra, **named)

    # Layouts

    def plain(self, value: Value) -> str:
        """Returns a value in the program's layout."""
        if value.plain is None:
            made = self.channels_first(value) if value.is_map else None
            value.plain = self._laid_out(value, made, FROM_ONNX)
        return value.plain

    def channels_first(self, value: Value) -> str:
        """Returns a map as [B, C, H, W]."""
        if value.channels_first is None and value.affine is not None:
            value.channels_first = self._of_affine(value.affine)
        if value.channels_first is None:
            value.channels_first = self._laid_out(value, value.plain, TO_ONNX)
        return value.channels_first

    def as_affine(self, value: Value) -> Affine:
        """Returns a map as what it is of another one, or of itself."""
        if value.affine is not None:
            return value.affine
        channels = value.shape[-1]
        return Affine(self.channels_first(value), np.ones(channels), np.zeros(channels))

    def _of_affine(self, affine: Affine) -> str:
        scale, offset = (array.astype(np.float32) for array in (affine.scale, affine.offset))
        same_scale, same_offset = (bool((array == array[0]).all()) for array in (scale, offset))
        scales, shifts = bool((scale != 1).any()), bool(offset.any())
        if scales and shifts and not (same_scale and same_offset):
            # ONNX Runtime keeps maps in blocks of channels from one convolution to the next. A product and a sum take
            # them out of the blocks, a batch norm does not. Its mean is 0 here, its variance 1.
            constants = [self.constant(array) for array in (scale, offset, np.zeros_like(scale), np.ones_like(scale))]
            return self.op("BatchNormalization", affine.base, *constants, epsilon=0.0)
        y = affine.base
        for kind, array, same, needed in (("Mul", scale, same_scale, scales), ("Add", offset, same_offset, shifts)):
            if needed:
                y = self.op(kind, y, self.constant(array[0] if same else array[None, :, None, None]))
        return y

    def _laid_out(self, value: Value, other: str | None, order: Sequence[int]) -> str:
        if other is None:
            raise UserError(
                f"a value of shape {list(value.shape)} has nothing left that an operation reads: such a network cannot "
                "be written as ONNX"
            )
        height, width, channels = value.shape
        if height * width == 1 or channels == 1:
            sides = (height, width, channels)
            return self.reshape(
                other, [-1, *(sides[axis - 1] for axis in ((1, 2, 3) if order == FROM_ONNX else TO_ONNX[1:]))]
            )
        return self.op("Transpose", other, perm=list(order))


def _short_names() -> Iterator[str]:
    """Yields identifiers, the shortest first, because names are half of a small network's file."""
    rest = string.ascii_letters + string.digits
    for length in itertools.count():
        for name in itertools.product(string.ascii_letters, *[rest] * length):
            yield "".join(name)


def _distinct(array: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first of each group of equal rows along an axis, and the group of each row."""
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    largest = np.abs(rows).max(initial=0)
    keys = np.round(rows / (largest * _SAME)) if largest else rows
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return first, inverse.ravel()
