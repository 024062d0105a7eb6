"""MACs of a network with hard masks: the paper's count, and each layer in its cheapest exact form."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from fdjax.graph.liveness import Alive, InnerSpace, inner_spaces, middle_layers
from fdjax.graph.masks import Counts, Mask, MaskedGraph
from fdjax.graph.network import Layer
from fdjax.ops import macs as ops_macs

# Layer name -> (MACs, name of the form).
Totals = dict[str, tuple[int, str]]


@dataclasses.dataclass(frozen=True)
class LayerMacs:
    """MACs of one layer; the fields are those of `fdjax.ops.macs.PointwiseMacs`, for every kind of layer."""

    name: str
    kind: str
    block: int | None
    form: str
    released: bool
    dense: int
    pruned: int
    full_transforms: int
    paper_total: int
    total: int
    input_histogram: tuple[int, ...] | None
    output_histogram: tuple[int, ...] | None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in `summary.json`: `kept_counts` holds the number of channels that keep 0..N coefficients."""
        fields = dataclasses.asdict(self)
        histograms = {side: fields.pop(f"{side}_histogram") for side in ("input", "output")}
        return {
            **fields,
            "num_coefs": self.block**2 if self.block else None,
            "ratio": self.total / self.dense,
            "paper_ratio": self.paper_total / self.dense,
            "kept_counts": {side: list(h) if h is not None else None for side, h in histograms.items()},
        }


@dataclasses.dataclass(frozen=True)
class NetworkMacs:
    """MACs of a network, layer by layer; the totals are sums over the counted layers."""

    layers: tuple[LayerMacs, ...]

    def _sum(self, field: str) -> int:
        return sum(getattr(layer, field) for layer in self.layers)

    @property
    def ratio(self) -> float:
        """`total` / `dense`."""
        return self._sum("total") / (self._sum("dense") or 1)

    @property
    def paper_ratio(self) -> float:
        """`paper_total` / `dense`."""
        return self._sum("paper_total") / (self._sum("dense") or 1)

    def to_dict(self) -> dict[str, Any]:
        """The `macs` object of `summary.json`."""
        fields = ("dense", "pruned", "full_transforms", "paper_total", "total")
        return {
            **{field: self._sum(field) for field in fields},
            "ratio": self.ratio,
            "paper_ratio": self.paper_ratio,
        }


@dataclasses.dataclass(frozen=True, eq=False)
class GroupRun:
    """A run whose channels are tied, so that those that keep as much form a group with its own chain of layers.

    Attributes:
      mask: the FCMask of its channels, as the writer makes and the reader reads them.
      writer: the layer before; whole channels of its input may be masked.
      reader: the layer after; likewise of its output.
      depthwise: the layer between them.
      taps_of_mean: MACs of a channel of that layer whose input is constant in every block.
    """

    mask: Mask
    writer: Layer
    reader: Layer
    depthwise: Layer
    taps_of_mean: int

    @property
    def layers(self) -> tuple[Layer, ...]:
        """In the order of evaluation."""
        return self.writer, self.depthwise, self.reader

    @property
    def names(self) -> frozenset[str]:
        """Of its layers."""
        return frozenset(layer.name for layer in self.layers)

    def macs(
        self, counts: np.ndarray, inputs: int | None = None, outputs: int | None = None, narrow_transforms: bool = True
    ) -> dict[str, int]:
        """MACs by layer, run group by group (`fdjax.ops.macs.group_macs`).

        Args:
          counts: [channels], of the mask.
          inputs: how many channels the writer reads; None: all.
          outputs: how many the reader makes; None: all.
          narrow_transforms: count the transforms that the groups share.
        """
        macs = ops_macs.group_macs(
            counts,
            self.mask.block,
            self.writer.in_channels if inputs is None else inputs,
            self.reader.out_channels if outputs is None else outputs,
            _size(self.writer.in_size),
            _size(self.reader.in_size),
            self.taps_of_mean,
            self.depthwise.window[0],
            narrow_transforms,
        )
        return {layer.name: of_layer for layer, of_layer in zip(self.layers, macs, strict=True)}


@functools.lru_cache(maxsize=16)
def group_runs(network: MaskedGraph) -> Mapping[str, GroupRun]:
    """Name of a space -> its run by groups, for all that can be run so.

    Its channels are tied, of the other sides of its two layers at most whole channels are masked, and between them lies
    one depthwise layer, with a square window, of all channels.
    """
    inner, found = inner_spaces(network), {}
    for name, mask in network.tied_runs().items():
        run = inner.get(name)
        if run is None or not run.depthwise or run.order is not None or not _one_square_layer(run):
            continue
        writer, reader = run.writer, run.reader
        narrow = (*network.paths_of(writer.name, "input"), *network.paths_of(reader.name, "output"))
        if any(network.masks[path].block > 1 for path in narrow) or not {writer.name, reader.name} <= {*network.blocks}:
            continue
        # Of whole channels a layer may be in two runs; there groups come to what each layer costs alone.
        if mask.members is None or mask.block > 1:
            taps = _taps_of_mean(network, run.depthwise[0], mask.block)
            found[name] = GroupRun(mask, writer, reader, run.depthwise[0], taps)
    return found


def _one_square_layer(run: InnerSpace) -> bool:
    first, *others = run.depthwise
    square = len(set(first.window)) == len(set(first.stride)) == 1
    return not others and square and run.places(first) is None and len(first.window) == 2


def _taps_of_mean(network: MaskedGraph, depthwise: Layer, block: int) -> int:
    pads = network.operations.operations[depthwise.operation].params["padding"]
    before = (int(pads[0][0]), int(pads[1][0]))
    return ops_macs.block_constant_taps(
        _size(depthwise.out_size), depthwise.stride[0], block, before, depthwise.window[0]
    )


def _size(size: tuple[int, ...]) -> tuple[int, int]:
    """(H, W) of a map; tokens are a map of one row."""
    height, width = (1, *size)[-2:]
    return height, width


def effective_counts(network: MaskedGraph, counts: Counts) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Layer name -> kept counts (input [C], output [D]) of every wrapped layer, with dead channels dead on both ends.

    See `fdjax.graph.liveness` for which channels are dead.
    """
    alive = Alive(network, counts)
    return {name: alive.sides(name) for name in network.wrapped_layers}


def layer_totals(network: MaskedGraph, counts: Counts, names: Collection[str] | None = None) -> Totals:
    """Layer name -> (MACs, form) in the cheapest exact form.

    Args:
      network: the network.
      counts: path of every FCMask -> kept counts.
      names: the layers to count, None for all; a run counts by groups where all of its layers are among them.
    """
    alive, inner, middle = Alive(network, counts), inner_spaces(network), middle_layers(network)
    totals: Totals = {}
    for name, layer in network.layers.items():
        if names is not None and name not in names:
            continue
        if name in network.blocks:
            inputs, outputs = (_histogram(side, network.blocks[name] ** 2) for side in alive.sides(name))
            totals[name] = ops_macs.cheapest_pointwise(
                _size(layer.in_size), network.blocks[name], np.asarray(inputs), np.asarray(outputs)
            )
            continue
        if name in middle:
            macs = _middle_macs(layer, alive, inner)
        elif not layer.mixes and layer.target in inner:
            macs = _depthwise_macs(layer, alive, inner[layer.target])
        else:
            macs = _masked_macs(network, layer, alive, counts)
        totals[name] = (macs, "dense" if macs == layer.dense_macs else "channels")
    for run in group_runs(network).values():
        if run.names <= totals.keys():
            inputs = network.side_counts(counts, run.writer.name, "input") > 0
            outputs = network.side_counts(counts, run.reader.name, "output") > 0
            grouped = run.macs(counts[run.mask.path], int(inputs.sum()), int(outputs.sum()))
            if sum(grouped.values()) < sum(totals[name][0] for name in grouped):
                totals.update({name: (macs, "groups") for name, macs in grouped.items()})
    return totals


def _masked_macs(network: MaskedGraph, layer: Layer, alive: Alive, counts: Counts) -> int:
    """Of a layer that is not wrapped, with the channels that masks on its sides leave; all, where there are none."""
    if not layer.mixes:
        return layer.dense_macs // layer.in_channels * int((network.side_counts(counts, layer.name, "input") > 0).sum())
    if not (network.paths_of(layer.name, "input") or network.paths_of(layer.name, "output")):
        return layer.dense_macs
    inputs, outputs = (side > 0 for side in alive.sides(layer.name))
    if layer.groups > 1:
        groups = inputs.reshape(layer.groups, -1).any(axis=1) & outputs.reshape(layer.groups, -1).any(axis=1)
        return layer.dense_macs // layer.groups * int(groups.sum())
    return layer.dense_macs // (layer.in_channels * layer.out_channels) * int(inputs.sum()) * int(outputs.sum())


def _middle_macs(layer: Layer, alive: Alive, inner: Mapping[str, InnerSpace]) -> int:
    """Without groups, dead channels of either side are left out; with groups, those of which nothing is read."""
    if layer.groups > 1:
        return layer.dense_macs * int(alive.groups_read(layer).sum()) // layer.groups
    assert layer.source is not None
    channels = (int(alive.channels(space).sum()) for space in (layer.source, layer.target))
    return math.prod(layer.out_size) * math.prod(layer.window) * math.prod(channels)


def _depthwise_macs(layer: Layer, alive: Alive, run: InnerSpace) -> int:
    channels, places = alive.channels(run.name), run.places(layer)
    living = int((channels if places is None else channels[places]).sum())
    return math.prod(layer.out_size) * math.prod(layer.window) * living


def _histogram(counts: np.ndarray, num_coefs: int) -> tuple[int, ...]:
    return tuple(int(n) for n in np.bincount(np.asarray(counts, np.int64), minlength=num_coefs + 1))


def network_macs(network: MaskedGraph, counts: Counts, released: Collection[str] = ()) -> NetworkMacs:
    """Counts a network with hard masks.

    Args:
      network: the network.
      counts: path of every FCMask -> kept counts; see `MaskedGraph.full_counts`.
      released: names of the layers that the gate has released.
    """
    totals = layer_totals(network, counts)
    layers = []
    for name, layer in network.counted_layers.items():
        dense = layer.dense_macs
        pruned = full = paper = dense
        histograms: list[tuple[int, ...] | None] = [None, None]
        block = network.blocks.get(name)
        if block is not None:
            inputs, outputs = sides = [network.side_counts(counts, name, side) for side in ("input", "output")]
            macs = ops_macs.pointwise_macs(_size(layer.in_size), block, inputs, outputs, name in released)
            pruned, full, paper = macs.pruned, macs.full_transforms, macs.paper_total
            masked = (network.mask_of(name, side) is not None for side in ("input", "output"))
            histograms = [
                _histogram(side, block**2) if has_mask else None for side, has_mask in zip(sides, masked, strict=True)
            ]
        total, form = totals[name]
        if block is None and (network.paths_of(name, "input") or network.paths_of(name, "output")):
            pruned = paper = total
        layers.append(
            LayerMacs(
                name=name,
                kind=layer.kind,
                block=block,
                form=form,
                released=name in released,
                dense=dense,
                pruned=pruned,
                full_transforms=full,
                paper_total=paper,
                total=total,
                input_histogram=histograms[0],
                output_histogram=histograms[1],
            )
        )
    return NetworkMacs(tuple(layers))
