"""Evaluating the layers of a frozen network: the one file that another backend would replace.

Each function takes maps, the layer's arrays, and its static plan. The boundary is `stem`, `block` (`unit`,
`residual` or `octave`), `head` and `pointwise`, with `pack` that lays out a product's weights for them; the rest is
this backend's own.

Shape letters: `fdjax.ops.blocks`. Coefficients come first, [n, B, R, S, C], and are scaled so that the first one is the
block's mean.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdjax.frozen.octave import Maps, OctavePlan, octave
from fdjax.frozen.plan import (
    BlockPlan,
    ChainPlan,
    ConvPlan,
    HeadPlan,
    Indices,
    PointwisePlan,
    ProductPlan,
    ResidualPlan,
    Segment,
    Size,
    StemPlan,
    UnitPlan,
    block_shares,
    mean_phases,
    scaled_basis,
)
from fdjax.ops.blocks import merge_blocks, split_blocks
from fdjax.ops.conv import conv_with_pads, max_pool
from fdjax.ops.depthwise import correlate, depthwise_conv, output_size, pad_map
from fdjax.ops.materialize import materialize

Arrays = Mapping[str, jax.Array]

# Above so many slices a gather is cheaper to compile than their concatenation.
_MAX_SLICES = 16
# Transforms with at most so many products are written out, one loop for each coefficient or pixel; others are one
# matrix product, which takes two to three times as long (benchmarks/transforms.py) but compiles sooner.
_MAX_WRITTEN_OUT = 128
# A convolution of few input channels is written out as shifted multiply-adds, and so is a product on pixels: what
# follows then joins the loop, and the wide map is written only once.
_MAX_SHIFTED_CHANNELS = 4
_MAX_SHIFTED_WINDOW = 3
_MAX_PRODUCT_CHANNELS = 16


def _relu6(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0, 6)


def _slices(indices: Indices) -> list[tuple[int, int]]:
    """`indices` as (start, stop) of stretches of neighbours."""
    edges = [0, *(i for i in range(1, len(indices)) if indices[i] != indices[i - 1] + 1), len(indices)]
    return [(indices[a], indices[b - 1] + 1) for a, b in itertools.pairwise(edges) if a < b]


def _take(x: jax.Array, indices: Indices | None, start: int = 0, stop: int | None = None) -> jax.Array:
    """Channels `indices[start:stop]` of [..., C]; without indices, channels start..stop-1."""
    if indices is None:
        return x[..., start:stop]
    indices = indices[start:stop]
    slices = _slices(indices)
    if len(slices) == 1:
        return x[..., slices[0][0] : slices[0][1]]
    if 1 < len(slices) <= _MAX_SLICES:
        return jnp.concatenate([x[..., a:b] for a, b in slices], axis=-1)
    return jnp.take(x, np.asarray(indices, np.int32), axis=-1)


def _combination(terms: Sequence[tuple[float, jax.Array]]) -> jax.Array:
    return functools.reduce(jnp.add, [x * x.dtype.type(w) for w, x in terms if abs(w) > 1e-12])


def block_coefs(x: jax.Array, block: int, count: int) -> jax.Array:
    """The first `count` coefficients of every block: [B, H, W, C] -> [n, B, R, S, C]."""
    blocks = split_blocks(x, block)
    if count * block * block <= _MAX_WRITTEN_OUT:
        basis = scaled_basis(block, count)
        pixels = {(i, j): blocks[..., :, i, :, j, :] for i in range(block) for j in range(block)}
        return jnp.stack([_combination([(row[ij], pixel) for ij, pixel in pixels.items()]) for row in basis])
    if count == 1:
        return blocks.mean(axis=(-4, -2))[None]
    basis = scaled_basis(block, count).astype(x.dtype)
    return jnp.einsum("...rasbc,nab->n...rsc", blocks, basis, precision=lax.Precision.HIGHEST)


def blocks_from_coefs(y: jax.Array, block: int, size: Size) -> jax.Array:
    """The inverse of `block_coefs`, coefficients left away being zero: [n, B, R, S, C] -> [B, H, W, C]."""
    count, (batch, rows, columns, channels) = y.shape[0], y.shape[1:]
    if count == 1:
        blocks = jnp.broadcast_to(y[0][:, :, None, :, None], (batch, rows, block, columns, block, channels))
        return merge_blocks(blocks, size)
    basis = scaled_basis(block, count) * block**2
    if count * block * block <= _MAX_WRITTEN_OUT:
        lines = [
            jnp.stack([_combination([(basis[n, i, j], y[n]) for n in range(count)]) for j in range(block)], axis=-2)
            for i in range(block)
        ]
        return merge_blocks(jnp.stack(lines, axis=-4), size)
    blocks = jnp.einsum("n...rsc,nab->...rasbc", y, basis.astype(y.dtype), precision=lax.Precision.HIGHEST)
    return merge_blocks(blocks, size)


# Pointwise layers


class _Low(NamedTuple):
    """Output coefficients of one run: bands first.., channels offset.. of the layer's outputs."""

    first: int
    offset: int
    coefs: jax.Array


class _Part(NamedTuple):
    """What one product contributes: channels 0.. on pixels, and runs of low bands."""

    whole: jax.Array | None
    low: tuple[_Low, ...]


class _Input(NamedTuple):
    """A product's input: the map, and the low coefficients of its segments."""

    pixels: jax.Array
    coefs: Mapping[tuple[int, int], jax.Array]


def _masked(coefs: jax.Array, counts: Indices) -> jax.Array:
    """Coefficients [n, B, R, S, C] with zeros beyond the channels' kept counts."""
    if min(counts, default=coefs.shape[0]) >= coefs.shape[0]:
        return coefs
    keeps = np.arange(coefs.shape[0])[:, None] < np.asarray(counts)
    return coefs * keeps[:, None, None, None].astype(coefs.dtype)


def pack(name: str, kernel: np.ndarray, plan: ProductPlan) -> dict[str, np.ndarray]:
    """Lays out a layer's kernel [inputs, outputs] as the matrices that `unit` and `head` multiply with.

    Slicing them at run time would copy them on every call.
    """
    (inner, outer), packed = plan.whole, {}
    if inner and outer:
        packed[f"{name}/whole"] = kernel[:inner, :outer]
    for first, _, inputs, outputs in plan.runs:
        if inputs > inner:
            packed[f"{name}/rest{first}"] = kernel[inner:inputs, :outputs]
        if inner and outputs > outer:
            packed[f"{name}/edge{first}"] = kernel[:inner, outer:outputs]
    return {key: np.ascontiguousarray(matrix) for key, matrix in packed.items()}


def _analyse(x: jax.Array, block: int, plans: Sequence[ProductPlan]) -> list[_Input]:
    """Transforms what the products need of their common input; they share what they have in common."""
    if any(plan.transforms for plan in plans):
        # XLA's CPU would compute the map once more in each loop that reads it.
        x = materialize(x)
    depths: dict[tuple[Indices | None, int, int], int] = {}
    for plan in plans:
        for start, stop, count in plan.input_segments:
            key = (plan.input_order, start, stop)
            depths[key] = max(count, depths.get(key, 0))
    coefs = {
        (order, start, stop): block_coefs(_take(x, order, start, stop), block, depth)
        for (order, start, stop), depth in depths.items()
    }

    def of(plan: ProductPlan, start: int, stop: int, count: int) -> jax.Array:
        return _masked(coefs[plan.input_order, start, stop][:count], plan.input_counts[start:stop])

    return [_Input(x, {segment[:2]: of(plan, *segment) for segment in plan.input_segments}) for plan in plans]


def _multiply(given: _Input, arrays: Arrays, name: str, plan: ProductPlan) -> _Part:
    inner, outer = plan.whole
    whole = None
    if inner and outer:
        whole = _take(given.pixels, plan.input_order, 0, inner) @ arrays[f"{name}/whole"]
    low = []
    for first, stop, inputs, outputs in plan.runs:

        def bands(start: int, end: int, first: int = first, stop: int = stop) -> jax.Array:
            segments = [(a, b) for a, b, _ in plan.input_segments if start <= a and b <= end]
            pieces = [given.coefs[segment][first:stop] for segment in segments]
            return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)

        coefs, offset = None, 0
        if inputs > inner:
            coefs = bands(inner, inputs) @ arrays[f"{name}/rest{first}"]
        if inner and outputs > outer:
            edge = bands(0, inner) @ arrays[f"{name}/edge{first}"]
            if coefs is None:
                coefs, offset = edge, outer
            elif outer:
                coefs = jnp.concatenate([coefs[..., :outer], coefs[..., outer:] + edge], axis=-1)
            else:
                coefs = coefs + edge
        assert coefs is not None, "a run without inputs"
        low.append(_Low(first, offset, coefs))
    return _Part(whole, tuple(low))


def _segment_coefs(parts: Sequence[_Part], segment: Segment) -> jax.Array:
    """The sum of the parts' coefficients for output channels start..stop-1: [n, B, R, S, stop - start]."""
    start, stop, count = segment
    total = None
    for part in parts:
        pieces = [
            low.coefs[: count - low.first, ..., start - low.offset : stop - low.offset]
            for low in part.low
            if low.first < count and low.offset <= start < low.offset + low.coefs.shape[-1]
        ]
        if not pieces:
            continue
        coefs = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)
        missing = count - coefs.shape[0]
        coefs = jnp.pad(coefs, [(0, missing)] + [(0, 0)] * (coefs.ndim - 1)) if missing else coefs
        total = coefs if total is None else total + coefs
    assert total is not None, "a segment that no product reaches"
    return total


def _segment_pixels(parts: Sequence[_Part], start: int, stop: int) -> jax.Array | None:
    """The sum of the parts' pixels for output channels start..stop-1; None where there are none."""
    pixels = [part.whole[..., start:stop] for part in parts if part.whole is not None and start < part.whole.shape[-1]]
    return functools.reduce(jnp.add, pixels) if pixels else None


def _compose(
    parts: Sequence[_Part],
    segments: Sequence[Segment],
    counts: Indices,
    block: int,
    like: jax.Array,
    size: Size,
) -> jax.Array:
    """Back to pixels: [B, H, W, D]; `counts` [D] are kept, `like` has the batch and the type."""
    pieces = []
    for segment in segments:
        start, stop, count = segment
        y = None
        if count:
            y = blocks_from_coefs(_masked(_segment_coefs(parts, segment), counts[start:stop]), block, size)
        pixels = _segment_pixels(parts, start, stop)
        if y is None:
            y = pixels if pixels is not None else jnp.zeros((like.shape[0], *size, stop - start), like.dtype)
        elif pixels is not None:
            y = y + pixels
        pieces.append(y)
    if not pieces:
        return jnp.zeros((like.shape[0], *size, 0), like.dtype)
    y = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)
    # A broadcast mean is cheap to compute again.
    return materialize(y) if any(count > 1 for _, _, count in segments) else y


# The boundary


def stem(x: jax.Array, arrays: Arrays, plan: StemPlan) -> jax.Array:
    """The first convolution, its activation and its pool: images [B, H, W, C], less their mean -> [B, H', W', D].

    Arrays: "stem/kernel" [window, window, C, D] and "stem/bias" [D].
    """
    kernel, bias = arrays["stem/kernel"], arrays["stem/bias"]

    def library(x: jax.Array) -> jax.Array:
        strides, dimensions = (plan.stride, plan.stride), ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, strides, plan.pads, dimension_numbers=dimensions)

    def shifted(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), *plan.pads, (0, 0)))
        last = [(length - 1) * plan.stride + 1 for length in plan.out_size]
        terms = []
        for i in range(plan.window):
            for j in range(plan.window):
                stop = (x.shape[0], i + last[0], j + last[1], x.shape[3])
                view = lax.slice(padded, (0, i, j, 0), stop, (1, plan.stride, plan.stride, 1))
                terms += [view[..., c : c + 1] * kernel[i, j, c] for c in range(x.shape[3])]
        return functools.reduce(jnp.add, terms)

    if x.shape[3] > _MAX_SHIFTED_CHANNELS or plan.window > _MAX_SHIFTED_WINDOW:
        y = library(x) + bias
    else:
        y = lax.platform_dependent(x, cpu=shifted, default=library) + bias
    y = _relu6(y) if plan.relu6 else jax.nn.relu(y)
    return y if plan.pool_pads is None else max_pool(y, plan.pool_pads)


def block(x: Maps, arrays: Arrays, plan: BlockPlan) -> Maps:
    """A block of any kind: [B, H, W, C] -> [B, H', W', D], or such maps in two frequencies."""
    if isinstance(plan, OctavePlan):
        return octave(x, arrays, plan)
    assert not isinstance(x, dict)
    return unit(x, arrays, plan) if isinstance(plan, UnitPlan) else residual(x, arrays, plan)


def unit(x: jax.Array, arrays: Arrays, plan: UnitPlan) -> jax.Array:
    """An inverted residual block: [B, H, W, C] -> [B, H', W', D].

    Arrays, under the unit's name: for each chain "CHAIN/expand/..." and "CHAIN/project/..." as `pack` lays them out,
    "CHAIN/expand_bias" [E], "CHAIN/depthwise" [window, window, E] (of a chain of means [T, E], the taps of each phase
    in turn, summed) and "CHAIN/depthwise_bias" [E]; "bias" [D], or [H', W', D] with a border.
    """
    expands = [chain.expand for chain in plan.chains if chain.expand is not None]
    inputs = iter(_analyse(x, plan.blocks[0], expands))
    parts = []
    for chain in plan.chains:
        given = next(inputs) if chain.expand is not None else None
        run = _chain_of_means if chain.means else _chain_on_pixels
        parts.append(run(x, given, arrays, f"{plan.name}/{chain.name}", plan, chain))
    y = _compose(parts, plan.segments, plan.output_counts, plan.blocks[1], x, plan.out_size)
    y = _placed(y, plan.placement) + arrays[f"{plan.name}/bias"]
    y = _relu6(y) if plan.relu6 else y
    return x + y if plan.residual else y


def _placed(y: jax.Array, placement: Indices | None) -> jax.Array:
    """The channels of a map where they belong; -1: zero."""
    if placement is None:
        return y
    made = y.shape[-1]
    if -1 in placement:
        y = jnp.concatenate([y, jnp.zeros((*y.shape[:-1], 1), y.dtype)], axis=-1)
    return _take(y, tuple(made if index < 0 else index for index in placement))


def _chain_on_pixels(
    x: jax.Array, given: _Input | None, arrays: Arrays, name: str, plan: UnitPlan, chain: ChainPlan
) -> _Part:
    depthwise = depthwise_conv
    if chain.expand is None or given is None:
        y, depthwise = _take(x, chain.select), _depthwise_from_memory
    elif not chain.expand.transforms and 0 < chain.expand.inputs <= _MAX_PRODUCT_CHANNELS:
        y = _written_out(_take(x, chain.expand.input_order), arrays[f"{name}/expand/whole"])
        y, depthwise = y + arrays[f"{name}/expand_bias"], _depthwise_from_memory
    else:
        part = _multiply(given, arrays, f"{name}/expand", chain.expand)
        expand = chain.expand
        y = _compose([part], expand.output_segments, expand.output_counts, plan.blocks[0], x, plan.in_size)
        y = y + arrays[f"{name}/expand_bias"]
    y = depthwise(_relu6(y), arrays[f"{name}/depthwise"], plan.stride, plan.padding)
    y = _relu6(y + arrays[f"{name}/depthwise_bias"])
    return _multiply(_analyse(y, plan.blocks[1], [chain.project])[0], arrays, f"{name}/project", chain.project)


def _written_out(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., C] @ kernel [C, D], on the CPU as a sum of C products that what follows is fused with."""

    def on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return functools.reduce(jnp.add, [x[..., c : c + 1] * kernel[c] for c in range(x.shape[-1])])

    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=jnp.matmul)


def _depthwise_from_memory(x: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    """As `depthwise_conv`, of a map that is dear to compute: XLA's CPU would do so again for the tap in the middle."""

    def on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
        padded = materialize(pad_map(x, stride, padding, kernel.shape[0]))
        return correlate(padded, kernel, output_size((x.shape[1], x.shape[2]), stride), stride)

    other = functools.partial(depthwise_conv, stride=stride, padding=padding)
    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=other)


def _chain_of_means(
    x: jax.Array, given: _Input | None, arrays: Arrays, name: str, plan: UnitPlan, chain: ChainPlan
) -> _Part:
    """A bias and an activation keep a block-constant map block-constant; of the depthwise layer the means are asked."""
    assert chain.expand is not None and given is not None
    block = plan.blocks[0]
    y = _multiply(given, arrays, f"{name}/expand", chain.expand).low[0].coefs[0]
    y = _relu6(y + arrays[f"{name}/expand_bias"])
    phases = mean_phases(plan.in_size, plan.stride, plan.padding, block, plan.window)
    pads, last = [], []
    for axis in (0, 1):
        offsets = [tap[:2][axis] for phase in phases for tap in phase.taps]
        reach = plan.stride * (plan.out_size[axis] // block - 1)
        pads.append((max(0, -min(offsets)), max(0, reach + max(offsets) + 1 - plan.in_size[axis] // block)))
        last.append(reach + 1)
    padded = jnp.pad(y, ((0, 0), *pads, (0, 0)))
    taps, bias = iter(arrays[f"{name}/depthwise"]), arrays[f"{name}/depthwise_bias"]
    mean = []
    for phase in phases:
        total = bias
        for row, column, _, _ in phase.taps:
            i, j = pads[0][0] + row, pads[1][0] + column
            stop = (y.shape[0], i + last[0], j + last[1], y.shape[3])
            total = total + lax.slice(padded, (0, i, j, 0), stop, (1, plan.stride, plan.stride, 1)) * next(taps)
        mean.append(_relu6(total) * phase.weight)
    coefs = functools.reduce(jnp.add, mean)[None]
    return _multiply(_Input(coefs[0], {(0, chain.channels): coefs}), arrays, f"{name}/project", chain.project)


def pointwise(x: jax.Array, arrays: Arrays, name: str, plan: ProductPlan, block: int) -> jax.Array:
    """One pointwise layer alone, without a bias: [B, H, W, C] -> [B, H, W, D], its arrays laid out by `pack`."""
    part = _multiply(_analyse(x, block, [plan])[0], arrays, name, plan)
    return _compose([part], plan.output_segments, plan.output_counts, block, x, (x.shape[1], x.shape[2]))


def residual(x: jax.Array, arrays: Arrays, plan: ResidualPlan) -> jax.Array:
    """A residual block of a ResNet: [B, H, W, C] -> [B, H', W', D].

    Arrays, under the block's name: of each layer "convN/..." as `pack` lays them out (pointwise) or "convN/kernel"
    [window, window, C / groups, D], and "convN/bias" [D] or [H', W', D]; "shortcut/kernel" and "shortcut/bias" where
    there is a projection.
    """
    y = x
    for index, layer in enumerate(plan.layers):
        name = f"{plan.name}/conv{index + 1}"
        y = y if index == 0 else jax.nn.relu(y)
        if isinstance(layer, PointwisePlan):
            y = _placed(pointwise(y, arrays, name, layer.product, layer.block), layer.placement)
        else:
            y = _conv(y, arrays[f"{name}/kernel"], layer)
        y = y + arrays[f"{name}/bias"]
    if plan.projection is not None:
        x = _conv(x, arrays[f"{plan.name}/shortcut/kernel"], plan.projection) + arrays[f"{plan.name}/shortcut/bias"]
    elif x.shape != y.shape:
        missing = plan.outputs - plan.inputs
        x = x[:, :: plan.stride, :: plan.stride]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))
    return jax.nn.relu(x + y)


def _conv(x: jax.Array, kernel: jax.Array, plan: ConvPlan) -> jax.Array:
    return conv_with_pads(x, kernel, plan.stride, plan.pads, plan.groups)


def head(x: jax.Array, arrays: Arrays, plan: HeadPlan) -> jax.Array:
    """The last pointwise layer, ReLU6 and the mean over the map: [B, H, W, C] -> [B, D].

    Arrays: "head/..." as `pack` lays them out, and "head/bias" [D].
    """
    product, bias = plan.product, arrays["head/bias"]
    part = _multiply(_analyse(x, plan.block, [product])[0], arrays, "head", product)
    pieces = []
    for segment in product.output_segments:
        start, stop, count = segment
        if count == 1 and start >= product.whole[1]:
            # Constant in every block; blocks count by the part of them that lies on the map.
            y = _relu6(_segment_coefs([part], segment)[0] + bias[start:stop])
            shares = [share.astype(y.dtype) for share in block_shares(plan.size, plan.block)]
            pieces.append(jnp.einsum("brsc,r,s->bc", y, *shares))
        else:
            y = _compose([part], [segment], product.output_counts, plan.block, x, plan.size)
            pieces.append(_relu6(y + bias[start:stop]).mean(axis=(1, 2)))
    if not pieces:
        return jnp.zeros((x.shape[0], 0), x.dtype)
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)
