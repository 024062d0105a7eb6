"""Products of a pointwise layer by bands, planned before any array is touched, and the geometry of blocks and windows.

Everything here is static, hashable and JSON. On either side of a layer the channel that keeps more coefficients comes
first.

Shape letters: `fdjax.ops.blocks`. A coefficient's scale here makes the first one the block's mean.
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

# More products cost more than the zeros that fewer of them multiply: in time, and in the operations of a file.
_MAX_RUNS = 4
_LEAST_SAVED = 300_000  # MACs of one image that one product more has to save.


@dataclasses.dataclass(frozen=True)
class ProductPlan:
    """One pointwise layer.

    With input and output channels sorted by kept count, band n is a product of a prefix of either side. Where the
    channels that keep all N coefficients exist on both sides, their product is done on pixels, and only the low bands
    in which other channels take part are transformed: the bands above are that product's own.

    Attributes:
      inputs: channels read.
      outputs: channels made.
      whole: (inputs, outputs) of the product on pixels; (0, 0) for none.
      runs: (first, stop, inputs, outputs): bands first..stop-1 as one product, as wide as its first band; what `whole`
        covers is left out of it.
      input_segments: (start, stop, coefficients) to transform, of the input channels.
      output_segments: (start, stop, coefficients) to transform back, of the output channels; all of them in turn.
      input_counts: kept counts; coefficients that a segment has beyond a channel's count are to be zero.
      output_counts: likewise.
      input_order: which channels of the map at hand are read, in order; None: all, as they are.
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
        """Whether anything is transformed."""
        return bool(self.runs)

    def macs(self, size: Size, block: int) -> int:
        """Multiply-accumulates of the products and the transforms of the input, on a map of `size`."""
        blocks = num_blocks(size[0], block) * num_blocks(size[1], block)
        products = sum(
            (stop - first) * (inputs * outputs - self.whole[0] * self.whole[1])
            for first, stop, inputs, outputs in self.runs
        )
        transforms = segment_macs(self.input_segments, size, block)
        return size[0] * size[1] * self.whole[0] * self.whole[1] + blocks * products + transforms


def pack(name: str, kernel: np.ndarray, plan: ProductPlan) -> dict[str, np.ndarray]:
    """Lays out a layer's kernel [inputs, outputs] as the matrices that the emitters multiply with.

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


def segment_macs(segments: Sequence[Segment], size: Size, block: int) -> int:
    """MACs of the transforms, in either direction, of channel segments (start, stop, coefficients)."""
    blocks = num_blocks(size[0], block) * num_blocks(size[1], block)
    return blocks * sum((stop - start) * block_transform_macs(block, count) for start, stop, count in segments)


def _runs_of(values: Sequence[Any]) -> list[tuple[int, int]]:
    """(start, stop) of the runs of equal values."""
    edges = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1]), len(values)]
    return list(itertools.pairwise(edges)) if len(values) else []


def plan_product(
    input_counts: np.ndarray,
    output_counts: np.ndarray,
    block: int,
    input_order: Indices | None = None,
    blocks: int | None = None,
) -> ProductPlan:
    """Plans a pointwise layer.

    Args:
      input_counts: kept counts [C], 1..N, descending.
      output_counts: kept counts [D], 1..N, descending.
      block: K.
      input_order: see `ProductPlan`.
      blocks: how many of them the map has; a small map gets fewer products. None: as many as a large one.

    Raises:
      ValueError: counts that are not sorted or out of range.
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
        """Coefficients of the channels that take part in the runs; those of `whole` as far as others need them."""
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
    """`channels`, those that keep more first; `counts` are those of all channels."""
    return channels[np.argsort(-counts[channels], kind="stable")]


def static_order(indices: np.ndarray, width: int) -> Indices | None:
    """Static indices into a map of `width` channels; None where they are all of them, as they lie."""
    return None if np.array_equal(indices, np.arange(width)) else tuple(int(i) for i in indices)


def plan_reading(
    stream: np.ndarray, counts: np.ndarray, output_counts: np.ndarray, block: int, blocks: int | None = None
) -> tuple[ProductPlan, np.ndarray]:
    """A product that reads the map whose channels are `stream`: its plan, and the channels it reads, in order."""
    kept = np.array([counts[channel] for channel in stream], np.int64)
    places = by_count(np.flatnonzero(kept > 0), kept)
    plan = plan_product(kept[places], output_counts, block, static_order(places, len(stream)), blocks)
    return plan, stream[places]


def _merge_bands(widths: Sequence[tuple[int, int]], block: int, runs: int, least: int) -> list[int]:
    """Where to cut the bands of `widths` (inputs, outputs) into at most `runs` runs for the fewest MACs: 0..all.

    A run is as wide as its first band, and a channel that ends within it is transformed as far as the run goes. Every
    cut has to save `least` MACs of a block.
    """
    depth = len(widths)
    steps = [0, *(n for n in range(1, depth) if widths[n] != widths[n - 1]), depth]

    def cost(first: int, stop: int) -> int:
        after = widths[stop] if stop < depth else (0, 0)
        ending = sum(widths[first]) - sum(after)
        return (stop - first) * widths[first][0] * widths[first][1] + ending * block_transform_macs(block, stop) + least

    if len(steps) <= runs + 1 and not least:
        return sorted(set(steps))
    # The cheapest way to cover the bands before each step, for each number of runs.
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
      stride: along both axes.
      pads: zeros before and after each axis, ((top, bottom), (left, right)).
      in_size: (H, W) of the map it reads.
      out_size: (H', W') of the map it makes.
    """

    window: Size
    stride: Size
    pads: Pads
    in_size: Size
    out_size: Size


def taps_on_the_map(window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Which of a window's rows lie on the map, for every row of the output, [H', rows], and likewise of columns."""

    def along(axis: int) -> np.ndarray:
        first = np.arange(window.out_size[axis]) * window.stride[axis] - window.pads[axis][0]
        taps = first[:, None] + np.arange(window.window[axis])
        return ((taps >= 0) & (taps < window.in_size[axis])).astype(np.float64)

    return along(0), along(1)


@dataclasses.dataclass(frozen=True)
class MeanPhase:
    """Output pixels of a depthwise step on a block-constant map that see the same combination of taps.

    Attributes:
      weight: how many of a block's pixels these are, as a share.
      taps: (row offset, column offset, rows, columns): the block they fall into, relative to stride times the output
        block, and the kernel's rows and columns that do.
    """

    weight: float
    taps: tuple[tuple[int, int, Indices, Indices], ...]


def mean_phases(window: Window, block: int) -> tuple[MeanPhase, ...]:
    """The phases of a depthwise step on a map that is constant in every block, K dividing both of its maps."""

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
    """Whether a chain that keeps only means is block-constant throughout: one block size, which divides both maps."""
    return blocks[0] == blocks[1] and all(length % blocks[0] == 0 for length in (*in_size, *out_size))


def scaled_basis(block: int, count: int) -> np.ndarray:
    """The basis [n, K, K], float64, whose inner product with a block is a coefficient; the first row takes the mean."""
    return dct_basis(block, np.float64)[:count] / block


def block_shares(size: Size, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The share of each row and each column of blocks in a map's pixels: what padding adds does not count."""
    shares = []
    for length in size:
        edges = np.minimum(np.arange(num_blocks(length, block) + 1) * block, length)
        shares.append(np.diff(edges) / length)
    return shares[0], shares[1]
