"""The channel axis of each value, and which channels are the same one: a single walk over the operations.

Every channel has an identity. Elementwise operations and additions of two maps join the channels that they combine.
Depthwise convolutions, pools, pads and reductions over pixels pass channels on. Concatenation and slicing index them. A
layer that mixes channels reads some and writes fresh ones. An operation that is not understood pins the channels that
it touches, so that they are not pruned.
"""

from __future__ import annotations

import math

import numpy as np

from fdjax.graph.channel_rules import rule_of
from fdjax.graph.identity import Classes, Ids, Live, Mixing
from fdjax.graph.operations import Operation, Operations
from fdjax.graph.products import operation_macs
from fdjax.graph.shuffles import Shuffles


class ChannelWalk:
    """Walks the operations once and records their channels.

    Attributes:
      live: value -> its channels, for every value that depends on an image.
      classes: which channel numbers are one channel.
      pinned: channel number -> why the channel may not be pruned.
      mixing: the layers, in order of evaluation.
      opaque: operation index -> why the operation is not understood.
      shuffles: index of the operation that ends a channel shuffle -> the value that is shuffled, and for each channel
        of the result, the channel of that value.
      inside: indices of the earlier operations of the channel shuffles.
      product_macs: MACs of the products that belong to no layer, such as those of attention, for all images.
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
        self.product_macs = 0
        self._shuffles = Shuffles(operations)
        # Value that depends on variables alone -> the path of its kernel.
        self._kernels: dict[int, str] = dict(operations.variables)
        for image in operations.images:
            shape = self._shapes[image]
            # A number for each image, such as a time, has no channels.
            axis, ids = (len(shape) - 1, self.classes.fresh(shape[-1])) if len(shape) > 1 else (None, None)
            self.set(image, axis, ids)
            self.pin(ids, "a channel of the images")
        for index, operation in enumerate(operations.operations):
            if any(value in self.live for value in operation.inputs):
                self._step(index, operation)
            else:
                self._name_kernel(operation)
        for value in operations.outputs:
            if value in self.live:
                self.pin(self.live[value].ids, "a channel of the result")

    def shape(self, value: int) -> tuple[int, ...]:
        """Returns the shape of a value."""
        return self._shapes[value]

    @property
    def batch(self) -> int:
        """The number of images that the network was traced with."""
        shape = self._shapes[self.operations.images[0]]
        return shape[0] if shape else 1

    def kernel_of(self, value: int) -> str:
        """Returns the path of the kernel that a value holds, or "" if it holds none."""
        return self._kernels.get(value, "")

    def _name_kernel(self, operation: Operation) -> None:
        """Passes a kernel's name to what is computed from it; of several kernels, the largest one's."""
        named = [value for value in operation.inputs if value in self._kernels]
        if named:
            largest = max(named, key=lambda value: math.prod(self._shapes[value]))
            self._kernels.update(dict.fromkeys(operation.outputs, self._kernels[largest]))

    def set(self, value: int, axis: int | None, ids: Ids | None) -> None:
        """Records where a value has its channels.

        Args:
          value: number of the value.
          axis: the axis that holds the channels; None if the value has none.
          ids: the channel numbers along that axis, int [channels]; None if the value has none.
        """
        self.live[value] = Live(axis, ids if axis is not None else None)

    def pin(self, ids: Ids | None, reason: str) -> None:
        """Says why channels may not be pruned; the first reason counts.

        Args:
          ids: channel numbers; None for none.
          reason: why.
        """
        for channel in () if ids is None else ids.tolist():
            self.pinned.setdefault(channel, reason)

    def shuffle(self, index: int, operation: Operation) -> bool:
        """Records the channel shuffle that begins with an operation, if any; its intermediate values get no channels.

        Args:
          index: index of the operation.
          operation: a reshape.

        Returns:
          Whether a channel shuffle begins here.
        """
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
        layers = len(self.mixing)
        problem = f"{operation.kind} is not understood" if rule is None else rule(self, index, operation)
        if len(self.mixing) == layers:
            self.product_macs += operation_macs(operation, self._shapes)
        if problem is None:
            return
        where = f" ({operation.source})" if operation.source else ""
        self.opaque[index] = problem + where
        for value in operation.inputs:
            if value in self.live:
                self.pin(self.live[value].ids, problem + where)
        for value in operation.outputs:
            shape = self._shapes[value]
            # A layer may read the last axis of the output; it then reads pinned channels.
            self.set(value, len(shape) - 1 if len(shape) > 1 else None, self.classes.fresh(shape[-1] if shape else 0))
            self.pin(self.live[value].ids, problem + where)
