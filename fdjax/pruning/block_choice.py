"""The choice of each layer's block: the K that keeps the most energy for the MACs that its kept counts cost.

One Lagrange multiplier prices MACs for the whole network. A unit is a layer, or the two layers of a run with tied
channels, which need one K. For every K, a unit takes the kept counts that minimise

    -log(kept share of its energy) + multiplier * its MACs / the dense network's MACs

and then the K with the lowest minimum. The multiplier is the one that brings the network to the target. The logarithm
is there because layers follow one another, so that the shares that they keep multiply. With a sum of lost shares, it
would pay to empty the layer with the most MACs.

Layers without tied masks are counted one by one. What a dead channel of one saves in its neighbours shows only in the
network's count.

The candidates for kept counts minimise lost energy plus a price times MACs, over a range of prices. Each channel moves
along the lower convex hull of the energy that its counts lose and the MACs that they cost.
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

# All blocks prune whole channels equally well. A larger block must therefore gain this much of the unit's kept energy,
# relatively, to be chosen.
_LEAST_GAIN = 1e-3
# The prices to try: the share of a unit's energy that all its dense MACs cost.
_PRICES = np.append(0, 2.0 ** np.arange(-10, 10.01, 1 / 8))
# A unit that loses this share of its energy keeps nothing, up to rounding errors.
_ALL = 1 - 1e-9
# The highest multiplier to try, and the relative precision of the search.
_HIGHEST, _PRECISION = 1e6, 1e-4
# Limit on the rounds in which the two sides of a layer adapt to each other.
_MAX_ROUNDS = 20


class Option(NamedTuple):
    """What a unit keeps at one K.

    Attributes:
      block: the block size K.
      counts: path of each FCMask of the unit -> kept counts [channels], 0 to N.
      lost: the share of the unit's energy that its FCMasks together remove, 0 to 1.
      macs: exact MACs of the unit; a depthwise layer counts with the layer that reads it.
    """

    block: int
    counts: dict[str, np.ndarray]
    lost: float
    macs: int


@dataclasses.dataclass(frozen=True)
class BlockChoice:
    """A block for every unit.

    Attributes:
      multiplier: weight of MACs over dense MACs, against the logarithm of kept shares.
      options: unit -> its options at every K that fits, in ascending order of K.
      chosen: unit -> the chosen option.
      network: the network with the chosen blocks.
      macs: MACs of that network with the kept counts of `chosen`.
    """

    multiplier: float
    options: dict[str, tuple[Option, ...]]
    chosen: dict[str, Option]
    network: MaskedGraph
    macs: NetworkMacs


def coefficient_energy(x: jax.Array, block: int) -> jax.Array:
    """Computes the mean square of each DCT coefficient over images and blocks, divided by N.

    If K divides the sides of the map, the sum over coefficients is the mean square of the map (Parseval).

    Args:
      x: [B, H, W, C].
      block: the block size K, 1 to 16.

    Returns:
      [N, C], 0 or more.
    """
    return jnp.mean(jnp.square(layer_dct(x, block)), axis=(1, 2, 3)) / block**2


def block_units(network: MaskedGraph) -> dict[str, tuple[Layer, ...]]:
    """Groups the masked layers into units that need one K.

    Args:
      network: the graph with its masks.

    Returns:
      Unit -> its layers. A unit is the layers that share masks, named after the module that holds them, or one masked
      layer.
    """
    found: dict[str, tuple[Layer, ...]] = {}
    for names in sharing_layers(network):
        paths = [network.mask_of(name, side) for name in names for side in ("input", "output")]
        shared = next((path for path in paths if path is not None and paths.count(path) > 1), None)
        if any(path is not None for path in paths):
            unit = names[0] if shared is None else shared.rpartition("/")[0]
            found[unit] = tuple(network.layers[name] for name in names)
    return found


def with_blocks(network: MaskedGraph, blocks: Mapping[str, int]) -> MaskedGraph:
    """Returns a network with other blocks.

    Args:
      network: the graph with its masks.
      blocks: unit, as `block_units` names it, -> K where it changes.

    Returns:
      The network with the masks of the new blocks.
    """
    by_layer = {
        layer.name: blocks[name] for name, layers in block_units(network).items() if name in blocks for layer in layers
    }
    masks = {
        path: dataclasses.replace(mask, block=by_layer.get(mask.sides[0][0], mask.block))
        for path, mask in network.masks.items()
    }
    return dataclasses.replace(network, blocks={**network.blocks, **by_layer}, masks=masks)


def fitting_blocks(layers: Sequence[Layer], candidates: Sequence[int]) -> tuple[int, ...]:
    """Returns the candidates that are no larger than any map of `layers`, in ascending order.

    K does not have to divide a map, which is then padded.
    """
    shortest = min(side for layer in layers for side in layer.in_size)
    return tuple(sorted(block for block in {*candidates} if block <= shortest))


def check_choice(network: MaskedGraph, candidates: Sequence[int], target: float) -> None:
    """Checks that every unit has a candidate block and that the target can be met.

    Args:
      network: the graph with its masks.
      candidates: the K to choose from.
      target: MAC ratio, above 0 to 1.

    Raises:
      ValueError: no candidate fits a unit, or no masks bring the MAC ratio down to `target`.
    """
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
            f"a target of {target:g} cannot be met: with every masked channel removed, {floor:.3f}x of the MACs "
            "remain; choose a higher target, or mask more sides"
        )


def choose_blocks(
    network: MaskedGraph, energies: Energies, candidates: Sequence[int], target: float, levels: Levels = None
) -> BlockChoice:
    """Chooses a K for every unit.

    Args:
      network: the graph with the masks that will be learned. All layers have one block, so that runs can be tied.
      energies: energies of every masked side, for all candidates that fit.
      candidates: the K to choose from.
      target: the MAC ratio that the chosen counts may not exceed, above 0 to 1.
      levels: the kept counts below N to allow; None for all.

    Returns:
      The chosen blocks, with the kept counts that the choice assumes.

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
            f"a target of {target:g} cannot be met while every layer keeps a coefficient: {high.macs.ratio:.3f}x of "
            "the MACs remain; choose a higher target"
        )
    while high.multiplier - low > _PRECISION * (1 + high.multiplier):
        middle = at((low + high.multiplier) / 2)
        if middle.macs.ratio > target:
            low = middle.multiplier
        else:
            high = middle
    return high


def frontier(network: MaskedGraph, name: str, block: int, energies: Energies, levels: Levels = None) -> list[Option]:
    """Lists the best options of a unit at one K.

    Args:
      network: as for `choose_blocks`.
      name: the unit.
      block: the block size K.
      energies: as for `choose_blocks`.
      levels: as for `choose_blocks`.

    Returns:
      Options with ascending MACs and falling lost shares.
    """
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
    """Returns the share of a side's energy that each channel loses with a kept count of 0..N, [N+1, channels]."""
    energy = np.asarray(energy, np.float64)
    lost = np.pad(energy[::-1].cumsum(axis=0)[::-1], ((0, 1), (0, 0)))
    total = energy.sum()
    return lost / total if total else lost


def _run_of(network: MaskedGraph, name: str, layers: Sequence[Layer]) -> GroupRun:
    """Returns the run of a unit, which can be evaluated by groups.

    Raises:
      ValueError: the layers of the unit are not such a run.
    """
    names = {layer.name for layer in layers}
    for run in group_runs(network).values():
        if {run.writer.name, run.reader.name} == names:
            return run
    raise ValueError(f"blocks cannot be chosen for the layers of {name}: they share masks, but are not one tied run")


def channel_macs(run: GroupRun, counts: Sequence[int] | np.ndarray, *, narrow_transforms: bool) -> np.ndarray:
    """Counts a tied run as if it had a single channel.

    Args:
      run: the run.
      counts: kept counts to try, 0 to N.
      narrow_transforms: whether to count the transforms of the narrow sides, which all channels share.

    Returns:
      int [len(counts)], the MACs with each kept count.
    """
    each = (run.macs(np.array([n]), narrow_transforms=narrow_transforms) for n in counts)
    return np.array([sum(by_layer.values()) for by_layer in each])


def _tied_candidates(run: GroupRun, lost: np.ndarray, levels: Levels) -> Callable[[float], list[Option]]:
    """Returns a function from the price of a MAC to options of a tied run, among them the best at that price.

    Each channel costs what it costs alone, and the groups share the transforms of the narrow sides. The highest partial
    count decides the length of these transforms, so there is one option for each count that may be the highest.

    `lost` is [N+1, E], the mean over the two sides.
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
    """Returns a function from the price of a MAC to options of a single layer.

    The options are whole channels, and kept counts up to each level. The search finds the best numbers of whole
    channels at a price exactly. With partial counts, the two sides depend on each other, and are optimised in turn
    until neither changes.

    Args:
      network: the network with the layer's K.
      layer: the layer. A depthwise layer on its input channels, which is pruned with them, counts with it.
      lost: [N+1, C] and [N+1, D]; None where a side has no mask.
      levels: as for `choose_blocks`.
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

    # Channels of high energy are removed last. A side without a mask keeps all channels.
    orders = [np.arange(width) if of is None else np.argsort(-of[0]) for of, width in zip(lost, widths, strict=True)]
    losses = [
        np.append(np.full(len(order), np.inf) if of is None else of[0][order][::-1].cumsum()[::-1], 0)
        for of, order in zip(lost, orders, strict=True)
    ]
    # At least one channel: a layer without channels costs nothing and passes nothing.
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
        """Lets masked sides keep up to `highest` coefficients; sides without a mask are transformed no further."""
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

    # With masks on both sides, each limits the other, and starting from all coefficients suffices.
    partial = accepted[1:] if len(accepted) > 2 else accepted[:0]
    highest_counts = partial if any(of is None for of in lost) else partial[-1:]

    def candidates(price: float) -> list[Option]:
        partial = (by_bands(price, int(highest)) for highest in highest_counts)
        # All blocks share the search over whole channels, so that blocks without partial counts give equal results.
        return [
            by_channels(price),
            *(of for of in partial if any((kept % num_coefs).any() for kept in of.counts.values())),
        ]

    return candidates
