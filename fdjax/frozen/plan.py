"""Plans: how each layer of a frozen network is evaluated, decided before any array is touched.

Everything here is static, hashable and JSON; the arrays that belong to a plan are made beside it (`fdjax.frozen.fold`)
and evaluated by `fdjax.frozen.kernels`. Channels are counted in the order of the frozen network: on either side of a
pointwise layer the channel that keeps more coefficients comes first.

Shape letters: `fdjax.ops.blocks`. A coefficient's scale here makes the first one the block's mean.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fdjax.frozen.octave import OctavePlan
from fdjax.ops.blocks import num_blocks
from fdjax.ops.dct import dct_basis
from fdjax.ops.depthwise import conv_pads
from fdjax.ops.macs import block_transform_macs, conv_macs, depthwise_macs

Size = tuple[int, int]
Segment = tuple[int, int, int]
Run = tuple[int, int, int, int]
Indices = tuple[int, ...]
Pads = tuple[tuple[int, int], tuple[int, int]]

FORMS = ("dense", "channels", "groups", "bands")

# More products cost more than the zeros that fewer of them multiply.
_MAX_RUNS = 4


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
    runs: tuple[Run, ...]
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


def segment_macs(segments: Sequence[Segment], size: Size, block: int) -> int:
    """MACs of the transforms, in either direction, of channel segments (start, stop, coefficients)."""
    blocks = num_blocks(size[0], block) * num_blocks(size[1], block)
    return blocks * sum((stop - start) * block_transform_macs(block, count) for start, stop, count in segments)


def _runs_of(values: Sequence[Any]) -> list[tuple[int, int]]:
    """(start, stop) of the runs of equal values."""
    edges = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1]), len(values)]
    return list(itertools.pairwise(edges)) if len(values) else []


def plan_product(
    input_counts: np.ndarray, output_counts: np.ndarray, block: int, input_order: Indices | None = None
) -> ProductPlan:
    """Plans a pointwise layer.

    Args:
      input_counts: kept counts [C], 1..N, descending.
      output_counts: kept counts [D], 1..N, descending.
      block: K.
      input_order: see `ProductPlan`.

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
    cuts = _merge_bands(widths[:depth], block, _MAX_RUNS)
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
    stream: np.ndarray, counts: np.ndarray, output_counts: np.ndarray, block: int
) -> tuple[ProductPlan, np.ndarray]:
    """A product that reads the map whose channels are `stream`: its plan, and the channels it reads, in order."""
    kept = np.array([counts[channel] for channel in stream], np.int64)
    places = by_count(np.flatnonzero(kept > 0), kept)
    plan = plan_product(kept[places], output_counts, block, static_order(places, len(stream)))
    return plan, stream[places]


def _merge_bands(widths: Sequence[tuple[int, int]], block: int, runs: int) -> list[int]:
    """Where to cut the bands of `widths` (inputs, outputs) into at most `runs` runs for the fewest MACs: 0..all.

    A run is as wide as its first band, and a channel that ends within it is transformed as far as the run goes.
    """
    depth = len(widths)
    steps = [0, *(n for n in range(1, depth) if widths[n] != widths[n - 1]), depth]
    if len(steps) <= runs + 1:
        return sorted(set(steps))

    def cost(first: int, stop: int) -> int:
        after = widths[stop] if stop < depth else (0, 0)
        ending = sum(widths[first]) - sum(after)
        return (stop - first) * widths[first][0] * widths[first][1] + ending * block_transform_macs(block, stop)

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
    return best[-1][1]


@dataclasses.dataclass(frozen=True)
class ChainPlan:
    """Wide channels of an inverted residual block that go through it together.

    Attributes:
      name: of its arrays: "whole", "means", "bands" or "coefsN".
      channels: how many wide channels.
      means: they keep only the mean, and all three layers run at block resolution.
      expand: None where the block has no expand layer.
      project: the project layer.
      select: without an expand layer, the channels of the input; None: all, as they are.
    """

    name: str
    channels: int
    means: bool
    expand: ProductPlan | None
    project: ProductPlan
    select: Indices | None = None


@dataclasses.dataclass(frozen=True)
class UnitPlan:
    """An inverted residual block.

    Attributes:
      name: of the unit.
      form: one of `FORMS`.
      inputs: channels of its input map.
      in_size: (H, W) of its input.
      out_size: (H, W) of its output.
      stride: of the depthwise layer.
      padding: "same" or "torch".
      blocks: K of the expand and of the project layer.
      residual: its input is added.
      chains: their results are summed.
      segments: (start, stop, coefficients) of what the project layers make, to transform back.
      output_counts: kept counts of what they make.
      outputs: channels of the block's output map.
      placement: for each of those which output of the project layers it is, -1 for none; None: as they are.
      border: the bias is a map, because removed channels leave something behind that differs at the borders.
      window: of the depthwise layer.
      relu6: a ReLU6 follows the project layer.
    """

    name: str
    form: str
    inputs: int
    in_size: Size
    out_size: Size
    stride: int
    padding: str
    blocks: tuple[int, int]
    residual: bool
    chains: tuple[ChainPlan, ...]
    segments: tuple[Segment, ...]
    output_counts: Indices
    outputs: int
    placement: Indices | None
    border: bool
    window: int = 3
    relu6: bool = False

    @property
    def widest(self) -> int:
        """Channels of its widest map of whole pixels."""
        return max([self.outputs, *(chain.channels for chain in self.chains if not chain.means)])

    def macs(self) -> int:
        """Multiply-accumulates, transforms included; a mean or a broadcast costs 1 an element."""
        total = segment_macs(self.segments, self.out_size, self.blocks[1])
        shared: dict[tuple[int, int], int] = {}
        for chain in self.chains:
            if chain.means:
                total += self._means_macs(chain)
                shared[0, chain.expand.inputs if chain.expand else 0] = 1
                continue
            if chain.expand is not None:
                total += chain.expand.macs(self.in_size, self.blocks[0])
                total += segment_macs(chain.expand.output_segments, self.in_size, self.blocks[0])
                # Groups share the transforms of their input.
                total -= segment_macs(chain.expand.input_segments, self.in_size, self.blocks[0])
                for start, stop, count in chain.expand.input_segments:
                    shared[start, stop] = max(count, shared.get((start, stop), 0))
            total += depthwise_macs(self.out_size, chain.channels, self.window)
            total += chain.project.macs(self.out_size, self.blocks[1])
        return total + segment_macs([(*edge, n) for edge, n in shared.items()], self.in_size, self.blocks[0])

    def _means_macs(self, chain: ChainPlan) -> int:
        assert chain.expand is not None
        block = self.blocks[0]
        blocks_in, blocks_out = ((size[0] // block) * (size[1] // block) for size in (self.in_size, self.out_size))
        taps = sum(
            len(phase.taps) for phase in mean_phases(self.in_size, self.stride, self.padding, block, self.window)
        )
        project = chain.project.inputs * chain.project.outputs
        return blocks_in * chain.expand.inputs * chain.channels + blocks_out * (chain.channels * taps + project)


@dataclasses.dataclass(frozen=True)
class StemPlan:
    """The first convolution, any window.

    Attributes:
      window: its side.
      stride: of the window.
      pads: zeros before and after each axis, ((top, bottom), (left, right)).
      out_size: (H, W) of its output.
      relu6: a ReLU6 follows, else a ReLU.
      pool_pads: of the 3x3 max pool with stride 2 that follows, likewise, or None.
    """

    window: int
    stride: int
    pads: Pads
    out_size: Size
    relu6: bool = True
    pool_pads: Pads | None = None


@dataclasses.dataclass(frozen=True)
class ConvPlan:
    """A convolution in a residual block.

    Attributes:
      inputs: channels read.
      outputs: channels made.
      window: its side.
      stride: of the window.
      groups: divides both.
      pads: zeros before and after each axis.
      out_size: (H, W) of its output.
    """

    inputs: int
    outputs: int
    window: int
    stride: int
    groups: int
    pads: Pads
    out_size: Size

    def macs(self) -> int:
        """Multiply-accumulates."""
        return conv_macs(self.out_size, self.inputs // self.groups, self.outputs, self.window)


@dataclasses.dataclass(frozen=True)
class PointwisePlan:
    """A pointwise layer in a residual block.

    Attributes:
      product: the layer.
      size: (H, W) of its map.
      block: K.
      placement: for each channel of its output map which output of the product it is, -1 for none; None: as they are.
    """

    product: ProductPlan
    size: Size
    block: int
    placement: Indices | None

    @property
    def outputs(self) -> int:
        """Channels of its output map."""
        return self.product.outputs if self.placement is None else len(self.placement)

    def macs(self) -> int:
        """Multiply-accumulates, transforms included."""
        segments = segment_macs(self.product.output_segments, self.size, self.block)
        return self.product.macs(self.size, self.block) + segments


@dataclasses.dataclass(frozen=True)
class ResidualPlan:
    """A residual block of a ResNet: layers with a ReLU between them, the shortcut, and a ReLU.

    Attributes:
      name: of the block.
      form: one of `FORMS`.
      inputs: channels of its input map.
      outputs: of its output map.
      in_size: (H, W) of its input.
      out_size: (H, W) of its output.
      stride: of the block.
      layers: in order; their arrays are named "conv1", "conv2" and so on.
      projection: the convolution of the shortcut, or None: the input, with zeros for new channels, half on either side.
    """

    name: str
    form: str
    inputs: int
    outputs: int
    in_size: Size
    out_size: Size
    stride: int
    layers: tuple[ConvPlan | PointwisePlan, ...]
    projection: ConvPlan | None

    @property
    def widest(self) -> int:
        """Channels of its widest map."""
        return max(self.inputs, self.outputs, *(layer.outputs for layer in self.layers))

    def macs(self) -> int:
        """Multiply-accumulates, transforms included."""
        return sum(layer.macs() for layer in self.layers) + (self.projection.macs() if self.projection else 0)


@dataclasses.dataclass(frozen=True)
class HeadPlan:
    """The last pointwise layer, with the mean over the map after it.

    Attributes:
      form: one of `FORMS`.
      inputs: channels of its input map.
      size: (H, W) of that.
      block: K.
      product: the layer.
    """

    form: str
    inputs: int
    size: Size
    block: int
    product: ProductPlan

    def macs(self) -> int:
        """Multiply-accumulates, transforms included; channels that keep only the mean stay at block resolution."""
        segments = [s for s in self.product.output_segments if not (s[2] == 1 and s[0] >= self.product.whole[1])]
        return self.product.macs(self.size, self.block) + segment_macs(segments, self.size, self.block)


BlockPlan = UnitPlan | ResidualPlan | OctavePlan


@dataclasses.dataclass(frozen=True)
class NetworkPlan:
    """A whole frozen network.

    Attributes:
      input_shape: (H, W, C) of an image.
      num_classes: logits.
      stem: the first convolution.
      units: the blocks.
      head: the last pointwise layer, or None: the classifier reads the mean of the last block's map.
    """

    input_shape: tuple[int, int, int]
    num_classes: int
    stem: StemPlan
    units: tuple[BlockPlan, ...]
    head: HeadPlan | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> NetworkPlan:
        """The plan that `to_dict` wrote, also after a trip through JSON.

        Raises:
          ValueError: fields that are no plan's.
        """

        def product(fields: Mapping[str, Any] | None) -> ProductPlan | None:
            return None if fields is None else ProductPlan(**fields)

        def chain(fields: Mapping[str, Any]) -> ChainPlan:
            return ChainPlan(**{**fields, "expand": product(fields["expand"]), "project": product(fields["project"])})

        def layer(fields: Mapping[str, Any]) -> ConvPlan | PointwisePlan:
            if "product" not in fields:
                return ConvPlan(**fields)
            return PointwisePlan(**{**fields, "product": product(fields["product"])})

        def unit(fields: Mapping[str, Any]) -> BlockPlan:
            if "chains" in fields:
                return UnitPlan(**{**fields, "chains": tuple(map(chain, fields["chains"]))})
            if "wide" in fields:
                return OctavePlan(**fields)
            projection = ConvPlan(**fields["projection"]) if fields["projection"] else None
            return ResidualPlan(**{**fields, "layers": tuple(map(layer, fields["layers"])), "projection": projection})

        try:
            plain = _tuples(fields)
            units, head = tuple(map(unit, plain["units"])), plain["head"]
            head = HeadPlan(**{**head, "product": product(head["product"])}) if head else None
            return cls(**{**plain, "stem": StemPlan(**plain["stem"]), "units": units, "head": head})
        except (KeyError, TypeError) as error:
            raise ValueError(f"no NetworkPlan: {error!r}") from error


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, all the way down."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def taps_on_the_map(
    in_size: Size, out_size: Size, stride: int, window: int, padding: str
) -> tuple[np.ndarray, np.ndarray]:
    """Which of a window's rows lie on the map, for every row of the output, [H', window], and likewise of columns."""

    def along(length: int, out: int) -> np.ndarray:
        first = np.arange(out) * stride - conv_pads(length, stride, window, padding)[0]
        taps = first[:, None] + np.arange(window)
        return ((taps >= 0) & (taps < length)).astype(np.float64)

    rows, columns = (along(*sizes) for sizes in zip(in_size, out_size, strict=True))
    return rows, columns


@dataclasses.dataclass(frozen=True)
class Phase:
    """Output pixels of a depthwise layer on a block-constant map that see the same combination of taps.

    Attributes:
      weight: how many of a block's pixels these are, as a share.
      taps: (row offset, column offset, rows, columns): the block they fall into, relative to stride times the output
        block, and the kernel's rows and columns that do.
    """

    weight: float
    taps: tuple[tuple[int, int, Indices, Indices], ...]


def mean_phases(size: Size, stride: int, padding: str, block: int, window: int = 3) -> tuple[Phase, ...]:
    """The phases of a depthwise layer on a map of `size` that is constant in every block, K dividing both its maps."""

    def along(length: int) -> dict[tuple[tuple[int, Indices], ...], int]:
        before, found = conv_pads(length, stride, window, padding)[0], {}
        for position in range(block):
            offsets: dict[int, list[int]] = {}
            for tap in range(window):
                offsets.setdefault((stride * position - before + tap) // block, []).append(tap)
            key = tuple((offset, tuple(taps)) for offset, taps in offsets.items())
            found[key] = found.get(key, 0) + 1
        return found

    rows, columns = along(size[0]), along(size[1])
    return tuple(
        Phase(m * n / block**2, tuple((i, j, r, c) for i, r in row for j, c in column))
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
