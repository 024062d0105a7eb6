"""From learned masks to hard masks: rounding, the gate, and the rounding offset that meets a target."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from fdjax.errors import UserError
from fdjax.graph.counting import NetworkMacs, layer_totals, map_size, network_macs
from fdjax.graph.masks import SIDES, Counts, MaskedGraph
from fdjax.ops.macs import pointwise_macs

FcMasks = Mapping[str, np.ndarray]
Levels = Sequence[int] | None
# Kept counts -> their time over the dense network's.
Time = Callable[[Counts], float]


@dataclasses.dataclass(frozen=True)
class HardMasks:
    """Rounded and gated masks.

    Attributes:
      counts: path of every FCMask -> kept counts [channels], 0 to N.
      released: names of the layers that the gate released.
      offset: the number added to every FCMask before rounding. Of equal masks that it moves across a threshold,
        `harden_to_target` may leave some below it.
      macs: MACs of the network with these masks.
      time: time over the dense network's by a time table; None without one.
    """

    counts: dict[str, np.ndarray]
    released: tuple[str, ...]
    offset: float
    macs: NetworkMacs
    time: float | None = None


def round_masks(network: MaskedGraph, fcmasks: FcMasks, levels: Levels = None, offset: float = 0.0) -> Counts:
    """Rounds FCMasks, after adding an offset, to kept counts.

    The arithmetic is float32, as in `fdjax.ops.fcmask.kept_counts`, so that both round alike.

    Args:
      network: the graph with its masks.
      fcmasks: path -> FCMask [channels], in [0, 1].
      levels: kept counts below N for masks without levels of their own; None for the graph's.
      offset: added to every FCMask, -1 to 1.

    Returns:
      Path -> kept counts, int [channels].
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
    """Makes the groups of channels that keep a count as wide as hardware prefers.

    For every mask and every kept count, the number of channels with at least that count becomes the nearest multiple
    of `multiple` (rounded half up), or all channels. The channels with the nearest masks change. The network's floor
    for the mask still holds. A mask of one side with fewer channels than `multiple` stays as it is.

    Args:
      network: the graph with its masks.
      fcmasks: path -> FCMask [channels], in [0, 1].
      counts: path -> kept counts [channels], from `round_masks`.
      multiple: 1 or more; 1 changes nothing.

    Returns:
      Path -> kept counts [channels].
    """
    evened = dict(counts)
    if multiple == 1:
        return evened
    for path, mask in network.masks.items():
        if not mask.tied and mask.channels < multiple:
            continue
        old = counts[path]
        # Highest mask first; among equal masks, the first channel.
        order = np.argsort(-np.asarray(fcmasks[path], np.float64), kind="stable")
        new = np.zeros_like(old)
        for count in np.unique(old[old > 0]):
            width = int((old >= count).sum())
            even = (width + multiple // 2) // multiple * multiple
            if len(old) - width < abs(even - width):
                even = len(old)
            if count == old[old > 0].min():
                even = max(even, -(-network.floors.get(path, 0) // multiple) * multiple)
            new[order[: min(len(old), even)]] = count
        evened[path] = new
    return evened


def sharing_layers(network: MaskedGraph) -> list[tuple[str, ...]]:
    """Groups the wrapped layers that share masks, in order; a group is released as a whole."""
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
    """Lists what is released as a whole: sets of masks, and the wrapped layers on which they lie.

    A mask on a space is a unit by itself. The masks on layers' own sides form one unit with the other masks of their
    layers.
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
    """Releases what is no cheaper pruned than whole: partial counts rise to N, and dead channels stay dead.

    Args:
      network: the graph with its masks.
      counts: path of every FCMask -> kept counts [channels], 0 to N.
      convention: "total" compares the cheapest exact forms, "paper" the paper's counts.
      time: a function to compare in place of MACs.

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
    """Returns whether a layer keeps none or all coefficients of every channel."""
    sides = (network.side_counts(counts, layer, side) for side in SIDES)
    return all(np.isin(side, (0, network.num_coefs_of(layer))).all() for side in sides)


def _whole(counts: np.ndarray, num_coefs: int) -> np.ndarray:
    return np.where(counts > 0, num_coefs, 0)


def _paper_macs(network: MaskedGraph, counts: Counts, names: Sequence[str], released: bool) -> int:
    total = 0
    for name in names:
        inputs, outputs = (network.side_counts(counts, name, side) for side in SIDES)
        total += pointwise_macs(
            map_size(network.layers[name].in_size), network.blocks[name], inputs, outputs, released
        ).paper_total
    return total


def _total_macs(network: MaskedGraph, counts: Counts, names: Sequence[str]) -> int:
    """Counts these layers and the depthwise layers between them, which the form of a run includes."""
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
    """Rounds masks, and releases what is no cheaper pruned than whole.

    Args:
      network: the graph with its masks.
      fcmasks: path -> FCMask [channels], in [0, 1].
      target_macs: the MAC ratio to meet, above 0 to 1, as in `harden_to_target`; None rounds the masks as they are.
      levels: kept counts below N to allow (`fdjax.ops.fcmask.level_counts`); None for the graph's.
      gate: "macs", or "none" to release nothing.
      convention: how the gate counts, "total" or "paper".
      offset: added to every FCMask before rounding, if there is no target.
      group_multiple: multiple that the sizes of groups are rounded to (`even_groups`).
      released: layers to release whatever they cost.
      time: a function for the gate to compare in place of MACs, without a target.

    Returns:
      The kept counts, the released layers, and their MACs.

    Raises:
      UserError: if the target, the gate, the convention or the multiple is none of those above, or both a target and a
        time are given.
    """
    _check(target_macs, gate, convention, group_multiple)
    if target_macs is not None and time is not None:
        raise UserError("target_macs is a target of MACs, and time a function for the gate: give one of them")
    if target_macs is not None:
        rounding = {"levels": levels, "gate": gate, "convention": convention, "group_multiple": group_multiple}
        return harden_to_target(network, fcmasks, target_macs, released=released, **rounding)
    rounded = round_masks(network, fcmasks, levels, offset)
    return _settle(network, fcmasks, rounded, offset, gate, convention, group_multiple, released, time)


def _check(target_macs: float | None, gate: str, convention: str, group_multiple: int) -> None:
    if target_macs is not None and not 0 < target_macs <= 1:
        raise UserError(f"target_macs is {target_macs}; give a share above 0 and at most 1, or None for no target")
    for name, value, accepted in (("gate", gate, ("macs", "none")), ("convention", convention, ("total", "paper"))):
        if value not in accepted:
            raise UserError(f"{name} is {value!r}; give one of {', '.join(map(repr, accepted))}")
    if group_multiple < 1:
        raise UserError(f"group_multiple is {group_multiple}; give 1 or more, such as 8")


def _settle(
    network: MaskedGraph,
    fcmasks: FcMasks,
    rounded: Counts,
    offset: float,
    gate: str,
    convention: str,
    group_multiple: int,
    released: Collection[str],
    time: Time | None,
) -> HardMasks:
    """Makes hard masks of rounded ones: group sizes, layers to release, the gate, and what they cost."""
    counts = dict(even_groups(network, fcmasks, rounded, group_multiple))
    for name in network.wrapped_layers:
        for path in _paths(network, name) if name in released else ():
            counts[path] = _whole(counts[path], network.masks[path].num_coefs)
    names: tuple[str, ...] = ()
    if gate == "macs":
        counts, names = gate_counts(network, counts, convention, time)
    estimated = None if time is None else time(counts)
    return HardMasks(counts, names, offset, network_macs(network, counts, names), estimated)


def mac_ratio(macs: NetworkMacs, convention: str) -> float:
    """Returns the ratio that a target refers to: `macs.ratio` ("total") or `macs.paper_ratio` ("paper")."""
    return macs.paper_ratio if convention == "paper" else macs.ratio


def cost_ratio(hard: HardMasks, convention: str) -> float:
    """Returns the ratio that a target refers to: time if it is known, or else MACs."""
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
    """Finds the offset whose hard masks come nearest to a target.

    The offset tells how far learning still has to go: it is negative while the masks are too high, and 0 when they meet
    the target as they are. Equal masks reach a threshold together. Where all of them would miss the target, a part of
    them changes: the same share of every layer's, its last channels first.

    Args:
      network: the graph with its masks.
      fcmasks: path -> FCMask [channels], in [0, 1].
      target: the MAC ratio to meet, above 0 to 1; with `time`, the time ratio.
      levels: as for `harden`.
      gate: as for `harden`.
      convention: "total" or "paper", for the gate and the target.
      group_multiple: as for `harden`.
      released: as for `harden`.
      time: kept counts -> their time over the dense network's, for the gate and the target.
      iterations: number of bisections of the offset in [-1, 1].

    Returns:
      The hard masks, with their offset.
    """

    tried: list[tuple[float, HardMasks]] = []

    def too_dear(rounded: Counts, offset: float) -> bool:
        hard = _settle(network, fcmasks, rounded, offset, gate, convention, group_multiple, released, time)
        cost = cost_ratio(hard, convention)
        tried.append((abs(cost - target), hard))
        return cost > target

    low, high = -1.0, 1.0
    too_dear(round_masks(network, fcmasks, levels), 0.0)
    for _ in range(iterations):
        middle = (low + high) / 2
        if too_dear(round_masks(network, fcmasks, levels, middle), middle):
            high = middle
        else:
            low = middle
    # What is left between the two offsets changes at one of them.
    fewer, more = (round_masks(network, fcmasks, levels, offset) for offset in (low, high))
    order = _falling_order(fcmasks, fewer, more)
    least, most = 0, len(order)
    while most - least > 1:
        middle = (least + most) // 2
        if too_dear(_lowered(more, fewer, order[:middle]), high):
            least = middle
        else:
            most = middle
    # Of equally near ones, the first.
    return min(tried, key=lambda found: found[0])[1]


def _falling_order(fcmasks: FcMasks, fewer: Counts, more: Counts) -> list[tuple[str, int]]:
    """Lists the channels (path, index) whose counts differ: lowest mask first, equal masks spread over the layers."""
    places = []
    for path, counts in more.items():
        channels = np.flatnonzero(counts != fewer[path])[::-1]
        places += [
            (float(fcmasks[path][channel]), (rank + 0.5) / len(channels), path, int(channel))
            for rank, channel in enumerate(channels)
        ]
    return [(path, channel) for _, _, path, channel in sorted(places)]


def _lowered(more: Counts, fewer: Counts, channels: Sequence[tuple[str, int]]) -> Counts:
    """Returns the higher counts, but with the lower ones for these channels."""
    counts = {path: of.copy() for path, of in more.items()}
    for path, channel in channels:
        counts[path][channel] = fewer[path][channel]
    return counts
