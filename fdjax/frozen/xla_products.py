"""Products of a pointwise layer by bands in XLA: `analyse` the input, `multiply`, `compose` the output.

Shape letters: `fdjax.ops.blocks`. Coefficients are the first axis, [n, B, R, S, C], and are scaled so that the first
one is the block's mean.
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

from fdjax.frozen.products import Indices, ProductPlan, Segment, Size, scaled_basis
from fdjax.ops.blocks import merge_blocks, split_blocks
from fdjax.ops.materialize import materialize

Arrays = Mapping[str, jax.Array]

# With more slices than this, a gather compiles faster than their concatenation.
_MAX_SLICES = 16
# Transforms with at most this many multiplications are written out, with one loop for each coefficient or pixel. Others
# are one matrix product, which takes two to three times as long (benchmarks/transforms.py) but compiles faster.
_MAX_WRITTEN_OUT = 128


def _slices(indices: Indices) -> list[tuple[int, int]]:
    """Returns `indices` as stretches (start, stop) of consecutive numbers."""
    edges = [0, *(i for i in range(1, len(indices)) if indices[i] != indices[i - 1] + 1), len(indices)]
    return [(indices[a], indices[b - 1] + 1) for a, b in itertools.pairwise(edges) if a < b]


def take(x: jax.Array, indices: Indices | None, start: int = 0, stop: int | None = None) -> jax.Array:
    """Selects channels.

    Args:
      x: [..., C].
      indices: the channels; None: all, in order.
      start: first of the indices to take.
      stop: end of the indices to take; None: all.

    Returns:
      Channels `indices[start:stop]`, [..., c].
    """
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
    """Computes the first coefficients of every block.

    Args:
      x: [B, H, W, C].
      block: K.
      count: number of coefficients n.

    Returns:
      [n, B, R, S, C].
    """
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
    """Computes the inverse of `block_coefs`; coefficients that are left out count as zero.

    Args:
      y: [n, B, R, S, C].
      block: K.
      size: (H, W).

    Returns:
      [B, H, W, C].
    """
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


class Low(NamedTuple):
    """Output coefficients of one run, from band `first` and from output channel `offset` on."""

    first: int
    offset: int
    coefs: jax.Array


class Part(NamedTuple):
    """The results of one product: the first channels on pixels, and runs of low bands."""

    whole: jax.Array | None
    low: tuple[Low, ...]


class Input(NamedTuple):
    """The input of a product: the map, and the low coefficients of its segments."""

    pixels: jax.Array
    coefs: Mapping[tuple[int, int], jax.Array]


def _masked(coefs: jax.Array, counts: Indices) -> jax.Array:
    """Sets coefficients [n, B, R, S, C] beyond the channels' kept counts to zero."""
    if min(counts, default=coefs.shape[0]) >= coefs.shape[0]:
        return coefs
    keeps = np.arange(coefs.shape[0])[:, None] < np.asarray(counts)
    return coefs * keeps[:, None, None, None].astype(coefs.dtype)


def analyse(x: jax.Array, block: int, plans: Sequence[ProductPlan]) -> list[Input]:
    """Transforms the common input of several products; transforms that they share are computed once.

    Args:
      x: [B, H, W, C].
      block: K.
      plans: the products.

    Returns:
      The input of each product.
    """
    if any(plan.transforms for plan in plans):
        # XLA on the CPU would compute the map again in each loop that reads it.
        x = materialize(x)
    depths: dict[tuple[Indices | None, int, int], int] = {}
    for plan in plans:
        for start, stop, count in plan.input_segments:
            key = (plan.input_order, start, stop)
            depths[key] = max(count, depths.get(key, 0))
    coefs = {
        (order, start, stop): block_coefs(take(x, order, start, stop), block, depth)
        for (order, start, stop), depth in depths.items()
    }

    def of(plan: ProductPlan, start: int, stop: int, count: int) -> jax.Array:
        return _masked(coefs[plan.input_order, start, stop][:count], plan.input_counts[start:stop])

    return [Input(x, {segment[:2]: of(plan, *segment) for segment in plan.input_segments}) for plan in plans]


def multiply(given: Input, arrays: Arrays, name: str, plan: ProductPlan) -> Part:
    """Computes the products of a layer.

    Args:
      given: the layer's input, as `analyse` returns it.
      arrays: the network's arrays, by name.
      name: prefix of the layer's arrays.
      plan: the products.

    Returns:
      Their results.
    """
    inner, outer = plan.whole
    whole = None
    if inner and outer:
        whole = take(given.pixels, plan.input_order, 0, inner) @ arrays[f"{name}/whole"]
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
        low.append(Low(first, offset, coefs))
    return Part(whole, tuple(low))


def segment_coefs(parts: Sequence[Part], segment: Segment) -> jax.Array:
    """Sums the coefficients of several products for a segment of output channels.

    Args:
      parts: the products' results.
      segment: (start, stop, coefficients).

    Returns:
      [n, B, R, S, stop - start].
    """
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


def _segment_pixels(parts: Sequence[Part], start: int, stop: int) -> jax.Array | None:
    """Sums the parts' pixels for output channels start..stop-1; returns None if there are none."""
    pixels = [part.whole[..., start:stop] for part in parts if part.whole is not None and start < part.whole.shape[-1]]
    return functools.reduce(jnp.add, pixels) if pixels else None


def compose(
    parts: Sequence[Part],
    segments: Sequence[Segment],
    counts: Indices,
    block: int,
    like: jax.Array,
    size: tuple[int, ...],
) -> jax.Array:
    """Transforms the sum of several products' results back to pixels.

    Args:
      parts: the products' results.
      segments: (start, stop, coefficients) of the output channels; they cover all.
      counts: kept counts of the output channels, [D].
      block: K.
      like: an array with the batch size and the type of the result.
      size: (H, W) of the result, or the size of tokens or vectors.

    Returns:
      [B, *size, D].
    """
    pieces = []
    for segment in segments:
        start, stop, count = segment
        y = None
        if count:
            y = blocks_from_coefs(_masked(segment_coefs(parts, segment), counts[start:stop]), block, (size[0], size[1]))
        pixels = _segment_pixels(parts, start, stop)
        if y is None:
            y = pixels if pixels is not None else jnp.zeros((like.shape[0], *size, stop - start), like.dtype)
        elif pixels is not None:
            y = y + pixels
        pieces.append(y)
    if not pieces:
        return jnp.zeros((like.shape[0], *size, 0), like.dtype)
    y = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)
    # Broadcast means are cheap to compute again, other results are stored.
    return materialize(y) if any(count > 1 for _, _, count in segments) else y
