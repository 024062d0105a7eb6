"""Choosing the block of each layer: the K that keeps the most energy for what its kept counts cost.

What is pruned is priced by one Lagrange multiplier for the whole network. A unit (a layer, or the two layers of a run
whose channels are tied, which need one K) takes, for every K, the kept counts that minimise

    -log(kept share of its energy) + multiplier * its MACs / the dense network's MACs

and then the K whose minimum is lowest. The multiplier is the one that brings the network to a target. Layers come one
after the other, so what they pass on multiplies; by the sum of lost shares alone it would pay to empty the layer with
the most MACs altogether.

Layers without tied masks are counted one by one: what a channel that dies in one of them spares its neighbours shows
only in the network's count.

The kept counts that are tried minimise lost energy plus a price times MACs, for a row of prices: channel by channel,
each along the lower convex hull of what its counts lose and cost.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdjax.graph.counting import GroupRun, NetworkMacs, group_runs, network_macs
from fdjax.graph.liveness import inner_spaces
from fdjax.graph.masks import MaskedGraph
from fdjax.graph.network import Layer
from fdjax.ops.blocks import check_block, num_blocks
from fdjax.ops.dct import layer_dct
from fdjax.ops.fcmask import level_counts
from fdjax.ops.macs import block_transform_macs, cheapest_pointwise
from fdjax.pruning.harden import sharing_layers

# (layer name, "input" or "output") -> K -> energy of each coefficient [N, channels].
Energies = Mapping[tuple[str, str], Mapping[int, np.ndarray]]
Levels = Sequence[int] | None

# A larger block prunes whole channels just as a smaller one does; to be chosen it must gain this much of its unit's
# kept energy, relatively.
_LEAST_GAIN = 1e-3
# Prices that are tried: shares of a unit's energy for all its dense MACs.
_PRICES = np.append(0, 2.0 ** np.arange(-10, 10.01, 1 / 8))
# A unit that loses this share of its energy keeps nothing, but for rounding.
_ALL = 1 - 1e-9
# The multiplier: the highest that is tried, and how near it is found, relatively.
_HIGHEST, _PRECISION = 1e6, 1e-4
# Rounds in which the two sides of a layer adapt to each other.
_MAX_ROUNDS = 20


class Option(NamedTuple):
    """What a unit keeps at one K.

    Attributes:
      block: K.
      counts: path of each FCMask of the unit -> kept counts [channels].
      lost: the share of the unit's energy that is not kept, 0 to 1: what all its FCMasks in a row take away.
      macs: of the unit, exact; a depthwise layer counts with the layer that reads it.
    """

    block: int
    counts: dict[str, np.ndarray]
    lost: float
    macs: int


@dataclasses.dataclass(frozen=True)
class BlockChoice:
    """A block for every unit.

    Attributes:
      multiplier: of MACs over dense MACs, against the logarithm of kept shares.
      options: unit -> what it keeps at every K that fits, K ascending.
      chosen: unit -> one of them.
      network: with the chosen blocks.
      macs: of that network with the kept counts of `chosen`.
    """

    multiplier: float
    options: dict[str, tuple[Option, ...]]
    chosen: dict[str, Option]
    network: MaskedGraph
    macs: NetworkMacs


def coefficient_energy(x: jax.Array, block: int) -> jax.Array:
    """Mean square of each DCT coefficient over images and blocks, over N: x [B, H, W, C] -> [N, C].

    Where K divides the map, it sums over the coefficients to the mean square of the map (Parseval).
    """
    return jnp.mean(jnp.square(layer_dct(x, block)), axis=(1, 2, 3)) / block**2


def block_units(network: MaskedGraph) -> dict[str, tuple[Layer, ...]]:
    """What takes one K: layers that share masks, under the name of the module that holds them, or a masked layer."""
    found: dict[str, tuple[Layer, ...]] = {}
    for names in sharing_layers(network):
        paths = [network.mask_of(name, side) for name in names for side in ("input", "output")]
        shared = next((path for path in paths if path is not None and paths.count(path) > 1), None)
        if any(path is not None for path in paths):
            unit = names[0] if shared is None else shared.rpartition("/")[0]
            found[unit] = tuple(network.layers[name] for name in names)
    return found


def with_blocks(network: MaskedGraph, blocks: Mapping[str, int]) -> MaskedGraph:
    """The network with other blocks: unit -> K where it differs, units as `block_units` names them."""
    by_layer = {
        layer.name: blocks[name] for name, layers in block_units(network).items() if name in blocks for layer in layers
    }
    masks = {
        path: dataclasses.replace(mask, block=by_layer.get(mask.sides[0][0], mask.block))
        for path, mask in network.masks.items()
    }
    return dataclasses.replace(network, blocks={**network.blocks, **by_layer}, masks=masks)


def fitting_blocks(layers: Sequence[Layer], candidates: Sequence[int]) -> tuple[int, ...]:
    """The candidates no larger than any map of `layers`, ascending; a map that K does not divide is padded."""
    shortest = min(side for layer in layers for side in layer.in_size)
    return tuple(sorted(block for block in {*candidates} if block <= shortest))


def check_choice(network: MaskedGraph, candidates: Sequence[int], target: float) -> None:
    """Raises `ValueError` if no candidate fits a unit, or no masks bring the MAC ratio down to `target`."""
    for block in candidates:
        check_block(block)
    for name, layers in block_units(network).items():
        if not fitting_blocks(layers, candidates):
            height, width = min(layer.in_size for layer in layers)
            given = ", ".join(map(str, candidates)) or "none"
            raise ValueError(
                f"no candidate block fits the {height}x{width} map of {name} (given: {given}); add a smaller one, "
                "such as 1"
            )
    nothing = {path: np.zeros(mask.channels, int) for path, mask in network.masks.items()}
    floor = network_macs(network, nothing).ratio
    if target <= floor:
        raise ValueError(
            f"a target of {target:g} cannot be met: with every masked channel removed {floor:.3f}x of the MACs remain; "
            "ask for more, or mask more sides"
        )


def choose_blocks(
    network: MaskedGraph, energies: Energies, candidates: Sequence[int], target: float, levels: Levels = None
) -> BlockChoice:
    """Chooses a K for every unit.

    Args:
      network: with the masks that will be learned, with one block everywhere, so that what can be tied is.
      energies: of every masked side, for all candidates that fit.
      candidates: the K to choose from.
      target: MAC ratio, above 0 to 1, that the chosen counts reach and do not exceed.
      levels: the accepted kept counts below N, or None for all.

    Raises:
      ValueError: no candidate fits a unit, or the target cannot be met.
    """
    check_choice(network, candidates, target)
    dense = network_macs(network, network.full_counts()).to_dict()["dense"]
    tried = {
        name: [frontier(network, name, block, energies, levels) for block in fitting_blocks(layers, candidates)]
        for name, layers in block_units(network).items()
    }

    def at(multiplier: float) -> BlockChoice:
        def objective(option: Option) -> float:
            return multiplier * option.macs / dense - math.log1p(-option.lost)

        options = {name: tuple(min(found, key=objective) for found in by_block) for name, by_block in tried.items()}
        chosen = {}
        for name, by_block in options.items():
            best = by_block[0]
            for option in by_block[1:]:
                if objective(option) < objective(best) - _LEAST_GAIN:
                    best = option
            chosen[name] = best
        there = with_blocks(network, {name: option.block for name, option in chosen.items()})
        counts = {path: kept for option in chosen.values() for path, kept in option.counts.items()}
        return BlockChoice(multiplier, options, chosen, there, network_macs(there, counts))

    low, high = 0.0, at(_HIGHEST)
    if high.macs.ratio > target:
        raise ValueError(
            f"a target of {target:g} cannot be met while every layer keeps something: {high.macs.ratio:.3f}x of the "
            "MACs remain; ask for more"
        )
    while high.multiplier - low > _PRECISION * (1 + high.multiplier):
        middle = at((low + high.multiplier) / 2)
        if middle.macs.ratio > target:
            low = middle.multiplier
        else:
            high = middle
    return high


def frontier(network: MaskedGraph, name: str, block: int, energies: Energies, levels: Levels = None) -> list[Option]:
    """What the unit `name` may keep at K = `block`, MACs ascending and lost shares falling; arguments as above."""
    network = with_blocks(network, {name: block})
    first, *others = layers = block_units(network)[name]
    lost = {
        (layer.name, side): _lost_share(energies[layer.name, side][block])
        for layer in layers
        for side in ("input", "output")
        if network.mask_of(layer.name, side) is not None
    }
    if others:
        run = _run_of(network, name, layers)
        candidates = _tied_candidates(run, np.mean([*lost.values()], axis=0), levels)
    else:
        sides = [lost.get((first.name, side)) for side in ("input", "output")]
        candidates = _layer_candidates(network, first, sides, levels)
    dense = sum(layer.dense_macs for layer in layers)
    tried = [option for price in _PRICES for option in candidates(price / dense) if option.lost < _ALL]
    kept: list[Option] = []
    for option in sorted(tried, key=lambda option: (option.macs, option.lost)):
        if not kept or option.lost < kept[-1].lost:
            kept.append(option)
    return kept


def _lost_share(energy: np.ndarray) -> np.ndarray:
    """Energy [N, channels] -> share of the whole that a channel loses with a kept count of 0..N: [N+1, channels]."""
    energy = np.asarray(energy, np.float64)
    lost = np.pad(energy[::-1].cumsum(axis=0)[::-1], ((0, 1), (0, 0)))
    total = energy.sum()
    return lost / total if total else lost


def _run_of(network: MaskedGraph, name: str, layers: Sequence[Layer]) -> GroupRun:
    """The run by groups that the layers of a unit are.

    Raises:
      ValueError: they are none.
    """
    names = {layer.name for layer in layers}
    for run in group_runs(network).values():
        if {run.writer.name, run.reader.name} == names:
            return run
    raise ValueError(f"blocks are not chosen for the layers of {name}: they share masks otherwise than as one tied run")


def channel_macs(run: GroupRun, counts: Sequence[int] | np.ndarray, *, narrow_transforms: bool) -> np.ndarray:
    """MACs of a tied run that has one channel, for each of the kept `counts`: int [len(counts)].

    `narrow_transforms`: whether the transforms of its narrow sides, which all of its channels share, count.
    """
    each = (run.macs(np.array([n]), narrow_transforms=narrow_transforms) for n in counts)
    return np.array([sum(by_layer.values()) for by_layer in each])


def _tied_candidates(run: GroupRun, lost: np.ndarray, levels: Levels) -> Callable[[float], list[Option]]:
    """Returns (price of a MAC) -> options of a tied run, the best of all at this price among them.

    A channel costs what it costs alone, and the groups share the transforms of the narrow sides. These are as long as
    the highest partial count asks for: there is one option for each count that may be the highest.

    `lost`: [N+1, E], the mean of the two sides.
    """
    path, block = run.mask.path, run.mask.block
    accepted = np.array(level_counts(block**2, levels))
    whole, channels = len(accepted) - 1, np.arange(lost.shape[1])

    costs = channel_macs(run, accepted, narrow_transforms=False)
    shared, lost = channel_macs(run, accepted, narrow_transforms=True) - costs, lost[accepted]

    def candidates(price: float) -> list[Option]:
        objective, options = lost + price * costs[:, None], []
        for highest in range(whole):
            tried = np.array([*range(highest + 1), whole])
            places = tried[objective[tried].argmin(axis=0)]
            macs = costs[places].sum() + shared[places[places < whole].max(initial=0)]
            options.append(Option(block, {path: accepted[places]}, float(lost[places, channels].sum()), int(macs)))
        return options

    return candidates


def _layer_candidates(
    network: MaskedGraph, layer: Layer, lost: Sequence[np.ndarray | None], levels: Levels
) -> Callable[[float], list[Option]]:
    """Returns (price of a MAC) -> options of a layer by itself: whole channels, and kept counts up to each level.

    The best number of whole channels at this price is found exactly. With partial counts the sides depend on each
    other, and take turns until neither moves.

    Args:
      network: with the layer's K.
      layer: one of it; a depthwise layer whose channels are its inputs, and go with them, counts with it.
      lost: [N+1, C] and [N+1, D]; None where a side has no mask.
      levels: see `choose_blocks`.
    """
    block, (height, width) = network.blocks[layer.name], layer.in_size
    num_coefs, size = block**2, (height, width)
    accepted = np.array(level_counts(num_coefs, levels))
    widths = (layer.in_channels, layer.out_channels)
    paths = (network.mask_of(layer.name, "input"), network.mask_of(layer.name, "output"))
    blocks = num_blocks(height, block) * num_blocks(width, block)
    transforms = np.array([block_transform_macs(block, count) for count in range(num_coefs + 1)])
    run = inner_spaces(network).get(layer.source or "")
    tap_macs = sum(taps.dense_macs for taps in run.depthwise) // layer.in_channels if run else 0

    def option(counts: Sequence[np.ndarray]) -> Option:
        inputs, outputs = (np.bincount(side, minlength=num_coefs + 1) for side in counts)
        macs = cheapest_pointwise(size, block, inputs, outputs)[0] + tap_macs * int(inputs[1:].sum())
        passed, by_path = 1.0, {}
        for path, of, side in zip(paths, lost, counts, strict=True):
            if path is not None and of is not None:
                by_path[path] = side
                passed *= 1 - float(of[side, np.arange(len(side))].sum())
        return Option(block, by_path, 1 - passed, macs)

    # Those of most energy go last. A side without a mask loses nothing with all channels, and has no other choice.
    orders = [np.arange(width) if of is None else np.argsort(-of[0]) for of, width in zip(lost, widths, strict=True)]
    losses = [
        np.append(np.full(len(order), np.inf) if of is None else of[0][order][::-1].cumsum()[::-1], 0)
        for of, order in zip(lost, orders, strict=True)
    ]
    # From one channel on: a layer that keeps none costs nothing, and nothing passes it.
    inputs, outputs = np.arange(1, widths[0] + 1)[:, None], np.arange(1, widths[1] + 1)
    lost_by_number = losses[0][1:, None] + losses[1][1:]
    macs_by_number = size[0] * size[1] * inputs * outputs + tap_macs * inputs

    def by_channels(price: float) -> Option:
        objective = lost_by_number + price * macs_by_number
        best = np.unravel_index(objective.argmin(), objective.shape)
        counts = [np.zeros(width, int) for width in widths]
        for side, order, place in zip(counts, orders, best, strict=True):
            side[order[: place + 1]] = num_coefs
        return option(counts)

    def by_bands(price: float, highest: int) -> Option:
        """Masked sides keep up to `highest`, and a side without a mask is then transformed no further."""
        counts = [np.full(width, num_coefs if of is None else highest) for of, width in zip(lost, widths, strict=True)]
        tried = accepted[accepted <= highest]
        for _ in range(_MAX_ROUNDS):
            before = [*counts]
            for side, of in enumerate(lost):
                if of is not None:
                    partners = (counts[1 - side] > np.arange(highest)[:, None]).sum(axis=1)
                    macs = blocks * (np.append(0, partners.cumsum()) + transforms[: highest + 1])
                    macs[1:] += tap_macs if side == 0 else 0
                    objective = of[tried] + price * macs[tried, None]
                    counts[side] = tried[objective.argmin(axis=0)]
                    if not counts[side].any():
                        strongest = of[0].argmax()
                        counts[side][strongest] = tried[1 + objective[1:, strongest].argmin()]
            if all(map(np.array_equal, counts, before)):
                break
        return option(counts)

    # With masks on both sides each of them limits the other: starting from all is enough.
    partial = accepted[1:] if len(accepted) > 2 else accepted[:0]
    highest_counts = partial if any(of is None for of in lost) else partial[-1:]

    def candidates(price: float) -> list[Option]:
        partial = (by_bands(price, int(highest)) for highest in highest_counts)
        # Whole channels are all of one search, so that blocks which keep nothing else come out alike.
        return [
            by_channels(price),
            *(of for of in partial if any((kept % num_coefs).any() for kept in of.counts.values())),
        ]

    return candidates
