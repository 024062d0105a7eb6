"""From learned masks to hard ones: rounding, the gate, and the rounding offset that meets a target exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from fdjax.ops.fcmask import level_counts
from fdjax.ops.macs import cheapest_pointwise, pointwise_macs
from fdjax.spec import (
    Counts,
    LayerSpec,
    NetworkMacs,
    NetworkSpec,
    effective_counts,
    network_macs,
    tied_mask,
    units,
)

FcMasks = Mapping[str, np.ndarray]
Levels = Sequence[int] | None


@dataclasses.dataclass(frozen=True)
class HardMasks:
    """Rounded and gated masks.

    Attributes:
      counts: path of every FCMask -> kept counts [channels].
      released: names of the layers that the gate released.
      offset: what was added to every FCMask before rounding.
      macs: of the network with these masks.
    """

    counts: dict[str, np.ndarray]
    released: tuple[str, ...]
    offset: float
    macs: NetworkMacs


def round_masks(spec: NetworkSpec, fcmasks: FcMasks, levels: Levels = None, offset: float = 0.0) -> Counts:
    """Path -> FCMask [channels] in [0, 1] to path -> kept counts: m + offset rounded to a level.

    The arithmetic is float32, as in `fdjax.ops.fcmask.kept_counts`, so that both round alike.
    """
    counts = {}
    for path, (_, num_coefs) in spec.mask_sizes.items():
        accepted = np.asarray(level_counts(num_coefs, levels))
        stretches = len(accepted) - 1
        scaled = (np.asarray(fcmasks[path], np.float32) + np.float32(offset)) * np.float32(stretches)
        below = np.floor(scaled)
        counts[path] = accepted[np.clip(below + (scaled - below >= 0.5), 0, stretches).astype(np.int64)]
    return counts


def even_groups(spec: NetworkSpec, fcmasks: FcMasks, counts: Counts, multiple: int) -> Counts:
    """Makes groups of tied channels as wide as hardware likes.

    In every tied block the number of channels that keep a given count or more becomes the nearest multiple of
    `multiple`, a half upwards, or all channels; where it changes, the channels whose masks are nearest move.

    Args:
      spec: the network.
      fcmasks: path -> FCMask [channels].
      counts: path -> kept counts, from `round_masks`.
      multiple: 1 or more.
    """
    evened = dict(counts)
    if multiple == 1:
        return evened
    for roles in units(spec).values():
        path = tied_mask(roles)
        if path is None:
            continue
        old = counts[path]
        # Highest mask first; among equals the first channel.
        order = np.argsort(-np.asarray(fcmasks[path], np.float64), kind="stable")
        new = np.zeros_like(old)
        for count in np.unique(old[old > 0]):
            width = int((old >= count).sum())
            new[order[: min(len(old), (width + multiple // 2) // multiple * multiple)]] = count
        evened[path] = new
    return evened


def gate_counts(
    spec: NetworkSpec, counts: Counts, convention: str = "total"
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Releases what is no cheaper pruned than whole, by MACs: partial counts rise to N, dead channels stay dead.

    Args:
      spec: the network.
      counts: path of every FCMask -> kept counts.
      convention: "total" compares cheapest exact forms, "paper" the paper's count.

    Returns:
      The counts after release, and the names of the released layers, in order.
    """
    gated = dict(counts)
    released: list[str] = []
    effective = effective_counts(spec, counts)
    tied_units = {name: roles for name, roles in units(spec).items() if tied_mask(roles)}
    for roles in tied_units.values():
        layers = [layer for layer in roles.values() if layer.block]
        _release_if_no_cheaper(spec, gated, released, tuple(roles.values()), layers, convention)
    for layer in spec.layers:
        if not layer.block or layer.unit in tied_units:
            continue
        if convention == "paper":
            inputs, outputs = layer.input_counts(counts), layer.output_counts(counts)
        else:
            inputs, outputs = effective[layer.name]
        if _layer_cost(layer, inputs, outputs, False, convention) >= _layer_cost(
            layer, _whole(inputs, layer), _whole(outputs, layer), True, convention
        ):
            released.append(layer.name)
            for path in (layer.input_mask, layer.output_mask):
                if path:
                    gated[path] = _whole(gated[path], layer)
    order = {layer.name: index for index, layer in enumerate(spec.layers)}
    return gated, tuple(sorted(released, key=order.__getitem__))


def _whole(counts: np.ndarray, layer: LayerSpec) -> np.ndarray:
    return np.where(counts > 0, layer.num_coefs, 0)


def _layer_cost(layer: LayerSpec, inputs: np.ndarray, outputs: np.ndarray, released: bool, convention: str) -> int:
    assert layer.block is not None
    if convention == "paper":
        return pointwise_macs(layer.in_size, layer.block, inputs, outputs, released).paper_total
    histograms = [np.bincount(side, minlength=layer.num_coefs + 1) for side in (inputs, outputs)]
    return cheapest_pointwise(layer.in_size, layer.block, histograms[0], histograms[1])[0]


def _release_if_no_cheaper(
    spec: NetworkSpec,
    gated: dict[str, np.ndarray],
    released: list[str],
    unit: tuple[LayerSpec, ...],
    layers: list[LayerSpec],
    convention: str,
) -> None:
    """A tied block is released as a whole: one mask serves both of its layers."""
    alone = dataclasses.replace(spec, layers=unit)
    raised = dict(gated)
    for layer in layers:
        for path in (layer.input_mask, layer.output_mask):
            if path:
                raised[path] = _whole(gated[path], layer)

    def cost(counts: Counts, names: tuple[str, ...]) -> int:
        macs = network_macs(alone, counts, names).to_dict()
        return macs["paper_total" if convention == "paper" else "total"]

    names = tuple(layer.name for layer in layers)
    if cost(gated, ()) >= cost(raised, names):
        gated.update(raised)
        released.extend(names)


def harden(
    spec: NetworkSpec,
    fcmasks: FcMasks,
    *,
    levels: Levels = None,
    gate: str = "macs",
    convention: str = "total",
    offset: float = 0.0,
    group_multiple: int = 1,
    released: Collection[str] = (),
) -> HardMasks:
    """Rounds masks and gates the result.

    Args:
      spec: the network.
      fcmasks: path -> FCMask [channels] in [0, 1].
      levels: the accepted kept counts below N, or None for all (`fdjax.ops.fcmask.level_counts`).
      gate: "macs" or "none".
      convention: of the gate, "total" or "paper".
      offset: added to every FCMask before rounding.
      group_multiple: of which the sizes of tied groups are made multiples (`even_groups`).
      released: layers to release whatever they cost.
    """
    counts = dict(even_groups(spec, fcmasks, round_masks(spec, fcmasks, levels, offset), group_multiple))
    for layer in spec.layers:
        for path in (layer.input_mask, layer.output_mask) if layer.name in released else ():
            if path:
                counts[path] = _whole(counts[path], layer)
    names: tuple[str, ...] = ()
    if gate == "macs":
        counts, names = gate_counts(spec, counts, convention)
    return HardMasks(counts, names, offset, network_macs(spec, counts, names))


def mac_ratio(macs: NetworkMacs, convention: str) -> float:
    """The ratio that a target speaks of: `macs.ratio` ("total") or `macs.paper_ratio` ("paper")."""
    return macs.paper_ratio if convention == "paper" else macs.ratio


def harden_to_target(
    spec: NetworkSpec,
    fcmasks: FcMasks,
    target: float,
    *,
    levels: Levels = None,
    gate: str = "macs",
    convention: str = "total",
    group_multiple: int = 1,
    released: Collection[str] = (),
    iterations: int = 20,
) -> HardMasks:
    """Finds the offset, from -1 to 1, whose hard masks come nearest to `target`.

    The offset tells how far learning still has to go: negative while the masks are too high, 0 when they meet the
    target as they stand. Masks of one value move together, so that the ratio has steps and the target is met as nearly
    as they allow.
    """

    def at(offset: float) -> tuple[float, HardMasks]:
        hard = harden(
            spec,
            fcmasks,
            levels=levels,
            gate=gate,
            convention=convention,
            offset=offset,
            group_multiple=group_multiple,
            released=released,
        )
        return abs(mac_ratio(hard.macs, convention) - target), hard

    low, high = -1.0, 1.0
    best = at(0.0)
    for _ in range(iterations):
        middle = (low + high) / 2
        candidate = at(middle)
        if candidate[0] < best[0]:
            best = candidate
        if mac_ratio(candidate[1].macs, convention) > target:
            high = middle
        else:
            low = middle
    return best[1]
