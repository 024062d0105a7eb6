"""A program while it is being made: values are numbered, operations are named, arrays lie beside them."""

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
      records: the operations in order: finished ones, and open layers.
      arrays: of the finished ones.
      shapes: of the program's values, without the batch.
    """

    def __init__(self) -> None:
        self.records: list[OpenLayer | Apply | Take] = []
        self.arrays: HostArrays = {}
        self.shapes: list[tuple[int, ...]] = []
        self._names: Counter[str] = Counter()

    def value(self, shape: Sequence[int]) -> int:
        """A new value."""
        self.shapes.append(tuple(shape))
        return len(self.shapes) - 1

    def name(self, name: str) -> str:
        """The name with a number behind it, where it is taken."""
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}_{self._names[name]}"

    def emit(
        self, kind: str, inputs: Sequence[int | np.ndarray], shape: Sequence[int], params: Mapping[str, Any]
    ) -> int:
        """Adds an operation on values (numbers) and arrays; returns the value it makes."""
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
        """x (kind) vector, where the vector has a number for each kept channel, or for each pixel and channel."""
        shape = self.shapes[x]
        array = vector.reshape(1, *(1,) * (len(shape) - vector.ndim), *vector.shape)
        params = {"mul": {"out_dtype": None}}.get(kind, {})
        return self.emit(kind, [x, array], shape, params)

    def take(self, x: int, indices: tuple[int, ...]) -> int:
        """Channels of a value in another order, -1 for zero."""
        made = self.value((*self.shapes[x][:-1], len(indices)))
        self.records.append(Take(self.name("take"), x, made, indices))
        return made

    def move_channels(self, x: int, source: int, target: int) -> int:
        """Moves an axis (counted with the batch) to another place."""
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
        """A value of zeros."""
        params = {"shape": (1, *shape), "broadcast_dimensions": (), "sharding": None}
        return self.emit("broadcast_in_dim", [np.zeros(())], shape, params)
