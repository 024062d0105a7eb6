"""Channel shuffles: a reshape, a transpose and a reshape that together only permute channels."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from fdjax.graph.operations import Operation, Operations


class Shuffles:
    """Finds the channel shuffles of a network.

    Args:
      operations: the network's operations.
    """

    def __init__(self, operations: Operations):
        self._shapes, self._operations = operations.shapes, operations.operations
        self._reads = Counter(value for operation in self._operations for value in operation.inputs)
        self._reads.update(operations.outputs)
        self._readers = {value: index for index, o in enumerate(self._operations) for value in o.inputs}

    def from_(self, index: int, axis: int) -> tuple[tuple[int, int], np.ndarray] | None:
        """Finds the shuffle that begins with an operation.

        Args:
          index: index of a reshape.
          axis: the axis of its input that holds the channels.

        Returns:
          (indices, order): the indices of the two operations that follow, and for each channel of the result, the
          channel of the input, int [channels]. None if no shuffle begins here.
        """
        first = self._operations[index]
        found = self._next(first, "transpose")
        last = None if found is None else self._next(self._operations[found], "reshape")
        if found is None or last is None:
            return None
        value, (made,) = first.inputs[0], self._operations[last].outputs
        shape = self._shapes[value]
        if self._shapes[made] != shape or first.params.get("dimensions") or self._operations[last].params["dimensions"]:
            return None
        numbers = np.arange(math.prod(shape)).reshape(shape)
        moved = numbers.reshape(self._shapes[first.outputs[0]])
        moved = moved.transpose(self._operations[found].params["permutation"]).reshape(shape)
        line = tuple(slice(None) if at == axis else 0 for at in range(len(shape)))
        order = moved[line] // math.prod(shape[axis + 1 :])
        if order.max(initial=0) >= shape[axis]:
            return None
        return ((found, last), order) if np.array_equal(np.take(numbers, order, axis), moved) else None

    def _next(self, operation: Operation, kind: str) -> int | None:
        """Returns the index of the only reader of an operation's output, if it is of a kind, or None."""
        (value,) = operation.outputs
        index = self._readers.get(value)
        one = self._reads[value] == 1 and index is not None and self._operations[index].kind == kind
        return index if one else None
