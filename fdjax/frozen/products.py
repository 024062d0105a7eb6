"""Plans the products of a pointwise layer by bands, without its arrays, and the geometry of blocks and windows.

Everything here is static, hashable and can be written as JSON. On either side of a layer, channels are sorted by kept
count, the largest first.

Shape letters: `fdjax.ops.blocks`. Coefficients are scaled so that the first one is the block's mean.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from fdjax.ops.blocks import num_blocks
from fdjax.ops.dct import dct_basis
from fdjax.ops.macs import block_transform_macs

Size = tuple[int, int]
Segment = tuple[int, int, int]
BandRun = tuple[int, int, int, int]
Indices = tuple[int, ...]
Pads = tuple[tuple[int, int], tuple[int, int]]

# The most products of a layer. Fewer products multiply more zeros, but more products take longer and make larger files.
_MAX_RUNS = 4
_LEAST_SAVED = 300_000  # MACs of one image that one product more has to save.


@dataclasses.dataclass(frozen=True)
class ProductPlan:
    """The products of one pointwise layer.

    With input and output channels sorted by kept count, band n is the product of a prefix of the input channels and a
    prefix of the output channels. If both sides have channels that keep all N coefficients, their product is computed
    on pixels. Then only the low bands, in which other channels take part, are transformed.

    Attributes:
      inputs: number of channels read.
      outputs: number of channels made.
      whole: (inputs, outputs) of the product on pixels; (0, 0) for none.
      runs: (first, stop, inputs, outputs): bands first..stop-1 as one product, as wide as its first band, without the
        part that `whole` covers.
      input_segments: (start, stop, coefficients): input channels start..stop-1 to transform.
      output_segments: (start, stop, coefficients): output channels start..stop-1 to transform back; they cover all.
      input_counts: kept counts; coefficients of a segment beyond a channel's count have to be zero.
      output_counts: kept counts of the outputs.
      input_order: the channels of the map that are read, in order; None: all, in the map's order.
    """

    inputs: int
    outputs: int
    whole: tuple[int, int]
    runs: tuple[BandRun, ...]
    input_segments: tuple[Segment, ...]
    output_segments: tuple[Segment, ...]
    input_counts: Indices
    output_counts: Indices
    input_order: Indices | None = None

    @property
    def transforms(self) -> bool:
        """Whether the layer needs a transform."""
        return bool(self.runs)

    def macs(self, size: Size, block: int) -> int:
        """Returns the MACs of the products and of the input's transforms, on a map of `size`."""
        blocks = num_blocks(size[0], block) * num_blocks(size[1], block)
        products = sum(
            (stop - first) * (inputs * outputs - self.whole[0] * self.whole[1])
            for first, stop, inputs, outputs in self.runs
        )
        transforms = segment_macs(self.input_segments, size, block)
        return size[0] * size[1] * self.whole[0] * self.whole[1] + blocks * products + transforms


def pack(name: str, kernel: np.ndarray, plan: ProductPlan) -> dict[str, np.ndarray]:
    """Cuts a layer's kernel into the matrices that the emitters multiply with.

    Slicing the kernel at run time would copy it on every call.

    Args:
      name: the layer's name.
      kernel: [inputs, outputs], in the plan's order.
      plan: the layer's products.

    Returns:
      The matrices by name: "NAME/whole", and "NAME/restI" and "NAME/edgeI" for the run that begins with band I.
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


def segment_macs(segments: Sequence[Segment], size: Size, block: int) -> int:
    """Returns the MACs of the transforms, in either direction, of channel segments (start, stop, coefficients)."""
    blocks = num_blocks(size[0], block) * num_blocks(size[1], block)
    return blocks * sum((stop - start) * block_transform_macs(block, count) for start, stop, count in segments)


def _runs_of(values: Sequence[Any]) -> list[tuple[int, int]]:
    """Returns (start, stop) of each stretch of equal values."""
    edges = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1]), len(values)]
    return list(itertools.pairwise(edges)) if len(values) else []


def plan_product(
    input_counts: np.ndarray,
    output_counts: np.ndarray,
    block: int,
    input_order: Indices | None = None,
    blocks: int | None = None,
) -> ProductPlan:
    """Plans the products of a pointwise layer.

    Args:
      input_counts: kept counts, int [C], 1..N, descending.
      output_counts: kept counts, int [D], 1..N, descending.
      block: K.
      input_order: see `ProductPlan`.
      blocks: number of blocks of the map; a small map gets fewer products. None: as many as for a large one.

    Returns:
      The plan.

    Raises:
      ValueError: if the counts are not sorted, or out of range.
    """
    num_coefs = block * block
    for counts in (input_counts, output_counts):
        if len(counts) and (np.diff(counts).max(initial=0) > 0 or counts[-1] < 1 or counts[0] > num_coefs):
            raise ValueError(f"counts must descend from at most {num_coefs} to at least 1, got {counts}")
    bands = np.arange(num_coefs)[:, None]
    inputs, outputs = (np.asarray(counts)[None] > bands for counts in (input_counts, output_counts))
    widths = [(int(i), int(o)) for i, o in zip(inputs.sum(1), outputs.sum(1), strict=True)]
    whole, depth = (0, 0), sum(1 for i, o in widths if i and o)
    if depth == num_coefs:
        whole = widths[-1]
        depth = widths.index(whole)
    least = 0 if blocks is None else _LEAST_SAVED // blocks
    cuts = _merge_bands(widths[:depth], block, _MAX_RUNS, least)
    runs = tuple((first, stop, *widths[first]) for first, stop in itertools.pairwise(cuts))

    def segments(counts: np.ndarray, side: int) -> tuple[Segment, ...]:
        """Returns the coefficients that the runs need of each channel; of `whole`, those that other channels need."""
        whole_needs = max([stop for _, stop, *run in runs if run[1 - side] > whole[1 - side]], default=0)
        needed = []
        for channel, count in enumerate(counts):
            in_runs = min(cut for cut in cuts if cut >= min(count, depth))
            needed.append((channel >= whole[side], whole_needs if channel < whole[side] else in_runs))
        return tuple((start, stop, needed[start][1]) for start, stop in _runs_of(needed))

    return ProductPlan(
        inputs=len(input_counts),
        outputs=len(output_counts),
        whole=whole,
        runs=runs,
        input_segments=tuple(segment for segment in segments(input_counts, 0) if segment[2]),
        output_segments=segments(output_counts, 1),
        input_counts=tuple(map(int, input_counts)),
        output_counts=tuple(map(int, output_counts)),
        input_order=input_order,
    )


def by_count(channels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sorts channels by kept count, the largest first.

    Args:
      channels: int [c].
      counts: the kept counts of all channels, int [C].

    Returns:
      The sorted channels, int [c].
    """
    return channels[np.argsort(-counts[channels], kind="stable")]


def static_order(indices: np.ndarray, width: int) -> Indices | None:
    """Makes static indices into a map of `width` channels.

    Args:
      indices: int [c].
      width: number of channels of the map.

    Returns:
      A tuple; None if it is all channels in order.
    """
    return None if np.array_equal(indices, np.arange(width)) else tuple(int(i) for i in indices)


def plan_reading(
    stream: np.ndarray, counts: np.ndarray, output_counts: np.ndarray, block: int, blocks: int | None = None
) -> tuple[ProductPlan, np.ndarray]:
    """Plans the products of a pointwise layer that reads a given map.

    Args:
      stream: the channels of the map, in order, int [c].
      counts: kept counts of all input channels, int [C].
      output_counts: kept counts of the outputs, int [D], descending.
      block: K.
      blocks: as in `plan_product`.

    Returns:
      The plan, and the channels that it reads, in order.
    """
    kept = np.array([counts[channel] for channel in stream], np.int64)
    places = by_count(np.flatnonzero(kept > 0), kept)
    plan = plan_product(kept[places], output_counts, block, static_order(places, len(stream)), blocks)
    return plan, stream[places]


def _merge_bands(widths: Sequence[tuple[int, int]], block: int, runs: int, least: int) -> list[int]:
    """Cuts the bands into at most `runs` runs with the fewest MACs; returns the cuts, from 0 to the number of bands.

    A run is as wide as its first band, and a channel whose count ends within the run is transformed to the run's end.
    Every cut has to save `least` MACs of a block. `widths` has (inputs, outputs) of each band.
    """
    depth = len(widths)
    steps = [0, *(n for n in range(1, depth) if widths[n] != widths[n - 1]), depth]

    def cost(first: int, stop: int) -> int:
        after = widths[stop] if stop < depth else (0, 0)
        ending = sum(widths[first]) - sum(after)
        return (stop - first) * widths[first][0] * widths[first][1] + ending * block_transform_macs(block, stop) + least

    if len(steps) <= runs + 1 and not least:
        return sorted(set(steps))
    # Dynamic programming: the cheapest cuts of the bands before each step, for each number of runs.
    best: list[tuple[int, list[int]]] = [(cost(0, step) if step else 0, [0, step]) for step in steps]
    for _ in range(runs - 1):
        best = [
            min(
                [best[j], *((best[i][0] + cost(steps[i], steps[j]), [*best[i][1], steps[j]]) for i in range(1, j))],
                key=lambda found: found[0],
            )
            for j in range(len(steps))
        ]
    return sorted(set(best[-1][1]))


@dataclasses.dataclass(frozen=True)
class Window:
    """A window that moves over a map.

    Attributes:
      window: (rows, columns).
      stride: strides along rows and columns.
      pads: zeros before and after each axis, ((top, bottom), (left, right)).
      in_size: (H, W) of the map that it reads.
      out_size: (H', W') of the map that it makes.
      dilation: pixels from tap to tap along rows and columns.
    """

    window: Size
    stride: Size
    pads: Pads
    in_size: Size
    out_size: Size
    dilation: Size = (1, 1)


@dataclasses.dataclass(frozen=True)
class MeanPhase:
    """Output pixels of a depthwise step on a block-constant map for which the taps fall into the same blocks.

    Attributes:
      weight: share of the block's pixels, above 0 to 1.
      taps: (row offset, column offset, rows, columns): a block that is read, relative to stride times the output block,
        and the kernel's rows and columns that fall into it.
    """

    weight: float
    taps: tuple[tuple[int, int, Indices, Indices], ...]


def mean_phases(window: Window, block: int) -> tuple[MeanPhase, ...]:
    """Returns the phases of a depthwise step on a map that is constant in every block; K divides both of its maps."""

    def along(axis: int) -> dict[tuple[tuple[int, Indices], ...], int]:
        found: dict[tuple[tuple[int, Indices], ...], int] = {}
        for position in range(block):
            offsets: dict[int, list[int]] = {}
            for tap in range(window.window[axis]):
                offset = (window.stride[axis] * position - window.pads[axis][0] + tap) // block
                offsets.setdefault(offset, []).append(tap)
            key = tuple((offset, tuple(taps)) for offset, taps in offsets.items())
            found[key] = found.get(key, 0) + 1
        return found

    rows, columns = along(0), along(1)
    return tuple(
        MeanPhase(m * n / block**2, tuple((i, j, r, c) for i, r in row for j, c in column))
        for row, m in rows.items()
        for column, n in columns.items()
    )


def runs_at_block_resolution(in_size: Size, out_size: Size, blocks: tuple[int, int]) -> bool:
    """Whether a chain of means stays block-constant: both layers have one block size, which divides both maps."""
    return blocks[0] == blocks[1] and all(length % blocks[0] == 0 for length in (*in_size, *out_size))


def scaled_basis(block: int, count: int) -> np.ndarray:
    """Returns the DCT basis in the scale of frozen networks, in which the first coefficient is the block's mean.

    Args:
      block: K.
      count: number of coefficients n.

    Returns:
      float64 [n, K, K]; its inner products with a block are the coefficients.
    """
    return dct_basis(block, np.float64)[:count] / block


def block_shares(size: Size, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes the share of each row and each column of blocks in the pixels of a map, without padding.

    Args:
      size: (H, W).
      block: K.

    Returns:
      Shares of the rows, [R], and of the columns, [S]; each sums to 1.
    """
    shares = []
    for length in size:
        edges = np.minimum(np.arange(num_blocks(length, block) + 1) * block, length)
        shares.append(np.diff(edges) / length)
    return shares[0], shares[1]
