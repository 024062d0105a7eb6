"""Builds a program: numbers its values, names its operations, and collects their arrays."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fdjax.frozen.layers import HostArrays, OpenLayer
from fdjax.frozen.program import Apply, Take
from fdjax.graph.primitives import params_to_json


class Builder:
    """Collects the operations of a program.

    Attributes:
      records: finished operations and open layers, in order.
      arrays: the arrays of the finished operations.
      shapes: the shapes of the program's values, without the batch.
    """

    def __init__(self) -> None:
        self.records: list[OpenLayer | Apply | Take] = []
        self.arrays: HostArrays = {}
        self.shapes: list[tuple[int, ...]] = []
        self._names: Counter[str] = Counter()

    def value(self, shape: Sequence[int]) -> int:
        """Adds a value of a shape (without the batch); returns its number."""
        self.shapes.append(tuple(shape))
        return len(self.shapes) - 1

    def name(self, name: str) -> str:
        """Returns the name, with a number appended if it is taken."""
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}_{self._names[name]}"

    def emit(
        self, kind: str, inputs: Sequence[int | np.ndarray], shape: Sequence[int], params: Mapping[str, Any]
    ) -> int:
        """Adds an operation.

        Args:
          kind: the primitive's name.
          inputs: numbers of values, and arrays.
          shape: shape of the result, without the batch.
          params: the primitive's parameters.

        Returns:
          The number of the result.
        """
        name, made, arguments = self.name(kind), self.value(shape), []
        for argument in inputs:
            if isinstance(argument, np.ndarray):
                at = sum(number < 0 for number in arguments)
                self.arrays[f"{name}/arg{at}"] = argument
                arguments.append(-1 - at)
            else:
                arguments.append(argument)
        written = json.dumps(params_to_json(kind, params), sort_keys=True)
        self.records.append(Apply(name, kind, tuple(arguments), (made,), written))
        return made

    def elementwise(self, kind: str, x: int, vector: np.ndarray) -> int:
        """Adds an elementwise operation of a value and a constant.

        Args:
          kind: the primitive's name, such as "add".
          x: the number of the value.
          vector: the constant, [C] or [H, W, C], for the kept channels.

        Returns:
          The number of the result.
        """
        shape = self.shapes[x]
        array = vector.reshape(1, *(1,) * (len(shape) - vector.ndim), *vector.shape)
        params = {"mul": {"out_dtype": None}}.get(kind, {})
        return self.emit(kind, [x, array], shape, params)

    def take(self, x: int, indices: tuple[int, ...]) -> int:
        """Adds a selection of channels of a value; the index -1 stands for a channel of zeros."""
        made = self.value((*self.shapes[x][:-1], len(indices)))
        self.records.append(Take(self.name("take"), x, made, indices))
        return made

    def move_channels(self, x: int, source: int, target: int) -> int:
        """Adds a transposition that moves the axis `source` to `target`; both count the batch."""
        if source == target:
            return x
        rank = len(self.shapes[x]) + 1
        permutation = [axis for axis in range(rank) if axis != source]
        permutation.insert(target, source)
        shape = (1, *self.shapes[x])
        return self.emit(
            "transpose", [x], [shape[axis] for axis in permutation][1:], {"permutation": tuple(permutation)}
        )

    def zeros(self, shape: Sequence[int]) -> int:
        """Adds a value of zeros."""
        params = {"shape": (1, *shape), "broadcast_dimensions": (), "sharding": None}
        return self.emit("broadcast_in_dim", [np.zeros(())], shape, params)
