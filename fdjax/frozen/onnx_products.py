"""Products of a pointwise layer by bands in ONNX: `analyse` the input, `multiply`, `compose` the output.

It mirrors `fdjax.frozen.xla_products` with channels before rows. Coefficients are [B, C, n, R*S], so that the product
of a run of bands is a 1x1 convolution. A transform treats each channel as an image, so that one small basis serves all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fdjax.frozen.onnx_graph import INPUT, Graph
from fdjax.frozen.products import Indices, ProductPlan, Segment, Size, scaled_basis
from fdjax.ops.blocks import num_blocks
from fdjax.ops.dct import zigzag_order

HostArrays = Mapping[str, np.ndarray]


class Low(NamedTuple):
    """Output coefficients of one run, bands first..stop-1, by the product's output segments."""

    first: int
    stop: int
    pieces: Mapping[tuple[int, int], str]


class Part(NamedTuple):
    """The results of one product: the first `whole` channels on pixels, and runs of low bands."""

    pixels: str | None
    whole: int
    low: tuple[Low, ...]


def cover(size: Size, block: int) -> Size:
    """Returns (R, S), the numbers of blocks that cover a map."""
    return num_blocks(size[0], block), num_blocks(size[1], block)


@dataclasses.dataclass(frozen=True)
class Products:
    """Writes products into a graph; `arrays` are the network's arrays."""

    graph: Graph
    arrays: HostArrays

    # Transforms

    def _basis(self, block: int, count: int, scale: int) -> str:
        """Adds the scaled basis [n, 1, K, K] times scale**2, as a product that engines evaluate when they load it."""
        graph, order = self.graph, zigzag_order(block)
        basis = scaled_basis(block, block**2)
        matrix = np.array([basis[order.index((frequency, 0))][:, 0] for frequency in range(block)]) * block * scale
        rows, columns = (graph.indices(frequencies[axis] for frequencies in order) for axis in (0, 1))
        down = graph.once("Gather", graph.constant(matrix[:, None, :, None]), rows, axis=0)
        across = graph.once("Gather", graph.constant(matrix[:, None, None, :]), columns, axis=0)
        every = graph.once("Mul", down, across)
        if count == len(order):
            return every
        return graph.once("Slice", every, *(graph.integers(value) for value in (0, count, 0)))

    def _whole_blocks(self, x: str, block: int, size: Size) -> tuple[str, Size]:
        """Repeats the edge of a map [B, C, H, W] up to whole blocks; returns it and its size."""
        pads = [-length % block for length in size]
        if any(pads):
            x = self.graph.op("Pad", x, self.graph.integers(0, 0, 0, 0, 0, 0, *pads), mode="edge")
        return x, (size[0] + pads[0], size[1] + pads[1])

    def coefs(self, x: str, channels: int, block: int, count: int, size: Size) -> str:
        """Computes coefficients: [B, C, H, W] -> [B, C, n, R*S]."""
        graph, (rows, columns) = self.graph, cover(size, block)
        x, padded = self._whole_blocks(x, block, size)
        if count == 1:
            x = self.block_means(x, block)
        else:
            x = graph.reshape(x, [-1, 1, *padded])
            x = graph.op("Conv", x, self._basis(block, count, 1), strides=[block, block])
        return graph.reshape(x, [-1, channels, count, rows * columns])

    def pixels(self, y: str, channels: int, block: int, count: int, size: Size) -> str:
        """Computes the inverse of `coefs`."""
        graph, (rows, columns) = self.graph, cover(size, block)
        if count == 1:
            y = self.spread(graph.reshape(y, [-1, channels, rows, columns]), block)
        else:
            y = graph.reshape(y, [-1, count, rows, columns])
            y = graph.op("ConvTranspose", y, self._basis(block, count, block), strides=[block, block])
            y = graph.reshape(y, [-1, channels, rows * block, columns * block])
        cut = [axis for axis in (0, 1) if size[axis] % block]
        return graph.slice(y, [0] * len(cut), [size[a] for a in cut], [a + 2 for a in cut]) if cut else y

    def block_means(self, x: str, block: int) -> str:
        """Computes the means of a map's blocks: [B, C, H, W] -> [B, C, R, S]; the map has whole blocks."""
        return self.graph.op("AveragePool", x, kernel_shape=[block, block], strides=[block, block])

    def spread(self, y: str, block: int) -> str:
        """Broadcasts the value of each block to its pixels: [B, C, R, S] -> [B, C, R*K, S*K]."""
        how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        # The empty name stands for no region of interest.
        return self.graph.op("Resize", y, "", self.graph.constant([1, 1, block, block]), **how)

    def _masked(self, y: str, counts: Indices, count: int) -> str:
        if min(counts, default=count) >= count:
            return y
        graph = self.graph
        bands = graph.constant(np.arange(count)[:, None], np.int32)
        keeps = graph.once("Less", bands, graph.constant(np.asarray(counts)[:, None, None], np.int32))
        return graph.op("Where", keeps, y, graph.constant(0.0))

    # Pointwise layers

    def analyse(
        self, x: str, width: int, block: int, size: Size, plans: Sequence[ProductPlan]
    ) -> list[dict[tuple[int, int], str]]:
        """Transforms the common input of several products, a map of `width` channels.

        Returns:
          For each product, the coefficients of its input segments.
        """
        depths: dict[tuple[Indices | None, int, int], int] = {}
        for plan in plans:
            for start, stop, count in plan.input_segments:
                key = (plan.input_order, start, stop)
                depths[key] = max(count, depths.get(key, 0))
        coefs = {}
        for (order, start, stop), depth in depths.items():
            channels = tuple(range(start, stop)) if order is None else order[start:stop]
            coefs[order, start, stop] = self.coefs(
                self.graph.take(x, channels, width), stop - start, block, depth, size
            )

        def of(plan: ProductPlan, start: int, stop: int, count: int) -> str:
            key = (plan.input_order, start, stop)
            y = coefs[key] if count == depths[key] else self.graph.slice(coefs[key], [0], [count], [2])
            return self._masked(y, plan.input_counts[start:stop], count)

        return [{segment[:2]: of(plan, *segment) for segment in plan.input_segments} for plan in plans]

    def multiply(self, x: str, width: int, coefs: Mapping[tuple[int, int], str], name: str, plan: ProductPlan) -> Part:
        """Computes the products of a layer from its input, and the coefficients of its input segments."""
        graph, (inner, outer) = self.graph, plan.whole
        pixels = None
        if inner and outer:
            order = plan.input_order[:inner] if plan.input_order is not None else tuple(range(inner))
            pixels = self.matrix_product(graph.take(x, order, width), self.arrays[f"{name}/whole"])
        cuts = [0, *(stop for _, stop, _, _ in plan.runs)]
        counts = {(start, stop): count for start, stop, count in plan.input_segments}
        bands: dict[tuple[tuple[int, int], int], str] = {}
        for segment, value in coefs.items():
            edges = [cut for cut in cuts if cut < counts[segment]] + [counts[segment]]
            pieces = graph.split(value, np.diff(edges).tolist(), 2)
            bands |= {(segment, first): piece for first, piece in zip(edges, pieces, strict=False)}
        low = tuple(self._run(bands, name, plan, run) for run in plan.runs)
        return Part(pixels, outer if pixels else 0, low)

    def _run(self, bands: Mapping[tuple[tuple[int, int], int], str], name: str, plan: ProductPlan, run) -> Low:
        graph, (inner, outer), (first, stop, inputs, outputs) = self.graph, plan.whole, run

        def of(start: int, end: int) -> str:
            segments = [segment[:2] for segment in plan.input_segments if start <= segment[0] and segment[1] <= end]
            return graph.concat([bands[segment, first] for segment in segments], 1)

        value, offset = None, 0
        if inputs > inner:
            value = self._prefix_product(of(inner, inputs), f"{name}/rest", plan, inputs - inner, outputs)
        if inner and outputs > outer:
            edge = self._prefix_product(of(0, inner), f"{name}/edge", plan, inner, outputs - outer)
            if value is None:
                value, offset = edge, outer
            elif outer:
                before, after = graph.split(value, [outer, outputs - outer], 1)
                value = graph.concat([before, graph.op("Add", after, edge)], 1)
            else:
                value = graph.op("Add", value, edge)
        assert value is not None, "a run without inputs"
        segments = [s[:2] for s in plan.output_segments if offset <= s[0] and s[1] <= outputs]
        pieces = graph.split(value, [b - a for a, b in segments], 1)
        return Low(first, stop, dict(zip(segments, pieces, strict=True)))

    def matrix_product(self, x: str, matrix: np.ndarray, bias: np.ndarray | None = None) -> str:
        """Adds a matrix product on channels.

        Args:
          x: name of a value, [B, C, ...].
          matrix: [C, D].
          bias: [D], or None.

        Returns:
          The name of the result, [B, D, ...].
        """
        return self.graph.conv(x, matrix.T[:, :, None, None], bias)

    def _prefix_product(self, x: str, name: str, plan: ProductPlan, inputs: int, outputs: int) -> str:
        """Adds the product of a run; its matrix is a corner of the first run's, and only that is stored."""
        graph, matrix = self.graph, self.arrays[f"{name}{plan.runs[0][0]}"]
        if matrix.shape == (inputs, outputs):
            return self.matrix_product(x, matrix)
        whole = graph.constant(matrix.T[:, :, None, None])
        bounds = [graph.integers(*values) for values in ((0, 0), (outputs, inputs), (0, 1))]
        return graph.op("Conv", x, graph.once("Slice", whole, *bounds))

    def segment_coefs(self, parts: Sequence[Part], segment: Segment) -> str:
        """Sums the parts' coefficients for output channels start..stop-1: [B, stop - start, n, R*S]."""
        graph, (start, stop, count) = self.graph, segment
        found = []
        for part in parts:
            pieces, reached = [], 0
            for low in part.low:
                around = next((edges for edges in low.pieces if edges[0] <= start and stop <= edges[1]), None)
                if low.first >= count or around is None:
                    continue
                piece = low.pieces[around]
                if around != (start, stop):
                    piece = graph.slice(piece, [start - around[0]], [stop - around[0]], [1])
                reached = min(low.stop, count)
                if reached < low.stop:
                    piece = graph.slice(piece, [0], [reached - low.first], [2])
                pieces.append(piece)
            if pieces:
                value = graph.concat(pieces, 2)
                if reached < count:
                    value = graph.op("Pad", value, graph.integers(0, 0, 0, 0, 0, 0, count - reached, 0))
                found.append(value)
        return graph.add(found)

    def compose(
        self, parts: Sequence[Part], segments: Sequence[Segment], counts: Indices, block: int, size: Size
    ) -> list[str]:
        """Transforms back to pixels; returns [B, stop - start, H, W] for each segment."""
        graph, pieces = self.graph, []
        for start, stop, count in segments:
            values = []
            if count:
                low = self._masked(self.segment_coefs(parts, (start, stop, count)), counts[start:stop], count)
                values.append(self.pixels(low, stop - start, block, count, size))
            for part in parts:
                if part.pixels and start < part.whole:
                    all_of_it = (start, stop) == (0, part.whole)
                    values.append(part.pixels if all_of_it else graph.slice(part.pixels, [start], [stop], [1]))
            pieces.append(graph.add(values) if values else self.zeros((stop - start, *size)))
        return pieces

    def zeros(self, shape: Sequence[int]) -> str:
        """Adds zeros, [B, *shape]."""
        graph = self.graph
        nothing = graph.reshape(self.nothing, [-1, *[1] * len(shape)])
        return graph.op("Expand", nothing, graph.integers(1, *shape))

    @functools.cached_property
    def nothing(self) -> str:
        """The name of a zero for each image, [B, 1]."""
        sizes = self.graph.op("Slice", self.graph.op("Shape", INPUT), *(self.graph.integers(v) for v in (0, 1)))
        shape = self.graph.op("Concat", sizes, self.graph.integers(1), axis=0)
        return self.graph.op("ConstantOfShape", shape)
