"""Makes the program of a frozen network from a graph, its variables and hard masks, in one walk over the operations.

Values that do not depend on the image are evaluated. Scales and offsets are carried along with a value, and go into the
kernels and biases of the layers before and after it, so that batch norm disappears. Channels that do not vary, or that
nothing reads (`fdjax.frozen.kept`), are left out; the value of such a channel at each pixel is part of the offset.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fdjax.frozen.affine import apply_rule
from fdjax.frozen.building import Builder
from fdjax.frozen.carrying import canonical_shape, carry, constant_result
from fdjax.frozen.constants import evaluate_constants
from fdjax.frozen.kept import Kept
from fdjax.frozen.kernels_of_layers import (
    image_and_kernel,
    masked_kernel,
    offset_through,
    plain_kernel,
    scale_inputs,
    spread_of,
    window_of,
)
from fdjax.frozen.layers import Held, OpenLayer, places, uniform
from fdjax.graph.masks import Counts, MaskedGraph
from fdjax.graph.network import Layer
from fdjax.graph.operations import Operation


class Folding:
    """The walk over the operations.

    Attributes:
      builder: the program so far.
      inputs: the program's values of the images.
      outputs: the program's values of the results.
    """

    def __init__(self, network: MaskedGraph, variables: Any, counts: Counts):
        self.network, graph = network, network.graph
        self.kept = Kept(network, counts)
        self._live, self._graph = graph.walk.live, graph.operations
        self._constants = evaluate_constants(graph, variables)
        self._layer_of = {layer.operation: layer for layer in graph.layers.values()}
        self._readers = Counter(value for operation in self._graph.operations for value in set(operation.inputs))
        self._readers.update(self._graph.outputs)
        self._held: dict[int, Held] = {}
        self.builder = Builder()
        for image in self._graph.images:
            shape, live = self._graph.shapes[image], self._live[image]
            channels = shape[-1] if live.ids is not None else 0
            order = None if live.ids is None else np.arange(channels)
            self._held[image] = Held(self.builder.value(shape[1:]), order, None, np.zeros(channels))
        self.inputs = tuple(range(len(self.builder.shapes)))
        for index, operation in enumerate(self._graph.operations):
            if any(value in self._live for value in operation.inputs):
                self._step(index, operation)
        self.outputs = tuple(self._result(value) for value in self._graph.outputs)

    def _result(self, value: int) -> int:
        if value not in self._live:
            raise ValueError("the function returns a value that does not depend on its images")
        return self._whole(value)

    def _close(self, held: Held, value: int) -> None:
        """Puts scale and offset into a value's layer if several operations read the value; the layer is closed then."""
        if self._readers[value] > 1 and held.layer is not None:
            if held.scale is not None and held.layer.activation == "none":
                held.layer.scale(held.scale)
                held.scale = None
            # What is added here once costs nothing in the layer's bias; each reader would add it by an operation.
            if held.layer.takes_offsets:
                held.offset = self.settle(held).offset
            held.layer = None

    def settled(self, value: int) -> Held:
        """Settles a live value of the graph, once for all its readers: its layer may take up an offset only once."""
        self._held[value] = self.settle(self._held[value])
        return self._held[value]

    def settle(self, held: Held) -> Held:
        """Puts scale and offset into the layer before, or adds operations; the kept channels then equal `base`."""
        if held.base is None or held.order is None:
            return dataclasses.replace(held, layer=None)
        order, layer = held.order, held.layer
        present = np.zeros(held.offset.shape[-1], bool)
        present[order] = True
        here = np.where(present, held.offset, 0.0)
        rest = np.where(present, 0.0, held.offset)
        base, activation = held.base, held.activation
        if layer is not None and layer.takes_offsets:
            if held.scale is not None:
                layer.scale(held.scale)
            layer.bias = layer.bias + uniform(here)
            return Held(base, order, None, uniform(rest), layer, held.activation)
        if held.scale is not None and (held.scale[order] != 1).any():
            base, layer, activation = self.builder.elementwise("mul", base, held.scale[order]), None, "none"
        here = uniform(here)
        if here[..., order].any():
            base, layer, activation = self.builder.elementwise("add", base, here[..., order]), None, "none"
        return Held(base, order, None, uniform(rest), layer, activation)

    def base_of(self, value: int) -> int:
        """Returns the kept channels of a settled value as a value of the program, also if none of them varies."""
        held = self.settled(value)
        assert held.order is not None
        if held.base is not None:
            return held.base
        axis = self.axis_of(value)
        assert axis is not None
        base = self.builder.zeros((*canonical_shape(self.shape_of(value), axis)[1:-1], len(held.order)))
        here = held.offset[..., held.order]
        return self.builder.elementwise("add", base, here) if here.any() else base

    def _whole(self, value: int) -> int:
        """Returns the value of the program that has all of a value's channels, in the graph's layout."""
        held = self._held[value]
        if held.order is None:
            assert held.base is not None
            return held.base
        settled, live, shape = self.settled(value), self._live[value], self._graph.shapes[value]
        assert live.axis is not None
        channels = shape[live.axis]
        base = settled.base
        assert settled.order is not None
        if base is None:
            base = self.builder.zeros((*canonical_shape(shape, live.axis)[1:-1], len(settled.order)))
        if not np.array_equal(settled.order, np.arange(channels)):
            base = self.builder.take(base, places(np.arange(channels), settled.order) or ())
        if settled.offset.any():
            base = self.builder.elementwise("add", base, settled.offset)
        return self.builder.move_channels(base, len(shape) - 1, live.axis)

    def _step(self, index: int, operation: Operation) -> None:
        if index in self._layer_of and index not in self.network.walk.opaque:
            made = self._layer(self._layer_of[index], operation)
            self._set(operation.outputs[0], made)
            return
        if index in self.network.walk.shuffles:
            self._set(operation.outputs[0], self._shuffled(*self.network.walk.shuffles[index], operation.outputs[0]))
            return
        if index in self.network.walk.inside:
            return
        if index in self.network.walk.opaque:
            self._opaque(operation)
            return
        held = apply_rule(self, operation)
        if held is not None:
            self._set(operation.outputs[0], held)
            return
        self._general(operation)

    def _shuffled(self, source: int, order: np.ndarray, value: int) -> Held:
        """Reorders the channels of a value."""
        held, kept = self.settled(source), self.order_of(value)
        assert held.order is not None
        offset, indices = held.offset[..., order], places(order[kept], held.order)
        if held.base is None or indices is None:
            return Held(held.base, kept, None, offset)
        return Held(self.builder.take(held.base, indices), kept, None, offset)

    def _set(self, value: int, held: Held) -> None:
        self._close(held, value)
        self._held[value] = held

    def is_live(self, value: int) -> bool:
        """Whether a value of the graph depends on an image."""
        return value in self._live

    def held(self, value: int) -> Held:
        """Returns the `Held` of a live value."""
        return self._held[value]

    def constant(self, value: int) -> np.ndarray:
        """Returns a constant.

        Args:
          value: a value of the graph that does not depend on an image.

        Returns:
          Its array.
        """
        return self._constants[value]

    def vector(self, constant: int, like: int) -> np.ndarray | None:
        """Reduces a constant to one number a channel.

        Args:
          constant: a value of the graph that does not depend on an image.
          like: a live value of the same shape.

        Returns:
          float64 [C], for the channels of `like`; None if the constant differs within a channel.
        """
        array, live, shape = self._constants[constant], self._live[like], self._graph.shapes[like]
        if live.axis is None:
            return None
        channels = shape[live.axis]
        if array.size == 1:
            return np.full(channels, float(array.reshape(())))
        sides = [1] * len(shape)
        sides[live.axis] = channels
        if array.shape == tuple(sides):
            return array.reshape(-1).astype(np.float64)
        rows = np.moveaxis(np.broadcast_to(array, shape), live.axis, -1).reshape(-1, channels)
        return rows[0].astype(np.float64) if (rows == rows[0]).all() else None

    def combine(self, operation: Operation, sign: float) -> Held | None:
        """Adds or subtracts two values with the same channels."""
        first, second = (self._held[value] for value in operation.inputs)
        if first.order is None or second.order is None or operation.inputs[0] == operation.inputs[1]:
            return None
        if sign < 0 and first.base is None and second.base is not None:
            return None
        same = first.scale is not None and second.scale is not None and np.array_equal(first.scale, second.scale)
        settled = [first, second] if same else [self._unscaled(held) for held in (first, second)]
        # Offsets are added before the sum where that costs nothing, and where they would accumulate otherwise.
        first, second = (
            self._flattened(value) if held is self._held[value] else self._flatten(held)
            for value, held in zip(operation.inputs, settled, strict=True)
        )
        offset = uniform(first.offset + sign * second.offset)
        if first.base is None or second.base is None:
            alone = first if second.base is None else second
            return Held(alone.base, alone.order, alone.scale, offset)
        kind = "add" if sign > 0 else "sub"
        base = self.builder.emit(kind, [first.base, second.base], self.builder.shapes[first.base], {})
        return Held(base, first.order, first.scale, offset)

    def _unscaled(self, held: Held) -> Held:
        """Applies a value's scale: in the layer that makes it, if that is still open, else by an operation."""
        if held.base is None or held.scale is None or held.order is None:
            return held
        if held.layer is not None and held.layer.takes_offsets:
            held.layer.scale(held.scale)
            return dataclasses.replace(held, scale=None)
        base = self.builder.elementwise("mul", held.base, held.scale[held.order])
        return dataclasses.replace(held, base=base, scale=None, layer=None, activation="none")

    def _differs(self, held: Held) -> bool:
        """Whether the offset of a kept channel differs over the map."""
        if held.base is None or held.order is None or held.offset.ndim == 1:
            return False
        return bool(np.ptp(held.offset.reshape(-1, held.offset.shape[-1])[:, held.order], axis=0).any())

    def _flatten(self, held: Held) -> Held:
        """Adds an offset to the kept channels if it differs over the map, or if it can go into the layer's bias."""
        free = held.layer is not None and held.layer.takes_offsets
        return self.settle(held) if free or self._differs(held) else held

    def _flattened(self, value: int) -> Held:
        """Flattens a live value of the graph, once for all its readers."""
        self._held[value] = self._flatten(self._held[value])
        return self._held[value]

    def _layer(self, layer: Layer, operation: Operation) -> Held:
        image_side, kernel_side = image_and_kernel(operation, self._live)
        value = operation.inputs[image_side]
        x, live = self._flattened(value), self._live[operation.outputs[0]]
        assert x.order is not None and live.ids is not None
        kernel = plain_kernel(layer, operation, kernel_side, self._constants[operation.inputs[kernel_side]])
        counts = self.kept.counts(layer.name, "input"), self.kept.counts(layer.name, "output")
        block = self.network.blocks.get(layer.name)
        if block is None and layer.mixes:
            kernel = masked_kernel(kernel, layer.groups, *counts)
        window = window_of(layer, operation)
        if max(spread_of(operation)) > 1:
            x = self._spread(self.settled(value), layer.in_size, spread_of(operation))
        order = self.kept.order(live.ids)
        if layer.groups > 1 and layer.mixes:
            x = self._of_groups(x, layer, order)
        if window is not None and any(any(pads) for pads in window.pads):
            # The padding is zero, so the offset has to be added to the map before it is padded.
            x = self._settled_but_scaled(x)
        offset = offset_through(kernel, x.offset, window, layer, block, counts)
        if x.base is None or x.order is None or not len(order):
            return Held(None, order, None, offset)
        made = OpenLayer(
            name=self.builder.name(layer.name),
            kind="conv" if window is not None else "pointwise",
            x=x.base,
            y=self.builder.value((*layer.out_size, len(order))),
            x_order=x.order,
            y_order=order,
            kernel=kernel if x.scale is None else scale_inputs(kernel, x.scale, layer.groups),
            size=layer.out_size,
            bias=np.zeros(layer.out_channels),
            counts=counts,
            window=window,
            groups=layer.groups,
            block=block or 1,
            source=x.layer,
        )
        self.builder.records.append(made)
        return Held(made.y, order, None, offset, made)

    def _of_groups(self, held: Held, layer: Layer, order: np.ndarray) -> Held:
        """Selects the input channels of the groups of which an output is kept; others read the other channels."""
        inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        if held.base is None or held.order is None or not len(order):
            return held
        read = np.concatenate(
            [np.arange(group * inputs, (group + 1) * inputs) for group in np.unique(order // outputs)]
        )
        indices = places(read, held.order)
        if indices is None:
            return held
        return dataclasses.replace(held, base=self.builder.take(held.base, indices), order=read, layer=None)

    def _spread(self, held: Held, size: tuple[int, ...], steps: tuple[int, ...]) -> Held:
        """Puts zeros between the pixels of a settled map."""
        sides = [(side - 1) * step + 1 for side, step in zip(size, steps, strict=True)]
        channels = held.offset.shape[-1]
        offset = np.zeros((*sides, channels))
        offset[:: steps[0], :: steps[1]] = held.offset
        if held.base is None:
            return Held(None, held.order, None, offset)
        config = ((0, 0, 0), *((0, 0, step - 1) for step in steps), (0, 0, 0))
        shape = (*sides, self.builder.shapes[held.base][-1])
        base = self.builder.emit("pad", [held.base, np.zeros(())], shape, {"padding_config": config})
        return Held(base, held.order, None, uniform(offset))

    def _settled_but_scaled(self, held: Held) -> Held:
        """Adds the offset of the kept channels, and leaves the scale to later operations."""
        if held.base is None or held.order is None or not held.offset[..., held.order].any():
            return held
        if held.scale is None or held.layer is not None:
            return self.settle(held)
        scale = np.where(held.scale == 0, 1.0, held.scale)
        if (held.scale == 0).any():
            return self.settle(held)
        settled = self.settle(dataclasses.replace(held, scale=None, offset=held.offset / scale))
        return dataclasses.replace(settled, scale=held.scale, offset=settled.offset * scale)

    def _opaque(self, operation: Operation) -> None:
        """Handles an operation without a rule: it is applied to all channels."""
        inputs = [self._whole(value) if value in self._live else self._constants[value] for value in operation.inputs]
        self._bind(operation, inputs)

    def _general(self, operation: Operation) -> None:
        """Handles an operation that carries channels along, or moves them: it is applied to the kept channels."""
        carried = carry(self, operation)
        if carried is not None:
            for value, held in carried.items():
                self._set(value, held)
            return
        self._opaque(operation)

    def _bind(self, operation: Operation, inputs: Sequence[int | np.ndarray]) -> None:
        """Adds an operation as it is in the graph, on all channels."""
        arguments = [
            np.asarray(argument, self.host_dtype(value)) if isinstance(argument, np.ndarray) else argument
            for argument, value in zip(inputs, operation.inputs, strict=True)
        ]
        what = f"a frozen network has no form for {operation.kind}{operation.source and f' ({operation.source})'}"
        if len(operation.outputs) != 1:
            raise ValueError(f"{what}, which has several results")
        (value,) = operation.outputs
        live, shape = self._live[value], self._graph.shapes[value]
        if shape and shape[0] != self.network.walk.batch:
            raise ValueError(f"{what}, because the first axis of its result is not that of the images: keep them first")
        try:
            made = self.builder.emit(operation.kind, arguments, shape[1:], operation.params)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
        if live.axis is None:
            self._set(value, Held(made))
            return
        made = self.builder.move_channels(made, live.axis, len(shape) - 1)
        channels = shape[live.axis]
        assert live.ids is not None
        order, offset = self.kept.order(live.ids), np.zeros(channels)
        if not np.array_equal(order, np.arange(channels)):
            made = self.builder.take(made, tuple(map(int, order)))
            offset = self._dropped(operation, what)
            offset[..., order] = 0.0
        self._set(value, Held(made, order, None, uniform(offset)))

    def _dropped(self, operation: Operation, what: str) -> np.ndarray:
        """Returns what the channels of an operation's result hold that are not kept, [..., C], the same for all images.

        Raises:
          ValueError: if they may differ from image to image.
        """
        lives = [value for value in operation.inputs if value in self._live]
        offsets = [self.settled(value).offset for value in lives if self._live[value].axis is not None]
        if len(offsets) == len(lives):
            return constant_result(self, operation, offsets)
        live = self._live[operation.outputs[0]]
        assert live.ids is not None
        dropped = np.ones(len(live.ids), bool)
        dropped[self.kept.order(live.ids)] = False
        # A product with a value that has no channels, such as a number for each image, leaves what is 0.
        zero = operation.kind == "mul" and not any(offset.any() for offset in offsets)
        if not zero and (dropped & self.kept.are_read(live.ids)).any():
            raise ValueError(f"{what} where masks remove channels, whose values would differ from image to image")
        return np.zeros(len(dropped))

    def order_of(self, value: int) -> np.ndarray:
        """Returns the kept channels of a value.

        Args:
          value: a live value of the graph.

        Returns:
          Their positions, in order, int [kept].
        """
        ids = self._live[value].ids
        assert ids is not None
        return self.kept.order(ids)

    def shape_of(self, value: int) -> tuple[int, ...]:
        """Returns the shape of a value of the graph, with a batch of 1."""
        return self._graph.shapes[value]

    def host_dtype(self, value: int) -> np.dtype:
        """Returns the dtype in which a value of the graph is computed and stored; float32 for any floating point."""
        dtype = jnp.dtype(self._graph.dtypes[value])
        return np.dtype(np.float32) if jnp.issubdtype(dtype, np.floating) else dtype

    def is_floating(self, value: int) -> bool:
        """Returns whether a value of the graph is floating point."""
        return bool(jnp.issubdtype(self._graph.dtypes[value], jnp.floating))

    def is_image(self, value: int) -> bool:
        """Returns whether a value of the graph is one of the network's inputs."""
        return value in self._graph.images

    def axis_of(self, value: int) -> int | None:
        """Returns the axis of a live value's channels."""
        return self._live[value].axis

    def graph_layout(self, base: int, value: int) -> int:
        """Brings a value of the program, whose channels are last, to the graph's layout of `value`."""
        axis = self._live[value].axis
        assert axis is not None
        return self.builder.move_channels(base, len(self._graph.shapes[value]) - 1, axis)

    def canonical(self, base: int, value: int) -> int:
        """Does the inverse of `graph_layout`."""
        axis = self._live[value].axis
        assert axis is not None
        return self.builder.move_channels(base, axis, len(self._graph.shapes[value]) - 1)
