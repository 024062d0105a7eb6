"""Writes layers and runs of a frozen network in ONNX, with a function for each kind of operation."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from fdjax.frozen.onnx_graph import Graph, Value
from fdjax.frozen.onnx_products import HostArrays, Part, Products, cover
from fdjax.frozen.products import Pads, Size, Window, block_shares, mean_phases
from fdjax.frozen.program import Chain, Conv, Pointwise, Run, Take

Layer = Conv | Pointwise | Run | Take


class Layers:
    """Writes layers into a graph; `arrays` are the network's arrays, float32."""

    def __init__(self, graph: Graph, arrays: HostArrays):
        self.graph, self.arrays, self.products = graph, arrays, Products(graph, arrays)

    def layer(self, operation: Layer, x: Value, shape: tuple[int, ...]) -> Value:
        """Writes an operation other than `Apply` on `x`; returns its result, which has `shape`."""
        if isinstance(operation, Take):
            return self._take(operation, x, shape)
        if 0 in shape:
            return Value(shape)
        if isinstance(operation, Conv):
            return Value(shape, channels_first=self._conv(operation, self.graph.channels_first(x)))
        if isinstance(operation, Run):
            return Value(shape, channels_first=self._run(operation, x))
        if len(operation.size) == 2 and operation.pooled:
            return Value(shape, plain=self._pooled(operation, x))
        if len(operation.size) == 2:
            return Value(shape, channels_first=self._pointwise(operation, x))
        return Value(shape, plain=self._on_vectors(operation, x))

    def _bias_of(self, operation: Conv | Pointwise | Run) -> np.ndarray | None:
        return None if operation.bias == "none" else self.arrays[f"{operation.name}/bias"]

    def _take(self, operation: Take, x: Value, shape: tuple[int, ...]) -> Value:
        if x.is_map:
            return Value(
                shape, channels_first=self.graph.take(self.graph.channels_first(x), operation.indices, x.shape[-1])
            )
        y = self.graph.take(self.graph.plain(x), operation.indices, x.shape[-1], len(shape), len(shape) + 1)
        return Value(shape, x.dtype, plain=y)

    # Convolutions

    def _window_conv(
        self, x: str, kernel: np.ndarray, window: Window, groups: int, bias: np.ndarray | None = None
    ) -> str:
        """Adds a convolution with a kernel [rows, columns, C / groups, D]."""
        x, pads = self._trimmed(x, window)
        (top, bottom), (left, right) = pads
        how = {
            "strides": list(window.stride),
            "pads": [top, left, bottom, right],
            "dilations": list(window.dilation),
        }
        return self.graph.conv(x, kernel.transpose(3, 2, 0, 1), bias, group=groups, **how)

    def _trimmed(self, x: str, window: Window) -> tuple[str, Pads]:
        """Replaces negative padding, which engines refuse, by a slice."""
        starts, stops = [max(0, -before) for before, _ in window.pads], []
        for (_, after), length in zip(window.pads, window.in_size, strict=True):
            stops.append(length + min(0, after))
        if any(starts) or stops != list(window.in_size):
            x = self.graph.slice(x, starts, stops, [2, 3])
        rows, columns = ((max(0, before), max(0, after)) for before, after in window.pads)
        return x, (rows, columns)

    def _conv(self, layer: Conv, x: str) -> str:
        bias = self._bias_of(layer)
        inside = bias if bias is not None and bias.ndim == 1 else None
        y = self._window_conv(x, self.arrays[f"{layer.name}/kernel"], layer.window, layer.groups, inside)
        y = self.graph.bias(y, bias) if bias is not None and inside is None else y
        return self.graph.activate(y, layer.activation)

    # Pointwise layers

    def _part(self, x: Value, name: str, layer: Pointwise) -> Part:
        product, size = layer.product, (layer.size[0], layer.size[1])
        if not product.inputs:
            return Part(None, 0, ())
        given, width = self.graph.channels_first(x), x.shape[-1]
        (coefs,) = self.products.analyse(given, width, layer.block, size, [product])
        return self.products.multiply(given, width, coefs, name, product)

    def _pointwise(self, layer: Pointwise, x: Value) -> str:
        product, size, bias = layer.product, (layer.size[0], layer.size[1]), self._bias_of(layer)
        plain = not product.transforms and product.inputs and product.outputs
        if plain and layer.placement is None and bias is not None and bias.ndim == 1:
            given = self.graph.take(self.graph.channels_first(x), product.input_order, x.shape[-1])
            y = self.products.matrix_product(given, self.arrays[f"{layer.name}/whole"], bias)
            return self.graph.activate(y, layer.activation)
        parts = [self._part(x, layer.name, layer)]
        pieces = self.products.compose(parts, product.output_segments, product.output_counts, layer.block, size)
        return self._finished(pieces, layer, product.outputs, size)

    def _finished(self, pieces: Sequence[str], operation: Pointwise | Run, made: int, size: Size) -> str:
        """Applies placement, bias and activation."""
        if made:
            y = self.graph.take(self.graph.concat(pieces, 1), operation.placement, made)
        else:
            y = self.products.zeros((operation.outputs, *size))
        bias = self._bias_of(operation)
        return self.graph.activate(y if bias is None else self.graph.bias(y, bias), operation.activation)

    def _pooled(self, layer: Pointwise, x: Value) -> str:
        """Computes the mean over the map, [B, D]; what is constant in every block stays at block resolution."""
        graph, product, bias = self.graph, layer.product, self._bias_of(layer)
        if layer.placement is not None or (bias is not None and bias.ndim > 1):
            return self._mean(self._pointwise(layer, x))
        size, part, pieces = (layer.size[0], layer.size[1]), self._part(x, layer.name, layer), []
        for segment in product.output_segments:
            start, stop, count = segment
            if count == 1 and start >= product.whole[1]:
                y = self.products.segment_coefs([part], segment)
            else:
                (y,) = self.products.compose([part], [segment], product.output_counts, layer.block, size)
            y = graph.activate(y if bias is None else graph.bias(y, bias[start:stop]), layer.activation)
            if count == 1 and start >= product.whole[1] and any(length % layer.block for length in size):
                # Each block is weighted by its part that lies on the map.
                shares = graph.constant(np.outer(*block_shares(size, layer.block)).reshape(1, 1, 1, -1))
                pieces.append(graph.op("ReduceSum", graph.op("Mul", y, shares), graph.integers(2, 3), keepdims=0))
            else:
                pieces.append(self._mean(y))
        return graph.concat(pieces, 1)

    def _mean(self, y: str) -> str:
        return self.graph.op("Flatten", self.graph.op("GlobalAveragePool", y))

    def _on_vectors(self, layer: Pointwise, x: Value) -> str:
        """Computes a layer on vectors, [B, C] -> [B, D], or on tokens, [B, tokens, C] -> [B, tokens, D]."""
        graph, product, axis = self.graph, layer.product, len(layer.size) + 1
        bias = self._bias_of(layer)
        if product.inputs and product.outputs:
            kernel = graph.constant(self.arrays[f"{layer.name}/whole"])
            y = graph.take(graph.plain(x), product.input_order, x.shape[-1], axis, axis + 1)
            if axis == 1 and layer.placement is None and bias is not None:
                return graph.activate(graph.op("Gemm", y, kernel, graph.constant(bias)), layer.activation)
            y = graph.take(graph.op("MatMul", y, kernel), layer.placement, product.outputs, axis, axis + 1)
        else:
            y = self.products.zeros((*layer.size, layer.outputs))
        y = y if bias is None else graph.op("Add", y, graph.constant(bias))
        return graph.activate(y, layer.activation)

    # Runs

    def _run(self, run: Run, x: Value) -> str:
        given, width = (self.graph.channels_first(x), x.shape[-1]) if run.chains else ("", 0)
        others = [chain for chain in run.chains if not chain.means]
        if len(others) < len(run.chains) and not any(
            product.transforms for chain in others for product in (chain.writer, chain.reader)
        ):
            return self._run_of_pixels_and_means(run, given, width)
        parts: list[Part] = []
        writers = [chain.writer for chain in run.chains]
        inputs = self.products.analyse(given, width, run.blocks[0], run.in_size, writers) if run.chains else []
        for coefs, chain in zip(inputs, run.chains, strict=True):
            part = self.products.multiply(given, width, coefs, f"{run.name}/{chain.name}/writer", chain.writer)
            parts.append(self._means_part(part, run, chain) if chain.means else self._chain(part, run, chain))
        pieces = self.products.compose(parts, run.segments, run.output_counts, run.blocks[1], run.out_size)
        return self._finished(pieces, run, len(run.output_counts), run.out_size)

    def _run_of_pixels_and_means(self, run: Run, x: str, width: int) -> str:
        """Computes a run whose only transforms are means; these stay maps [B, C, R, S].

        Engines then fuse the following operations, and do not have to transpose.
        """
        made = []
        for chain in run.chains:
            name = f"{run.name}/{chain.name}"
            if chain.means:
                y = self.products.block_means(self.graph.take(x, chain.writer.input_order, width), run.blocks[0])
                y = self._means(self.products.matrix_product(y, self.arrays[f"{name}/writer/rest0"]), run, chain)
                y = self.products.matrix_product(y, self.arrays[f"{name}/reader/rest0"])
                made.append(self.products.spread(y, run.blocks[1]))
            else:
                part = self._chain(self.products.multiply(x, width, {}, f"{name}/writer", chain.writer), run, chain)
                made.append(part.pixels or self.products.zeros((len(run.output_counts), *run.out_size)))
        return self._finished([self.graph.add(made)], run, len(run.output_counts), run.out_size)

    def _chain(self, part: Part, run: Run, chain: Chain) -> Part:
        graph, name, block, writer = self.graph, f"{run.name}/{chain.name}", run.blocks[1], chain.writer
        args = writer.output_segments, writer.output_counts, run.blocks[0], run.in_size
        y = graph.concat(self.products.compose([part], *args), 1)
        for index, step in enumerate(run.steps):
            array = self.arrays[f"{name}/step{index}"]
            if step.window is None:
                y = graph.activate(graph.bias(y, array), step.activation)
            else:
                y = self._window_conv(y, array[:, :, None], step.window, chain.channels)
        (coefs,) = self.products.analyse(y, chain.channels, block, run.out_size, [chain.reader])
        return self.products.multiply(y, chain.channels, coefs, f"{name}/reader", chain.reader)

    def _means_part(self, part: Part, run: Run, chain: Chain) -> Part:
        """Computes a chain of means in a run that has other coefficients, too."""
        graph, name = self.graph, f"{run.name}/{chain.name}"
        y = self.products.segment_coefs([part], (0, chain.channels, 1))
        y = self._means(graph.reshape(y, [-1, chain.channels, *cover(run.in_size, run.blocks[0])]), run, chain)
        rows, columns = cover(run.out_size, run.blocks[1])
        mean = graph.reshape(y, [-1, chain.channels, 1, rows * columns])
        coefs = {segment[:2]: mean for segment in chain.reader.input_segments}
        return self.products.multiply(y, chain.channels, coefs, f"{name}/reader", chain.reader)

    def _means(self, y: str, run: Run, chain: Chain) -> str:
        """Computes the steps of a chain of means: [B, E, R, S] -> [B, E, R', S']."""
        name, spread = f"{run.name}/{chain.name}", False
        for index, step in enumerate(run.steps):
            array = self.arrays[f"{name}/step{index}"]
            if step.window is None:
                y = self.graph.activate(self.graph.bias(y, array), step.activation)
                continue
            # One convolution on pixels takes less time than one for each phase on blocks.
            y, spread = self.products.spread(y, run.blocks[0]), True
            kernel = _kernel_of_phases(array, step.window, run.blocks[0])
            y = self._window_conv(y, kernel[:, :, None], step.window, chain.channels)
        return self.products.block_means(y, run.blocks[1]) if spread else y


@functools.cache
def _phase_sums(window: Window, block: int) -> np.ndarray:
    """Returns which taps of the kernel are summed to each tap of the phases, [T, rows * columns]."""
    rows, columns = window.window
    sums = []
    for phase in mean_phases(window, block):
        for _, _, in_rows, in_columns in phase.taps:
            taken = np.zeros((rows, columns))
            taken[np.ix_(in_rows, in_columns)] = 1
            sums.append(taken.ravel())
    return np.array(sums)


def _kernel_of_phases(taps: np.ndarray, window: Window, block: int) -> np.ndarray:
    """Returns a kernel [rows, columns, E] with the given taps [T, E] of all phases.

    On block-constant maps it gives the same result as the layer's own kernel.
    """
    kernel = np.linalg.lstsq(_phase_sums(window, block), taps.astype(np.float64), rcond=None)[0]
    return kernel.reshape(*window.window, -1).astype(np.float32)
