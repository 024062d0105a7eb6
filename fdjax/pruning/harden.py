"""From learned masks to hard ones: rounding, the gate, and the rounding offset that meets a target exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from fdjax.graph.counting import NetworkMacs, layer_totals, network_macs
from fdjax.graph.masks import SIDES, Counts, MaskedGraph
from fdjax.ops.macs import pointwise_macs

FcMasks = Mapping[str, np.ndarray]
Levels = Sequence[int] | None
# The time of kept counts over the dense network's.
Time = Callable[[Counts], float]


@dataclasses.dataclass(frozen=True)
class HardMasks:
    """Rounded and gated masks.

    Attributes:
      counts: path of every FCMask -> kept counts [channels].
      released: names of the layers that the gate released.
      offset: what was added to every FCMask before rounding.
      macs: of the network with these masks.
      time: over the dense network's, as a table has it; None where none was asked.
    """

    counts: dict[str, np.ndarray]
    released: tuple[str, ...]
    offset: float
    macs: NetworkMacs
    time: float | None = None


def round_masks(network: MaskedGraph, fcmasks: FcMasks, levels: Levels = None, offset: float = 0.0) -> Counts:
    """Path -> FCMask [channels] in [0, 1] to path -> kept counts: m + offset rounded to a level.

    The arithmetic is float32, as in `fdjax.ops.fcmask.kept_counts`, so that both round alike.
    """
    counts = {}
    for path in network.masks:
        accepted = np.asarray(network.levels_of(path, levels))
        stretches = len(accepted) - 1
        scaled = (np.asarray(fcmasks[path], np.float32) + np.float32(offset)) * np.float32(stretches)
        below = np.floor(scaled)
        counts[path] = accepted[np.clip(below + (scaled - below >= 0.5), 0, stretches).astype(np.int64)]
        if path in network.floors:
            highest = np.argsort(-np.asarray(fcmasks[path], np.float64), kind="stable")[: network.floors[path]]
            counts[path][highest] = np.maximum(counts[path][highest], accepted[1])
    return counts


def even_groups(network: MaskedGraph, fcmasks: FcMasks, counts: Counts, multiple: int) -> Counts:
    """Makes groups of tied channels as wide as hardware likes.

    For every tied mask the number of channels that keep a given count or more becomes the nearest multiple of
    `multiple`, a half upwards, or all channels; where it changes, the channels whose masks are nearest move. No fewer
    keep something than the network's floor for the mask.

    Args:
      network: the network.
      fcmasks: path -> FCMask [channels].
      counts: path -> kept counts, from `round_masks`.
      multiple: 1 or more.
    """
    evened = dict(counts)
    if multiple == 1:
        return evened
    for path, mask in network.masks.items():
        if not mask.tied:
            continue
        old = counts[path]
        # Highest mask first; among equals the first channel.
        order = np.argsort(-np.asarray(fcmasks[path], np.float64), kind="stable")
        new = np.zeros_like(old)
        for count in np.unique(old[old > 0]):
            width = int((old >= count).sum())
            even = (width + multiple // 2) // multiple * multiple
            if count == old[old > 0].min():
                even = max(even, -(-network.floors.get(path, 0) // multiple) * multiple)
            new[order[: min(len(old), even)]] = count
        evened[path] = new
    return evened


def sharing_layers(network: MaskedGraph) -> list[tuple[str, ...]]:
    """The wrapped layers, in order, those that share masks together: what one mask serves is released as a whole."""
    groups: list[tuple[set[str], list[str]]] = []
    for name in network.wrapped_layers:
        paths, names = _paths(network, name), [name]
        for group in [group for group in groups if group[0] & paths]:
            groups.remove(group)
            paths, names = paths | group[0], group[1] + names
        groups.append((paths, names))
    return [tuple(names) for _, names in groups]


def _paths(network: MaskedGraph, layer: str) -> set[str]:
    return {path for side in SIDES for path in network.paths_of(layer, side)}


def _gated_units(network: MaskedGraph) -> list[tuple[set[str], tuple[str, ...]]]:
    """What is released as a whole: masks, and the wrapped layers on which they lie.

    A mask on a space is a unit. Masks of layers' own sides are one with all that their layers have.
    """
    spaces = [mask for mask in network.masks.values() if mask.members is not None]
    if spaces:
        layers = ({layer for layer, _ in mask.sides if layer in network.blocks} for mask in spaces)
        units = zip(spaces, layers, strict=True)
        return [({mask.path}, tuple(sorted(names))) for mask, names in units if mask.block > 1]
    shared = sharing_layers(network)
    return [({path for name in names for path in _paths(network, name)}, names) for names in shared]


def gate_counts(
    network: MaskedGraph, counts: Counts, convention: str = "total", time: Time | None = None
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Releases what is no cheaper pruned than whole, by MACs: partial counts rise to N, dead channels stay dead.

    Args:
      network: the network.
      counts: path of every FCMask -> kept counts.
      convention: "total" compares cheapest exact forms, "paper" the paper's count.
      time: compares this, in place of MACs.

    Returns:
      The counts after release, and the names of the released layers, in order.
    """
    gated = dict(counts)
    released = set[str]()
    for paths, names in _gated_units(network):
        raised = {**gated, **{path: _whole(gated[path], network.masks[path].num_coefs) for path in paths}}
        if time is not None:
            pruned, whole = time(gated), time(raised)
        elif convention == "paper":
            pruned, whole = _paper_macs(network, gated, names, False), _paper_macs(network, raised, names, True)
        else:
            pruned, whole = (_total_macs(network, of, names) for of in (gated, raised))
        if pruned >= whole:
            released.update(names)
            gated = raised
    return gated, tuple(name for name in network.layers if name in released and _is_whole(network, gated, name))


def _is_whole(network: MaskedGraph, counts: Counts, layer: str) -> bool:
    """Whether a layer keeps nothing or all of every channel."""
    sides = (network.side_counts(counts, layer, side) for side in SIDES)
    return all(np.isin(side, (0, network.num_coefs_of(layer))).all() for side in sides)


def _whole(counts: np.ndarray, num_coefs: int) -> np.ndarray:
    return np.where(counts > 0, num_coefs, 0)


def _paper_macs(network: MaskedGraph, counts: Counts, names: Sequence[str], released: bool) -> int:
    total = 0
    for name in names:
        height, width = (1, *network.layers[name].in_size)[-2:]
        inputs, outputs = (network.side_counts(counts, name, side) for side in SIDES)
        total += pointwise_macs((height, width), network.blocks[name], inputs, outputs, released).paper_total
    return total


def _total_macs(network: MaskedGraph, counts: Counts, names: Sequence[str]) -> int:
    """Of these layers and the depthwise layers between them, which the form of a run takes in."""
    targets = {network.layers[name].target for name in names} & {network.layers[name].source for name in names}
    between = (name for name, layer in network.layers.items() if not layer.mixes and layer.target in targets)
    return sum(macs for macs, _ in layer_totals(network, counts, {*names, *between}).values())


def harden(
    network: MaskedGraph,
    fcmasks: FcMasks,
    *,
    target_macs: float | None = None,
    levels: Levels = None,
    gate: str = "macs",
    convention: str = "total",
    offset: float = 0.0,
    group_multiple: int = 1,
    released: Collection[str] = (),
    time: Time | None = None,
) -> HardMasks:
    """Rounds masks and gates the result.

    Args:
      network: the network.
      fcmasks: path -> FCMask [channels] in [0, 1].
      target_macs: a MAC ratio, to which they are then rounded as `harden_to_target` does it; None: as they stand.
      levels: the accepted kept counts below N (`fdjax.ops.fcmask.level_counts`); None: the graph's own.
      gate: "macs" or "none".
      convention: of the gate, "total" or "paper".
      offset: added to every FCMask before rounding.
      group_multiple: of which the sizes of tied groups are made multiples (`even_groups`).
      released: layers to release whatever they cost.
      time: what the gate compares in place of MACs.
    """
    if target_macs is not None:
        rounding = {"levels": levels, "gate": gate, "convention": convention, "group_multiple": group_multiple}
        return harden_to_target(network, fcmasks, target_macs, released=released, **rounding)
    counts = dict(even_groups(network, fcmasks, round_masks(network, fcmasks, levels, offset), group_multiple))
    for name in network.wrapped_layers:
        for path in _paths(network, name) if name in released else ():
            counts[path] = _whole(counts[path], network.masks[path].num_coefs)
    names: tuple[str, ...] = ()
    if gate == "macs":
        counts, names = gate_counts(network, counts, convention, time)
    estimated = None if time is None else time(counts)
    return HardMasks(counts, names, offset, network_macs(network, counts, names), estimated)


def mac_ratio(macs: NetworkMacs, convention: str) -> float:
    """The ratio that a target speaks of: `macs.ratio` ("total") or `macs.paper_ratio` ("paper")."""
    return macs.paper_ratio if convention == "paper" else macs.ratio


def cost_ratio(hard: HardMasks, convention: str) -> float:
    """What a target speaks of: time where it is known, else the MAC ratio."""
    return mac_ratio(hard.macs, convention) if hard.time is None else hard.time


def harden_to_target(
    network: MaskedGraph,
    fcmasks: FcMasks,
    target: float,
    *,
    levels: Levels = None,
    gate: str = "macs",
    convention: str = "total",
    group_multiple: int = 1,
    released: Collection[str] = (),
    time: Time | None = None,
    iterations: int = 20,
) -> HardMasks:
    """Finds the offset, from -1 to 1, whose hard masks come nearest to `target`: a MAC ratio, or with `time` that.

    The offset tells how far learning still has to go: negative while the masks are too high, 0 when they meet the
    target as they stand. Masks of one value move together, so that the ratio has steps and the target is met as nearly
    as they allow.
    """

    def at(offset: float) -> tuple[float, HardMasks]:
        hard = harden(
            network,
            fcmasks,
            levels=levels,
            gate=gate,
            convention=convention,
            offset=offset,
            group_multiple=group_multiple,
            released=released,
            time=time,
        )
        return abs(cost_ratio(hard, convention) - target), hard

    low, high = -1.0, 1.0
    best = at(0.0)
    for _ in range(iterations):
        middle = (low + high) / 2
        candidate = at(middle)
        if candidate[0] < best[0]:
            best = candidate
        if cost_ratio(candidate[1], convention) > target:
            high = middle
        else:
            low = middle
    return best[1]
