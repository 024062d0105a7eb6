"""Writes what is a hard sigmoid as one node of ONNX, which engines compute in one pass over its map."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class _Clamp(NamedTuple):
    """`min(max(scale x + offset, 0), top)`.

    Attributes:
      x: name of x.
      scale: a number.
      offset: a number.
      top: a number above 0.
      inner: nodes between x and the result, which nothing else reads.
    """

    x: str
    scale: float
    offset: float
    top: float
    inner: list[Any]


def join_hard_sigmoids(nodes: list[Any], constants: Sequence[Any], outputs: Sequence[str]) -> list[Any]:
    """Joins multiplication, addition and clipping to `HardSigmoid`, `max(0, min(1, alpha x + beta))`.

    Args:
      nodes: nodes of a graph, in order.
      constants: its constant tensors.
      outputs: names of its results.

    Returns:
      The nodes, with one in the place of several wherever a value is clipped to 0..1, or to 0..t and then divided by t.
    """
    from onnx import helper, numpy_helper

    arrays = {tensor.name: tensor for tensor in constants}
    numbers = _Numbers({name: numpy_helper.to_array(tensor) for name, tensor in arrays.items()})
    made = {name: node for node in nodes for name in node.output}
    readers = Counter(name for node in nodes for name in node.input) + Counter(outputs)
    gone: set[int] = set()
    joined: dict[int, Any] = {}
    for node in nodes:
        last, scale = node, 1.0
        if node.op_type == "Mul" and (pair := numbers.operand(node)) is not None:
            # Clipped to 0..t, then divided by t.
            scale, inside = pair[1], made.get(pair[0])
            if inside is None or readers[pair[0]] > 1 or id(inside) in gone:
                continue
            last = inside
        clamp = _clamp(last, made, readers, numbers)
        if clamp is None or not math.isclose(scale * clamp.top, 1.0, rel_tol=1e-6):
            continue
        if last is node and (clamp.scale, clamp.offset) == (1.0, 0.0):
            continue  # Nothing but clipping, which engines fuse with the layer before.
        alpha, beta = clamp.scale / clamp.top, clamp.offset / clamp.top
        joined[id(node)] = helper.make_node("HardSigmoid", [clamp.x], list(node.output), alpha=alpha, beta=beta)
        gone |= {id(inner) for inner in clamp.inner} | ({id(last)} if last is not node else set())
    return [joined.get(id(node), node) for node in nodes if id(node) not in gone]


class _Numbers:
    """Constants that are one number, or the same for each channel: more would change the shape of what they meet."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._found = {
            name: float(array.flat[0])
            for name, array in arrays.items()
            if array.size
            and array.dtype == np.float32
            and array.size == max(array.shape, default=1)
            and (array == array.flat[0]).all()
        }

    def __getitem__(self, name: str) -> float | None:
        return self._found.get(name)

    def operand(self, node: Any) -> tuple[str, float] | None:
        """Returns the other operand and the number of a node of a value and a number."""
        for value, constant in (node.input, list(node.input)[::-1]):
            number = self._found.get(constant)
            if number is not None and value not in self._found:
                return value, number
        return None


def _alone(name: str, made: Mapping[str, Any], readers: Counter[str]) -> Any:
    """Returns the node that makes a value if nothing else reads the value."""
    return made.get(name) if readers[name] == 1 else None


def _clamp(node: Any, made: Mapping[str, Any], readers: Counter[str], numbers: _Numbers) -> _Clamp | None:
    inner: list[Any] = []
    if node.op_type != "Clip":
        return None
    x, low, high = (*node.input, "", "")[:3]
    top = numbers[high]
    if top is None or top <= 0:
        return None
    if not low:
        before = _alone(x, made, readers)
        if before is None or before.op_type != "Relu":
            return None
        inner.append(before)
        x = before.input[0]
    elif numbers[low] != 0:
        return None
    found = {"Add": 0.0, "Mul": 1.0}
    for kind in found:
        before = _alone(x, made, readers)
        pair = None if before is None or before.op_type != kind else numbers.operand(before)
        if pair is not None:
            inner.append(before)
            x, found[kind] = pair
    return _Clamp(x, found["Mul"], found["Add"], top, inner)
