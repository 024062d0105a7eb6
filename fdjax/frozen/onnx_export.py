"""A frozen network as an ONNX graph, from its plan and arrays alone.

It mirrors `fdjax.frozen.kernels` in ONNX's layout, channels before rows. Coefficients are [B, C, n, R*S]: a product of
a run of bands is then a 1x1 convolution, and a transform a grouped convolution with the basis, or its transpose. The
packages onnx and onnxruntime are optional, and imported when they are needed.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fdjax.errors import UserError
from fdjax.frozen.bench import Peer
from fdjax.frozen.fold import Frozen, HostArrays
from fdjax.frozen.octave import OctavePlan
from fdjax.frozen.plan import (
    BlockPlan,
    ChainPlan,
    ConvPlan,
    HeadPlan,
    Indices,
    NetworkPlan,
    Pads,
    ProductPlan,
    ResidualPlan,
    Segment,
    Size,
    UnitPlan,
    block_shares,
    conv_pads,
    mean_phases,
    scaled_basis,
)
from fdjax.ops.blocks import num_blocks
from fdjax.ops.octave import FREQUENCIES, product_name

INPUT, OUTPUT = "images", "logits"
_OPSET, _IR_VERSION = 17, 9
# Between the blocks of an octave network a map may be in two frequencies.
Maps = str | dict[str, str]


def _onnx_pads(pads: Pads) -> list[int]:
    (top, bottom), (left, right) = pads
    return [top, left, bottom, right]


class _Low(NamedTuple):
    """Output coefficients of one run: bands first..stop-1, channels offset..end-1."""

    first: int
    stop: int
    offset: int
    end: int
    value: str


class _Part(NamedTuple):
    """What one product contributes: `whole` channels on pixels, and runs of low bands."""

    pixels: str | None
    whole: int
    low: tuple[_Low, ...]


class _Graph:
    """Nodes and constants; every method returns the name of a value."""

    def __init__(self) -> None:
        from onnx import helper, numpy_helper

        self._helper, self._numpy = helper, numpy_helper
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"constant{len(self.constants)}"
        self.constants.append(self._numpy.from_array(np.ascontiguousarray(value, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(self._helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def add(self, values: Sequence[str]) -> str:
        return functools.reduce(lambda a, b: self.op("Add", a, b), values)

    def concat(self, values: Sequence[str], axis: int) -> str:
        return values[0] if len(values) == 1 else self.op("Concat", *values, axis=axis)

    def slice(self, x: str, start: int, stop: int, axis: int) -> str:
        bounds = [self.constant([value], np.int64) for value in (start, stop, axis)]
        return self.op("Slice", x, *bounds)

    def take(self, x: str, indices: Indices | None, start: int = 0, stop: int | None = None) -> str:
        if indices is None:
            return x if stop is None else self.slice(x, start, stop, 1)
        return self.op("Gather", x, self.constant(indices[start:stop], np.int64), axis=1)

    def bias(self, x: str, bias: np.ndarray) -> str:
        """Adds a bias [C], or [H, W, C]."""
        shaped = bias.transpose(2, 0, 1)[None] if bias.ndim == 3 else bias[None, :, None, None]
        return self.op("Add", x, self.constant(shaped))

    def relu6(self, x: str) -> str:
        return self.op("Clip", x, self.constant(0.0), self.constant(6.0))

    def conv(self, x: str, kernel: np.ndarray, bias: np.ndarray | None = None, **attributes: Any) -> str:
        """Convolution with a kernel [D, C / groups, window, window]."""
        extra = [] if bias is None else [self.constant(bias)]
        return self.op("Conv", x, self.constant(kernel), *extra, **attributes)

    def product(self, x: str, matrix: np.ndarray) -> str:
        """[B, C, ...] by a matrix [C, D]."""
        return self.conv(x, matrix.T[:, :, None, None])

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        return self.op("Reshape", x, self.constant(shape, np.int64))


class _Exporter:
    def __init__(self, plan: NetworkPlan, arrays: HostArrays):
        self.plan, self.arrays, self.graph = plan, arrays, _Graph()

    def network(self) -> None:
        graph, arrays, stem = self.graph, self.arrays, self.plan.stem
        x = graph.op("Sub", INPUT, graph.constant(arrays["stem/mean"]))
        x = graph.op("Transpose", x, perm=[0, 3, 1, 2])
        kernel = arrays["stem/kernel"].transpose(3, 2, 0, 1)
        strides, pads = [stem.stride] * 2, _onnx_pads(stem.pads)
        x = graph.conv(x, kernel, arrays["stem/bias"], strides=strides, pads=pads)
        x: Maps = graph.relu6(x) if stem.relu6 else graph.op("Relu", x)
        if stem.pool_pads is not None:
            x = graph.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=_onnx_pads(stem.pool_pads))
        for unit in self.plan.units:
            x = self._block(x, unit)
        assert isinstance(x, str), "the last map is in two frequencies"
        if self.plan.head is None:
            features = graph.op("Flatten", graph.op("GlobalAveragePool", x))
        else:
            features = self._head(x, self.plan.head)
        weights = [graph.constant(arrays[f"classifier/{name}"]) for name in ("kernel", "bias")]
        graph.op("Gemm", features, *weights, output=OUTPUT)

    # Transforms

    def _coefs(self, x: str, channels: int, block: int, count: int, size: Size) -> str:
        """[B, C, H, W] -> [B, C, n, R*S]."""
        graph, pads = self.graph, [-length % block for length in size]
        if any(pads):
            x = graph.op("Pad", x, graph.constant([0, 0, 0, 0, 0, 0, *pads], np.int64), mode="edge")
        kernel = np.tile(scaled_basis(block, count)[:, None], (channels, 1, 1, 1))
        x = graph.conv(x, kernel, strides=[block, block], group=channels)
        return graph.reshape(x, [-1, channels, count, self._num_blocks(size, block)])

    def _pixels(self, y: str, channels: int, block: int, count: int, size: Size) -> str:
        """The inverse of `_coefs`."""
        graph, grid = self.graph, [num_blocks(length, block) for length in size]
        kernel = np.tile(scaled_basis(block, count)[:, None] * block**2, (channels, 1, 1, 1))
        y = graph.reshape(y, [-1, channels * count, *grid])
        y = graph.op("ConvTranspose", y, graph.constant(kernel), strides=[block, block], group=channels)
        for axis, length in enumerate(size):
            if length % block:
                y = graph.slice(y, 0, length, axis + 2)
        return y

    @staticmethod
    def _num_blocks(size: Size, block: int) -> int:
        return num_blocks(size[0], block) * num_blocks(size[1], block)

    def _masked(self, y: str, counts: Indices, count: int) -> str:
        if min(counts) >= count:
            return y
        keeps = np.arange(count)[None] < np.asarray(counts)[:, None]
        return self.graph.op("Mul", y, self.graph.constant(keeps[None, :, :, None]))

    # Pointwise layers

    def _multiply(self, x: str, name: str, plan: ProductPlan, block: int, size: Size) -> _Part:
        graph, (inner, outer) = self.graph, plan.whole
        coefs = {}
        for start, stop, count in plan.input_segments:
            taken = graph.take(x, plan.input_order, start, stop)
            segment = self._coefs(taken, stop - start, block, count, size)
            coefs[start, stop] = self._masked(segment, plan.input_counts[start:stop], count)
        return self._products(graph.take(x, plan.input_order, 0, inner) if inner and outer else None, coefs, name, plan)

    def _products(self, whole: str | None, coefs: dict[tuple[int, int], str], name: str, plan: ProductPlan) -> _Part:
        graph, (inner, outer) = self.graph, plan.whole
        pixels = None if whole is None else graph.product(whole, self.arrays[f"{name}/whole"])
        low = []
        for first, stop, inputs, outputs in plan.runs:

            def bands(start: int, end: int, first: int = first, stop: int = stop) -> str:
                pieces = [value for (a, b), value in coefs.items() if start <= a and b <= end]
                return graph.concat([graph.slice(piece, first, stop, 2) for piece in pieces], 1)

            value, offset = None, 0
            if inputs > inner:
                value = graph.product(bands(inner, inputs), self.arrays[f"{name}/rest{first}"])
            if inner and outputs > outer:
                edge = graph.product(bands(0, inner), self.arrays[f"{name}/edge{first}"])
                if value is None:
                    value, offset = edge, outer
                elif outer:
                    rest = graph.op("Add", graph.slice(value, outer, outputs, 1), edge)
                    value = graph.concat([graph.slice(value, 0, outer, 1), rest], 1)
                else:
                    value = graph.op("Add", value, edge)
            assert value is not None, "a run without inputs"
            low.append(_Low(first, stop, offset, outputs, value))
        return _Part(pixels, outer if pixels else 0, tuple(low))

    def _segment_coefs(self, parts: Sequence[_Part], segment: Segment) -> str:
        graph, (start, stop, count) = self.graph, segment
        found = []
        for part in parts:
            pieces, reached = [], 0
            for low in part.low:
                if low.first < count and low.offset <= start < low.end:
                    piece = graph.slice(low.value, start - low.offset, stop - low.offset, 1)
                    reached = min(low.stop, count)
                    pieces.append(graph.slice(piece, 0, reached - low.first, 2))
            if pieces:
                value = graph.concat(pieces, 2)
                if reached < count:
                    value = graph.op("Pad", value, graph.constant([0] * 6 + [count - reached, 0], np.int64))
                found.append(value)
        return graph.add(found)

    def _compose(
        self, parts: Sequence[_Part], segments: Sequence[Segment], counts: Indices, block: int, size: Size
    ) -> list[str]:
        """[B, stop - start, H, W] of each segment that is not zero."""
        graph, pieces = self.graph, []
        for segment in segments:
            start, stop, count = segment
            values = []
            if count:
                low = self._masked(self._segment_coefs(parts, segment), counts[start:stop], count)
                values.append(self._pixels(low, stop - start, block, count, size))
            values += [graph.slice(part.pixels, start, stop, 1) for part in parts if part.pixels and start < part.whole]
            if not values:
                raise UserError("a layer without any input is left: such a network cannot be written as ONNX")
            pieces.append(graph.add(values))
        return pieces

    # Layers

    def _block(self, x: Maps, plan: BlockPlan) -> Maps:
        if isinstance(plan, OctavePlan):
            made = self._octave({"high": x} if isinstance(x, str) else x, plan)
            return made if "low" in made else made["high"]
        assert isinstance(x, str)
        return self._unit(x, plan) if isinstance(plan, UnitPlan) else self._residual(x, plan)

    def _octave(self, maps: dict[str, str], plan: OctavePlan) -> dict[str, str]:
        graph, arrays = self.graph, self.arrays
        y = self._octave_pointwise(maps, f"{plan.name}/expand") if plan.has_expand else maps
        wide = {}
        for frequency, channels in zip(FREQUENCIES, plan.wide, strict=True):
            if channels:
                name = f"{plan.name}/depthwise/{frequency}"
                sides = (length if frequency == "high" else length // 2 for length in plan.in_size)
                rows, columns = (conv_pads(length, plan.stride, plan.window, plan.padding) for length in sides)
                made = graph.conv(
                    graph.relu6(y[frequency]),
                    arrays[name].transpose(2, 0, 1)[:, None],
                    arrays[f"{name}_bias"],
                    strides=[plan.stride] * 2,
                    pads=_onnx_pads((rows, columns)),
                    group=channels,
                )
                wide[frequency] = graph.relu6(made)
        y = self._octave_pointwise(wide, f"{plan.name}/project")
        return {name: graph.op("Add", maps[name], z) for name, z in y.items()} if plan.residual else y

    def _octave_pointwise(self, maps: dict[str, str], name: str) -> dict[str, str]:
        graph, made = self.graph, {}
        for target in FREQUENCIES:
            parts = []
            for source in FREQUENCIES:
                kernel = self.arrays.get(f"{name}/{product_name(source, target)}")
                if kernel is None:
                    continue
                y = maps[source]
                if (source, target) == ("high", "low"):
                    y = graph.op("AveragePool", y, kernel_shape=[2, 2], strides=[2, 2])
                y = graph.product(y, kernel)
                if (source, target) == ("low", "high"):
                    # Each pixel at twice the sides; no region of interest.
                    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
                    y = graph.op("Resize", y, "", graph.constant([1, 1, 2, 2]), **how)
                parts.append(y)
            if parts:
                made[target] = graph.bias(graph.add(parts), self.arrays[f"{name}/{target}_bias"])
        return made

    def _unit(self, x: str, plan: UnitPlan) -> str:
        graph = self.graph
        if not plan.chains or not plan.outputs:
            raise UserError(f"{plan.name} is pruned away altogether: such a network cannot be written as ONNX")
        parts = [self._chain(x, plan, chain) for chain in plan.chains]
        pieces = self._compose(parts, plan.segments, plan.output_counts, plan.blocks[1], plan.out_size)
        y = graph.concat(pieces, 1)
        y = self._placed(y, plan.placement, len(plan.output_counts))
        y = graph.bias(y, self.arrays[f"{plan.name}/bias"])
        y = graph.relu6(y) if plan.relu6 else y
        return graph.op("Add", x, y) if plan.residual else y

    def _placed(self, y: str, placement: Indices | None, made: int) -> str:
        if placement is None:
            return y
        if -1 in placement:
            y = self.graph.op("Pad", y, self.graph.constant([0, 0, 0, 0, 0, 1, 0, 0], np.int64))
        return self.graph.take(y, tuple(made if index < 0 else index for index in placement))

    def _residual(self, x: str, plan: ResidualPlan) -> str:
        graph, y = self.graph, x
        for index, layer in enumerate(plan.layers):
            name = f"{plan.name}/conv{index + 1}"
            y = y if index == 0 else graph.op("Relu", y)
            if isinstance(layer, ConvPlan):
                y = self._conv(y, name, layer)
            else:
                product = layer.product
                if not product.outputs or not product.inputs:
                    raise UserError(f"{name} is pruned away altogether: such a network cannot be written as ONNX")
                part = self._multiply(y, name, product, layer.block, layer.size)
                args = (product.output_segments, product.output_counts, layer.block, layer.size)
                y = self._placed(graph.concat(self._compose([part], *args), 1), layer.placement, product.outputs)
            y = graph.bias(y, self.arrays[f"{name}/bias"])
        if plan.projection is not None:
            name = f"{plan.name}/shortcut"
            x = graph.bias(self._conv(x, name, plan.projection), self.arrays[f"{name}/bias"])
        elif plan.stride > 1 or plan.inputs != plan.outputs:
            starts, ends = graph.constant([0, 0], np.int64), graph.constant(plan.in_size, np.int64)
            axes, steps = graph.constant([2, 3], np.int64), graph.constant([plan.stride] * 2, np.int64)
            missing = plan.outputs - plan.inputs
            pads = [0, missing // 2, 0, 0, 0, missing - missing // 2, 0, 0]
            x = graph.op("Pad", graph.op("Slice", x, starts, ends, axes, steps), graph.constant(pads, np.int64))
        return graph.op("Relu", graph.op("Add", x, y))

    def _conv(self, x: str, name: str, plan: ConvPlan) -> str:
        kernel, strides = self.arrays[f"{name}/kernel"].transpose(3, 2, 0, 1), [plan.stride] * 2
        return self.graph.conv(x, kernel, strides=strides, pads=_onnx_pads(plan.pads), group=plan.groups)

    def _chain(self, x: str, plan: UnitPlan, chain: ChainPlan) -> _Part:
        graph, name = self.graph, f"{plan.name}/{chain.name}"
        if chain.means:
            return self._chain_of_means(x, plan, chain, name)
        if chain.expand is None:
            y = graph.take(x, chain.select)
        else:
            expand = chain.expand
            part = self._multiply(x, f"{name}/expand", expand, plan.blocks[0], plan.in_size)
            segments = self._compose([part], expand.output_segments, expand.output_counts, plan.blocks[0], plan.in_size)
            y = graph.bias(graph.concat(segments, 1), self.arrays[f"{name}/expand_bias"])
        rows, columns = (conv_pads(length, plan.stride, plan.window, plan.padding) for length in plan.in_size)
        y = graph.conv(
            graph.relu6(y),
            self.arrays[f"{name}/depthwise"].transpose(2, 0, 1)[:, None],
            self.arrays[f"{name}/depthwise_bias"],
            strides=[plan.stride] * 2,
            pads=_onnx_pads((rows, columns)),
            group=chain.channels,
        )
        return self._multiply(graph.relu6(y), f"{name}/project", chain.project, plan.blocks[1], plan.out_size)

    def _chain_of_means(self, x: str, plan: UnitPlan, chain: ChainPlan, name: str) -> _Part:
        assert chain.expand is not None
        graph, block = self.graph, plan.blocks[0]
        grid_in, grid_out = ([length // block for length in size] for size in (plan.in_size, plan.out_size))
        part = self._multiply(x, f"{name}/expand", chain.expand, block, plan.in_size)
        y = graph.reshape(part.low[0].value, [-1, chain.channels, *grid_in])
        y = graph.relu6(graph.bias(y, self.arrays[f"{name}/expand_bias"]))
        taps, means = iter(self.arrays[f"{name}/depthwise"]), []
        for phase in mean_phases(plan.in_size, plan.stride, plan.padding, block, plan.window):
            first = [min(0, *(tap[:2][axis] for tap in phase.taps)) for axis in (0, 1)]
            window = [max(tap[:2][axis] for tap in phase.taps) - first[axis] + 1 for axis in (0, 1)]
            kernel = np.zeros((chain.channels, 1, *window), np.float32)
            for row, column, _, _ in phase.taps:
                kernel[:, 0, row - first[0], column - first[1]] = next(taps)
            after = [plan.stride * (grid_out[axis] - 1) + first[axis] + window[axis] - grid_in[axis] for axis in (0, 1)]
            y_phase = graph.conv(
                y,
                kernel,
                self.arrays[f"{name}/depthwise_bias"],
                strides=[plan.stride] * 2,
                pads=[-first[0], -first[1], *after],
                group=chain.channels,
            )
            means.append(graph.op("Mul", graph.relu6(y_phase), graph.constant(phase.weight)))
        mean = graph.reshape(graph.add(means), [-1, chain.channels, 1, grid_out[0] * grid_out[1]])
        return self._products(None, {(0, chain.channels): mean}, f"{name}/project", chain.project)

    def _head(self, x: str, plan: HeadPlan) -> str:
        graph, product, bias = self.graph, plan.product, self.arrays["head/bias"]
        part, pieces = self._multiply(x, "head", product, plan.block, plan.size), []
        for segment in product.output_segments:
            start, stop, count = segment
            if count == 1 and start >= product.whole[1]:
                rows, columns = block_shares(plan.size, plan.block)
                shares = graph.constant(np.outer(rows, columns).reshape(1, 1, 1, -1))
                y = graph.relu6(graph.bias(self._segment_coefs([part], segment), bias[start:stop]))
                axes = graph.constant([2, 3], np.int64)
                pieces.append(graph.op("ReduceSum", graph.op("Mul", y, shares), axes, keepdims=0))
            else:
                (y,) = self._compose([part], [segment], product.output_counts, plan.block, plan.size)
                y = graph.relu6(graph.bias(y, bias[start:stop]))
                pieces.append(graph.op("Flatten", graph.op("GlobalAveragePool", y)))
        if not pieces:
            raise UserError("the head is pruned away altogether: such a network cannot be written as ONNX")
        return graph.concat(pieces, 1)


def to_onnx(frozen: Frozen) -> Any:
    """The ONNX model: float32 images [batch, H, W, C] in 0..255 -> logits [batch, num_classes], any batch size.

    Raises:
      UserError: the package onnx is missing, or the network has a layer with nothing left in it.
    """
    if importlib.util.find_spec("onnx") is None:
        raise UserError("writing ONNX needs the package onnx: pip install onnx")
    from onnx import TensorProto, checker, helper

    exporter = _Exporter(frozen.plan, frozen.arrays)
    exporter.network()
    images = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", *frozen.plan.input_shape])
    logits = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", frozen.plan.num_classes])
    graph = exporter.graph
    model = helper.make_model(
        helper.make_graph(graph.nodes, "frozen_network", [images], [logits], graph.constants),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="fdjax",
    )
    checker.check_model(model)
    return model


def write_onnx(frozen: Frozen, file: Path) -> None:
    """Writes `to_onnx` into a file."""
    file.write_bytes(to_onnx(frozen).SerializeToString())


def onnxruntime_session(model: Any, threads: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """Runs an ONNX model on the CPU: images float32 [B, H, W, C] -> logits.

    Args:
      model: of `to_onnx`.
      threads: of a run; None: ONNX Runtime's own choice.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run([OUTPUT], {INPUT: np.asarray(images, np.float32)})[0])


def onnxruntime_peer(threads: int | None = None) -> Peer | None:
    """ONNX Runtime as a peer of `fdjax.frozen.bench.bench`; None where onnx or onnxruntime is not installed."""
    if any(importlib.util.find_spec(package) is None for package in ("onnx", "onnxruntime")):
        return None

    def peer(dense: Frozen, batch: int) -> Callable[[], object]:
        run = onnxruntime_session(to_onnx(dense), threads)
        images = np.random.default_rng(0).integers(0, 256, (batch, *dense.plan.input_shape)).astype(np.float32)
        return lambda: run(images)

    return peer
