"""MACs (multiply-accumulates) of a network with hard masks: by the paper's convention, and in the cheapest form."""

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
    """The MACs of one layer of any kind, with the fields of `fdjax.ops.macs.PointwiseMacs`."""

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
        """Returns the fields as in `summary.json`; `kept_counts` holds how many channels keep 0..N coefficients."""
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
    """The MACs of a network by layer; totals are sums over the counted layers.

    Attributes:
      layers: the counted layers.
      products: MACs of products that belong to no layer, which are in all totals.
    """

    layers: tuple[LayerMacs, ...]
    products: int = 0

    def _sum(self, field: str) -> int:
        return sum(getattr(layer, field) for layer in self.layers) + self.products

    @property
    def ratio(self) -> float:
        """`total` / `dense`."""
        return self._sum("total") / (self._sum("dense") or 1)

    @property
    def paper_ratio(self) -> float:
        """`paper_total` / `dense`."""
        return self._sum("paper_total") / (self._sum("dense") or 1)

    def to_dict(self) -> dict[str, Any]:
        """Returns the `macs` object of `summary.json`."""
        fields = ("dense", "pruned", "full_transforms", "paper_total", "total")
        return {
            **{field: self._sum(field) for field in fields},
            "ratio": self.ratio,
            "paper_ratio": self.paper_ratio,
        }


@dataclasses.dataclass(frozen=True, eq=False)
class GroupRun:
    """A run with tied channels, in which all channels with one kept count form a group with its own chain of layers.

    Attributes:
      mask: the FCMask that the writer's output and the reader's input share.
      writer: the layer that writes the run; its input may be masked by whole channels.
      reader: the layer that reads the run; its output may be masked by whole channels.
      depthwise: the layer between them.
      taps_of_mean: MACs per channel of that layer where its input is constant within every block.
    """

    mask: Mask
    writer: Layer
    reader: Layer
    depthwise: Layer
    taps_of_mean: int

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The three layers, in order of evaluation."""
        return self.writer, self.depthwise, self.reader

    @property
    def names(self) -> frozenset[str]:
        """The names of the three layers."""
        return frozenset(layer.name for layer in self.layers)

    def macs(
        self, counts: np.ndarray, inputs: int | None = None, outputs: int | None = None, narrow_transforms: bool = True
    ) -> dict[str, int]:
        """Counts the run's MACs, evaluated group by group (`fdjax.ops.macs.group_macs`).

        Args:
          counts: kept counts of the mask, [channels], 0 to N.
          inputs: number of channels that the writer reads; None for all.
          outputs: number of channels that the reader writes; None for all.
          narrow_transforms: whether to count the transforms that the groups share.

        Returns:
          Layer name -> MACs.
        """
        macs = ops_macs.group_macs(
            counts,
            self.mask.block,
            self.writer.in_channels if inputs is None else inputs,
            self.reader.out_channels if outputs is None else outputs,
            map_size(self.writer.in_size),
            map_size(self.reader.in_size),
            self.taps_of_mean,
            self.depthwise.window[0],
            narrow_transforms,
        )
        return {layer.name: of_layer for layer, of_layer in zip(self.layers, macs, strict=True)}


@functools.lru_cache(maxsize=16)
def group_runs(network: MaskedGraph) -> Mapping[str, GroupRun]:
    """Finds the runs that can be evaluated group by group.

    Such a run has tied channels and exactly one layer between its writer and its reader: a depthwise layer with a
    square window over all channels. The outer sides of the writer and the reader are masked by whole channels at most.

    Args:
      network: the graph with its masks.

    Returns:
      Name of a space -> its run.
    """
    inner, found = inner_spaces(network), {}
    for name, mask in network.tied_runs().items():
        run = inner.get(name)
        if run is None or not run.depthwise or run.order is not None or not _one_square_layer(network, run):
            continue
        writer, reader = run.writer, run.reader
        narrow = (*network.paths_of(writer.name, "input"), *network.paths_of(reader.name, "output"))
        if any(network.masks[path].block > 1 for path in narrow) or not {writer.name, reader.name} <= {*network.blocks}:
            continue
        # A layer may be in two runs of whole channels, and there groups cost as much as the layers do one by one.
        if mask.members is None or mask.block > 1:
            taps = _taps_of_mean(network, run.depthwise[0], mask.block)
            found[name] = GroupRun(mask, writer, reader, run.depthwise[0], taps)
    return found


def _one_square_layer(network: MaskedGraph, run: InnerSpace) -> bool:
    first, *others = run.depthwise
    params = network.operations.operations[first.operation].params
    if any(step != 1 for name in ("lhs_dilation", "rhs_dilation") for step in params.get(name, ())):
        return False
    square = len(set(first.window)) == len(set(first.stride)) == 1
    return not others and square and run.places(first) is None and len(first.window) == 2


def _taps_of_mean(network: MaskedGraph, depthwise: Layer, block: int) -> int:
    pads = network.operations.operations[depthwise.operation].params["padding"]
    before = (int(pads[0][0]), int(pads[1][0]))
    return ops_macs.block_constant_taps(
        map_size(depthwise.out_size), depthwise.stride[0], block, before, depthwise.window[0]
    )


def map_size(size: tuple[int, ...]) -> tuple[int, int]:
    """Returns (H, W) of a map; tokens are a map with one row, and of three axes and more all but the last are rows."""
    return math.prod(size[:-1]), (1, *size)[-1]


def effective_counts(network: MaskedGraph, counts: Counts) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Computes the kept counts of every wrapped layer, with dead channels set to 0 on both sides.

    `fdjax.graph.liveness` defines which channels are dead.

    Args:
      network: the graph with its masks.
      counts: path of every FCMask -> kept counts [channels], 0 to N.

    Returns:
      Layer name -> (input counts [C], output counts [D]).
    """
    alive = Alive(network, counts)
    return {name: alive.sides(name) for name in network.wrapped_layers}


def layer_totals(network: MaskedGraph, counts: Counts, names: Collection[str] | None = None) -> Totals:
    """Counts each layer in its cheapest exact form.

    Args:
      network: the graph with its masks.
      counts: path of every FCMask -> kept counts [channels], 0 to N.
      names: the layers to count; None for all. A run counts by groups if all of its layers are among them.

    Returns:
      Layer name -> (MACs, name of the form).
    """
    alive, inner, middle = Alive(network, counts), inner_spaces(network), middle_layers(network)
    totals: Totals = {}
    for name, layer in network.layers.items():
        if names is not None and name not in names:
            continue
        if name in network.blocks:
            inputs, outputs = (_histogram(side, network.blocks[name] ** 2) for side in alive.sides(name))
            totals[name] = ops_macs.cheapest_pointwise(
                map_size(layer.in_size), network.blocks[name], np.asarray(inputs), np.asarray(outputs)
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
    """Counts a layer that is not wrapped, over the channels that the masks on its sides keep."""
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
    """Counts a layer between two inner spaces without dead channels, or, if grouped, without unread groups."""
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
      network: the graph with its masks.
      counts: path of every FCMask -> kept counts [channels], 0 to N; see `MaskedGraph.full_counts`.
      released: names of the layers that the gate has released.

    Returns:
      The MACs by layer, and their totals.
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
            macs = ops_macs.pointwise_macs(map_size(layer.in_size), block, inputs, outputs, name in released)
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
    return NetworkMacs(tuple(layers), network.graph.product_macs)
