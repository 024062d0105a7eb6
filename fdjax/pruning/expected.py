"""The expected cost of soft masks, for penalties: the MAC count as a differentiable function of masks in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fdjax.graph.counting import GroupRun, group_runs, map_size
from fdjax.graph.liveness import InnerSpace, inner_spaces, middle_layers
from fdjax.graph.masks import SIDES, MaskedGraph, Side
from fdjax.graph.network import Layer
from fdjax.ops.fcmask import coef_mask
from fdjax.ops.macs import block_transform_macs, expected_pointwise_macs
from fdjax.pruning.side_masks import side_mask


def expected_macs(
    network: MaskedGraph,
    fcmasks: Mapping[str, jax.Array],
    levels: Sequence[int] | None = None,
    convention: str = "total",
    without: Collection[str] = (),
) -> jax.Array:
    """Computes the expected MACs, transforms included, of all layers that masks act on; differentiable.

    In the convention "total", a removed channel saves its part of the neighbouring layers too, including the depthwise
    layer; tied runs are counted group by group; and masks with the levels 0 and N alone need no transform. For hard
    masks, the result is then that of `network_macs`, except for

    - costs that channels share, which are the narrow transforms of groups;
    - savings from the choice of a layer's form: where groups or bands would cost more than the dense layer, or where
      one side drops a coefficient of all its channels;
    - levels that cost a tied channel more than a mixture of the levels around them, which count as that mixture.

    In the convention "paper", the result is the paper's count of the wrapped layers, with no layer released: the
    products, and N MACs per kept coefficient of either side.

    Args:
      network: the graph with its masks.
      fcmasks: path -> FCMask [channels], in [0, 1].
      levels: kept counts below N for masks without levels of their own; None for the graph's.
      convention: "total" or "paper".
      without: names of layers to leave out, in the convention "total".

    Returns:
      A float32 scalar.
    """
    masks = {
        path: coef_mask(fcmasks[path].astype(jnp.float32), mask.num_coefs, network.levels_of(path, levels))
        for path, mask in network.masks.items()
    }
    sides, total = _Masks(network, masks, levels), jnp.zeros(())
    if convention == "paper":
        for name in _counted_by_paper(network):
            total += sides.paper_macs(name)
        return total
    in_groups = set[str]()
    for run in group_runs(network).values():
        in_groups |= run.names
        if not run.names <= set(without):
            total += _group_run(run, sides)
    lives = _Lives(sides)
    for name in _counted(network):
        if name not in in_groups and name not in without:
            total += lives.macs(name)
    return total


def expected_ratio(
    network: MaskedGraph,
    fcmasks: Mapping[str, jax.Array],
    levels: Sequence[int] | None = None,
    convention: str = "total",
) -> jax.Array:
    """Computes `expected_macs` plus everything that no mask acts on, divided by the dense network's MACs.

    Args:
      network: the graph with its masks.
      fcmasks: path -> FCMask [channels], in [0, 1].
      levels: as for `expected_macs`.
      convention: as for `expected_macs`.

    Returns:
      A float32 scalar. It is 1 if nothing is pruned, or more if levels between 0 and N need transforms.
    """
    counted = _counted_by_paper(network) if convention == "paper" else _counted(network)
    dense = network.dense_macs
    masked = sum(layer.dense_macs for name, layer in network.counted_layers.items() if name in counted)
    # Floats, because the counts of large networks exceed int32.
    return (expected_macs(network, fcmasks, levels, convention) + float(dense - masked)) / float(dense)


def outside_macs(network: MaskedGraph, without: Collection[str] = ()) -> float:
    """Counts what no mask acts on, except the layers named, whether or not totals include it."""
    left_out = {*_counted(network), *without}
    outside = sum(layer.dense_macs for name, layer in network.layers.items() if name not in left_out)
    return float(outside + network.graph.product_macs)


def _counted(network: MaskedGraph) -> dict[str, Layer]:
    """Returns the layers that masks act on: those with a mask on a side, and those on inner spaces."""
    inner, middle = inner_spaces(network), middle_layers(network)
    return {
        name: layer
        for name, layer in network.layers.items()
        if name in network.blocks
        or name in middle
        or (not layer.mixes and layer.target in inner)
        or _has_masks(network, name)
    }


def _counted_by_paper(network: MaskedGraph) -> dict[str, Layer]:
    """Returns the wrapped layers, and other layers that mix channels and have a mask on a side."""
    layers = network.layers.items()
    return {name: of for name, of in layers if name in network.blocks or (of.mixes and _has_masks(network, name))}


def _has_masks(network: MaskedGraph, layer: str) -> bool:
    return any(network.paths_of(layer, side) for side in SIDES)


class _Masks:
    """The coefficient masks of a network, by the sides of its layers."""

    def __init__(self, network: MaskedGraph, masks: Mapping[str, jax.Array], levels: Sequence[int] | None):
        self.network, self._masks, self._levels = network, masks, levels

    def of(self, path: str) -> jax.Array:
        """Returns the coefficient mask of a path, [N, channels]."""
        return self._masks[path]

    def accepted(self, path: str) -> tuple[int, ...]:
        """Returns the kept counts that a mask is rounded to."""
        return self.network.levels_of(path, self._levels)

    def side(self, layer: str, side: Side) -> jax.Array:
        """Returns the mask of a layer's side, [N, channels] with the layer's N; ones if there is no mask."""
        coefs = side_mask(self.network, self._masks, layer, side)
        if coefs is not None:
            return coefs
        found = self.network.layers[layer]
        channels = found.in_channels if side == "input" else found.out_channels
        return jnp.ones((self.network.num_coefs_of(layer), channels), jnp.float32)

    def paper_macs(self, name: str) -> jax.Array:
        """Counts a layer by the paper's convention."""
        if name not in self.network.blocks:
            return self.plain_macs(self.network.layers[name], *(self.side(name, side)[0] for side in SIDES))
        return self._bands(name, self.side(name, "input"), self.side(name, "output"))

    def plain_macs(self, layer: Layer, inputs: jax.Array, outputs: jax.Array) -> jax.Array:
        """Counts a layer without transforms from how far its inputs [C] and outputs [D] are alive, in [0, 1]."""
        if layer.groups > 1:
            groups = [side.reshape(layer.groups, -1).max(axis=1) for side in (inputs, outputs)]
            return layer.dense_macs / layer.groups * (groups[0] * groups[1]).sum()
        return layer.dense_macs / (layer.in_channels * layer.out_channels) * inputs.sum() * outputs.sum()

    def cheapest(self, name: str, inputs: jax.Array, outputs: jax.Array) -> jax.Array:
        """Counts a layer by bands with the cheapest transforms, or by channels without levels between 0 and N."""
        block, layer = self.network.blocks[name], self.network.layers[name]
        if all(len(self.accepted(path)) == 2 for side in SIDES for path in self.network.paths_of(name, side)):
            # All coefficients of a channel have one mask, and a map that is not transformed needs no padding.
            return math.prod(layer.in_size) * inputs[0].sum() * outputs[0].sum()
        costs = np.diff([block_transform_macs(block, count) for count in range(block**2 + 1)])
        return self._bands(name, inputs, outputs, costs.tolist())

    def _bands(
        self, name: str, inputs: jax.Array, outputs: jax.Array, transforms: bool | Sequence[float] = True
    ) -> jax.Array:
        layer = self.network.layers[name]
        shape = (map_size(layer.in_size), self.network.blocks[name], layer.in_channels, layer.out_channels)
        return expected_pointwise_macs(*shape, inputs, outputs, transforms)


class _Lives:
    """How far each channel of the inner spaces is alive: the product of what both of its ends keep of its mean.

    Where one mask sits on both ends, a channel is alive to the degree of the mask, not of its square.
    """

    def __init__(self, sides: _Masks):
        self._network, self._sides = sides.network, sides
        self._inner = inner_spaces(sides.network)

    def _shared(self, run: InnerSpace) -> bool:
        made, read = (
            self._network.paths_of(run.writer.name, "output"),
            self._network.paths_of(run.reader.name, "input"),
        )
        return bool(made) and made == read

    def made(self, run: InnerSpace) -> jax.Array:
        """Returns what the writer keeps of each channel's mean, [channels] in [0, 1]."""
        return self._sides.side(run.writer.name, "output")[0]

    def read(self, run: InnerSpace) -> jax.Array:
        """Returns what the reader keeps of each channel's mean; in a group, what is read of its most alive output."""
        reader = run.reader
        kept = run.of_reader(self._sides.side(reader.name, "input")[0])
        return kept * self._wanted(run)

    def _wanted(self, run: InnerSpace) -> jax.Array:
        """Returns how far the outputs of the reader are read themselves, [channels]."""
        reader = run.reader
        if reader.name in self._network.blocks or reader.target not in self._inner:
            return jnp.ones(reader.in_channels)
        return run.of_reader(jnp.repeat(self._groups_read(reader), reader.in_channels // reader.groups))

    def _groups_read(self, middle: Layer) -> jax.Array:
        return self.read(self._inner[middle.target]).reshape(middle.groups, -1).max(axis=1)

    def _ends(self, name: str) -> tuple[jax.Array, jax.Array]:
        """Returns the masks [N, C] and [N, D] of a layer, multiplied by what the other ends of its spaces keep."""
        layer = self._network.layers[name]
        inputs, outputs = (self._sides.side(name, side) for side in SIDES)
        source = self._inner.get(layer.source) if layer.source is not None else None
        target = self._inner.get(layer.target)
        if source is not None and not self._shared(source):
            inputs = inputs * source.to_reader(self.made(source))
        if target is not None:
            outputs = outputs * (self._wanted(target) if self._shared(target) else self.read(target))
        return inputs, outputs

    def macs(self, name: str) -> jax.Array:
        """Counts one layer that masks act on."""
        layer = self._network.layers[name]
        target = self._inner.get(layer.target)
        if name in self._network.blocks:
            return self._sides.cheapest(name, *self._ends(name))
        if not layer.mixes:
            per_channel = layer.dense_macs / layer.in_channels
            if target is None:
                return per_channel * self._sides.side(name, "input")[0].sum()
            lives = self.made(target) * (self._wanted(target) if self._shared(target) else self.read(target))
            places = target.places(layer)
            return per_channel * (lives if places is None else lives[places]).sum()
        if target is not None and layer.source in self._inner:
            return self._middle(layer)
        inputs, outputs = self._ends(name)
        return self._sides.plain_macs(layer, inputs[0], outputs[0])

    def _middle(self, layer: Layer) -> jax.Array:
        """Counts a layer that is not wrapped and lies between two inner spaces."""
        if layer.groups > 1:
            return layer.dense_macs / layer.groups * self._groups_read(layer).sum()
        inputs, outputs = self._ends(layer.name)
        return self._sides.plain_macs(layer, inputs[0], outputs[0])


def _group_run(run: GroupRun, sides: _Masks) -> jax.Array:
    """Counts a tied run channel by channel, each as if it were alone."""
    accepted, mask = sides.accepted(run.mask.path), sides.of(run.mask.path)

    def costs(inputs: int | None, outputs: int | None) -> np.ndarray:
        macs = (run.macs(np.array([count]), inputs, outputs, narrow_transforms=False) for count in accepted)
        return np.array([sum(of_layers.values()) for of_layers in macs])

    # Some levels cost about as much as N, or more. The convex hull lets a channel pass them on its way down.
    places = range(len(accepted))
    corners = _lower_hull(places, costs(None, None).tolist())

    def steps(of: np.ndarray) -> jax.Array:
        return jnp.asarray(np.diff(np.interp(places, corners, of[corners])), jnp.float32)

    # The coefficients between two levels fade together, so the first of them represents all.
    fading = mask[np.array(accepted[:-1])].sum(axis=1)
    network, writer, reader = sides.network, run.writer.name, run.reader.name
    if not (network.paths_of(writer, "input") or network.paths_of(reader, "output")):
        return steps(costs(None, None)) @ fading
    # Every channel that the writer reads costs the same, and so does every channel that the reader writes.
    alone, reading, making = costs(0, 0), costs(1, 0), costs(0, 1)
    read, made = sides.side(writer, "input")[0].sum(), sides.side(reader, "output")[0].sum()
    return (steps(alone) + read * steps(reading - alone) + made * steps(making - alone)) @ fading


def _lower_hull(xs: Sequence[int], ys: Sequence[float]) -> list[int]:
    """Returns the corners of the lower convex hull of points that are given from left to right."""
    hull: list[tuple[int, float]] = []
    for x, y in zip(xs, ys, strict=True):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return [x for x, _ in hull]
