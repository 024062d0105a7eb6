"""Which axis of a value holds its channels, and which channels are the same: one walk over the operations.

A channel has an identity. Elementwise operations and additions of two maps join the channels of what they combine;
depthwise convolutions, pools, pads and reductions over pixels carry them on; concatenation and slicing index them; a
layer that mixes channels reads some and writes fresh ones. An operation that is not understood pins the channels that
it touches: they may not go.
"""

from __future__ import annotations

import math

import numpy as np

from fdjax.graph.channel_rules import rule_of
from fdjax.graph.identity import Classes, Ids, Live, Mixing
from fdjax.graph.operations import Operation, Operations
from fdjax.graph.shuffles import Shuffles


class ChannelWalk:
    """Walks the operations once.

    Attributes:
      live: value -> its channels, for every value that depends on an image.
      classes: which channel numbers are one channel.
      pinned: channel number -> why it may not go.
      mixing: the layers, in order.
      opaque: operation index -> why it is not understood.
      shuffles: index of the operation that ends a channel shuffle -> the value that is shuffled, and for each channel
        of the result which one of that value's it is.
      inside: indices of the operations before it, which are part of the shuffle.
    """

    def __init__(self, operations: Operations):
        self.operations, self._shapes = operations, operations.shapes
        self.live: dict[int, Live] = {}
        self.classes = Classes()
        self.pinned: dict[int, str] = {}
        self.mixing: list[Mixing] = []
        self.opaque: dict[int, str] = {}
        self.shuffles: dict[int, tuple[int, np.ndarray]] = {}
        self.inside: set[int] = set()
        self._shuffles = Shuffles(operations)
        # Value of the variables alone -> the path of the kernel in it.
        self._kernels: dict[int, str] = dict(operations.variables)
        for image in operations.images:
            shape = self._shapes[image]
            self.set(image, len(shape) - 1, self.classes.fresh(shape[-1]) if shape else None)
            self._pin(self.live[image], "a channel of the images")
        for index, operation in enumerate(operations.operations):
            if any(value in self.live for value in operation.inputs):
                self._step(index, operation)
            else:
                self._name_kernel(operation)
        for value in operations.outputs:
            if value in self.live:
                self._pin(self.live[value], "a channel of the result")

    def shape(self, value: int) -> tuple[int, ...]:
        """Of a value."""
        return self._shapes[value]

    def kernel_of(self, value: int) -> str:
        """The path of the kernel that a value of the variables is, or ""."""
        return self._kernels.get(value, "")

    def _name_kernel(self, operation: Operation) -> None:
        """A kernel that is reshaped keeps its name; of several, the name of the largest."""
        named = [value for value in operation.inputs if value in self._kernels]
        if named:
            largest = max(named, key=lambda value: math.prod(self._shapes[value]))
            self._kernels.update(dict.fromkeys(operation.outputs, self._kernels[largest]))

    def set(self, value: int, axis: int | None, ids: Ids | None) -> None:
        """Where a value has its channels, and which."""
        self.live[value] = Live(axis, ids if axis is not None else None)

    def _pin(self, live: Live, reason: str) -> None:
        if live.ids is not None:
            for channel in live.ids.tolist():
                self.pinned.setdefault(channel, reason)

    def shuffle(self, index: int, operation: Operation) -> bool:
        """Whether a channel shuffle begins here; its result is then known, and its parts have no channels."""
        (value,) = operation.inputs
        live = self.live[value]
        assert live.axis is not None and live.ids is not None
        found = self._shuffles.from_(index, live.axis)
        if found is None:
            return False
        (middle, last), order = found
        for part in (index, middle):
            self.set(self.operations.operations[part].outputs[0], None, None)
            self.inside.add(part)
        self.set(self.operations.operations[last].outputs[0], live.axis, live.ids[order])
        self.shuffles[last] = value, order
        return True

    def _step(self, index: int, operation: Operation) -> None:
        if index in self.shuffles or index in self.inside:
            return
        rule = rule_of(operation.kind)
        problem = f"{operation.kind} is not understood" if rule is None else rule(self, index, operation)
        if problem is None:
            return
        where = f" ({operation.source})" if operation.source else ""
        self.opaque[index] = problem + where
        for value in operation.inputs:
            if value in self.live:
                self._pin(self.live[value], problem + where)
        for value in operation.outputs:
            shape = self._shapes[value]
            # Its last axis may be read by a layer, which then reads channels that may not go.
            self.set(value, len(shape) - 1 if len(shape) > 1 else None, self.classes.fresh(shape[-1] if shape else 0))
            self._pin(self.live[value], problem + where)
