"""What soft masks are expected to cost: the MAC count read with masks between 0 and 1, for penalties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fdjax.graph.counting import GroupRun, group_runs
from fdjax.graph.liveness import InnerSpace, inner_spaces, middle_layers
from fdjax.graph.masks import MaskedGraph, Side
from fdjax.graph.network import Layer
from fdjax.ops.fcmask import coef_mask, level_counts
from fdjax.ops.macs import block_transform_macs, expected_pointwise_macs


def expected_macs(
    network: MaskedGraph,
    fcmasks: Mapping[str, jax.Array],
    levels: Sequence[int] | None = None,
    convention: str = "total",
) -> jax.Array:
    """Expected MACs of all that masks act on, transforms included; differentiable.

    In the convention "total" a channel that is removed takes its part of the neighbouring layers with it, the depthwise
    layer's too, tied runs are counted group by group, and levels of 0 and N alone need no transform. For hard masks it
    is then what `network_macs` counts, but for

    - what channels share: the narrow transforms of groups;
    - what choosing the form of a layer as a whole gains: where groups or bands would cost more than the dense layer, or
      one side drops a coefficient of all its channels;
    - levels that cost a tied channel more than a mixture of those around them: they count as that mixture.

    In the convention "paper" it is the paper's count of the wrapped layers, none released: N for each kept coefficient
    of either side.

    Args:
      network: the network.
      fcmasks: path -> FCMask [channels], in [0, 1].
      levels: kept counts below N that are accepted; None: the graph's own.
      convention: "total" or "paper".

    Returns:
      A float32 scalar.
    """
    levels = network.levels if levels is None else levels
    masks = {
        path: coef_mask(fcmasks[path].astype(jnp.float32), mask.num_coefs, levels)
        for path, mask in network.masks.items()
    }
    total = jnp.zeros(())
    if convention == "paper":
        for name in network.wrapped_layers:
            total += _layer(network, name, _side(network, masks, name, "input"), _side(network, masks, name, "output"))
        return total
    in_groups = set[str]()
    for run in group_runs(network).values():
        in_groups |= run.names
        total += _group_run(run, masks[run.mask.path], levels)
    lives = _Lives(network, masks)
    for name in _counted(network):
        if name not in in_groups:
            total += lives.macs(name, levels)
    return total


def expected_ratio(
    network: MaskedGraph,
    fcmasks: Mapping[str, jax.Array],
    levels: Sequence[int] | None = None,
    convention: str = "total",
) -> jax.Array:
    """`expected_macs` and the layers that no mask acts on, over the dense network's MACs: a float32 scalar.

    With nothing pruned it is 1, or more where levels between 0 and N need transforms.
    """
    counted = network.wrapped_layers if convention == "paper" else _counted(network)
    layers = network.counted_layers
    dense = sum(layer.dense_macs for layer in layers.values())
    rest = sum(layer.dense_macs for name, layer in layers.items() if name not in counted)
    # As floats: the counts of large networks are no int32.
    return (expected_macs(network, fcmasks, levels, convention) + float(rest)) / float(dense)


def _counted(network: MaskedGraph) -> dict[str, Layer]:
    """The layers that masks act on: wrapped ones, and those that inner spaces pass."""
    inner, middle = inner_spaces(network), middle_layers(network)
    return {
        name: layer
        for name, layer in network.layers.items()
        if name in network.blocks or name in middle or (not layer.mixes and layer.target in inner)
    }


def _side(network: MaskedGraph, masks: Mapping[str, jax.Array], layer: str, side: Side) -> jax.Array:
    """The coefficient mask [N, channels] of a wrapped layer's side; ones where it has none."""
    path = network.mask_of(layer, side)
    if path is not None:
        return masks[path]
    found = network.layers[layer]
    channels = found.in_channels if side == "input" else found.out_channels
    return jnp.ones((network.blocks[layer] ** 2, channels), jnp.float32)


def _layer(
    network: MaskedGraph,
    name: str,
    inputs: jax.Array,
    outputs: jax.Array,
    transforms: bool | Sequence[float] = True,
) -> jax.Array:
    layer = network.layers[name]
    height, width = layer.in_size
    shape = ((height, width), network.blocks[name], layer.in_channels, layer.out_channels)
    return expected_pointwise_macs(*shape, inputs, outputs, transforms)


def _cheapest(
    network: MaskedGraph, name: str, inputs: jax.Array, outputs: jax.Array, levels: Sequence[int] | None
) -> jax.Array:
    """By bands, with the cheapest transforms; by channels where there are no levels between 0 and N."""
    block, (height, width) = network.blocks[name], network.layers[name].in_size
    if len(level_counts(block**2, levels)) == 2:
        # All coefficients of a channel are the same, and a map that is not transformed is not padded to whole blocks.
        return height * width * inputs[0].sum() * outputs[0].sum()
    costs = np.diff([block_transform_macs(block, count) for count in range(block**2 + 1)])
    return _layer(network, name, inputs, outputs, costs.tolist())


class _Lives:
    """How much each channel of the inner spaces lives: as much as both of its ends keep of its mean."""

    def __init__(self, network: MaskedGraph, masks: Mapping[str, jax.Array]):
        self._network, self._masks = network, masks
        self._inner = inner_spaces(network)

    def made(self, run: InnerSpace) -> jax.Array:
        """[channels], what the writer keeps of a channel's mean."""
        if run.writer.name not in self._network.blocks:
            return jnp.ones(run.writer.out_channels)
        return _side(self._network, self._masks, run.writer.name, "output")[0]

    def read(self, run: InnerSpace) -> jax.Array:
        """[channels], what the reader keeps; a group of a layer without masks: its most alive output."""
        reader = run.reader
        if reader.name in self._network.blocks:
            return run.of_reader(_side(self._network, self._masks, reader.name, "input")[0])
        if reader.target not in self._inner:
            return jnp.ones(reader.in_channels)
        return run.of_reader(jnp.repeat(self._groups_read(reader), reader.in_channels // reader.groups))

    def _groups_read(self, middle: Layer) -> jax.Array:
        return self.read(self._inner[middle.target]).reshape(middle.groups, -1).max(axis=1)

    def macs(self, name: str, levels: Sequence[int] | None) -> jax.Array:
        """Of one layer that masks act on."""
        layer = self._network.layers[name]
        source = self._inner.get(layer.source) if layer.source is not None else None
        target = self._inner.get(layer.target)
        if name in self._network.blocks:
            inputs, outputs = (_side(self._network, self._masks, name, side) for side in ("input", "output"))
            if source is not None:
                inputs = inputs * source.to_reader(self.made(source))
            if target is not None:
                outputs = outputs * self.read(target)
            return _cheapest(self._network, name, inputs, outputs, levels)
        assert target is not None
        if not layer.mixes:
            made, read, places = self.made(target), self.read(target), target.places(layer)
            if places is not None:
                made, read = made[places], read[places]
            return layer.dense_macs / layer.in_channels * (made @ read)
        if layer.groups > 1:
            return layer.dense_macs / layer.groups * self._groups_read(layer).sum()
        assert source is not None
        per_product = layer.dense_macs / (layer.in_channels * layer.out_channels)
        return per_product * self.made(source).sum() * self.read(target).sum()


def _group_run(run: GroupRun, mask: jax.Array, levels: Sequence[int] | None) -> jax.Array:
    """A tied run: each channel costs what its kept count costs, alone."""
    accepted = level_counts(mask.shape[0], levels)
    costs = [sum(run.macs(np.array([count]), narrow_transforms=False).values()) for count in accepted]
    # Some levels cost about as much as N does, or more: a channel comes down past them, along the convex hull.
    places = range(len(accepted))
    steps = np.diff(np.interp(places, *_lower_hull(places, costs)))
    # The coefficients between two levels fade together: the first of them stands for all.
    return jnp.asarray(steps, jnp.float32) @ mask[np.array(accepted[:-1])].sum(axis=1)


def _lower_hull(xs: Sequence[int], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """The corners of the lower convex hull of points given from left to right."""
    hull: list[tuple[float, float]] = []
    for x, y in zip(xs, ys, strict=True):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return [x for x, _ in hull], [y for _, y in hull]
