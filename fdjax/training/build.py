"""Makes the network that a config describes, its channel graph, and its hard masks."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fdjax.config import Config, LearnConfig
from fdjax.errors import UserError
from fdjax.frozen.bench import seeded_variables
from fdjax.frozen.choice import Stopwatch, release_slower
from fdjax.graph.masks import SIDES, Counts, MaskedGraph
from fdjax.graph.network import Layer, Space
from fdjax.graph.prunable import mask_problem
from fdjax.ops.fcmask import counts_to_fcmask, kept_counts
from fdjax.pruning import HardMasks, harden, harden_to_target
from fdjax.pruning.timed import TimeTable
from fdjax.training.network import trace_network
from fdjax.training.own_network import Network, OwnNetwork, make_own_network
from fdjax.zoo import WideGroups, make_network


def build_network(config: Config, input_shape: tuple[int, int, int], num_classes: int) -> tuple[Network, MaskedGraph]:
    """Makes the network and its channel graph.

    Args:
      config: its settings of the model and the masks are read.
      input_shape: (H, W, C) of an image.
      num_classes: number of outputs.

    Returns:
      The network, with soft masks, and its channel graph.

    Raises:
      UserError: if a block is larger than its map, a setting names a layer or a map that does not exist, or the factory
        does not make a network for such images.
    """
    own = None if config.model.factory is None else make_own_network(config, input_shape, num_classes)
    network = own or make_network(config.model, config.learn, num_classes)
    try:
        graph = trace_network(network, input_shape, config.learn, count_classifier=config.model.count_classifier)
    except ValueError as error:
        raise UserError(str(error)) from error
    return (network if own is None else dataclasses.replace(own, masks=graph)), graph


# Fields of a graph that depend on the data, and so are not in the config.
_FACTS = ("input_mean", "input_std", "class_names")


def facts_of(graph: MaskedGraph) -> dict[str, Any]:
    """Returns what a checkpoint stores about a network in addition to the config, as JSON types."""
    shown = {"name": graph.name, "input_shape": list(graph.input_shape), "num_classes": graph.num_classes}
    return {**shown, **{name: list(getattr(graph, name)) for name in _FACTS}}


def network_of(config: Config, facts: Mapping[str, Any]) -> tuple[Network, MaskedGraph]:
    """Makes the network of a checkpoint from its config and from what `facts_of` returned.

    Raises:
      UserError: if the config does not make a network.
      ValueError: if the facts do not describe a network.
    """
    try:
        height, width, channels = map(int, facts["input_shape"])
        known = {name: tuple(facts[name]) for name in _FACTS}
        network, graph = build_network(config, (height, width, channels), int(facts["num_classes"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"it does not describe a network: {error!r}") from error
    return network, dataclasses.replace(graph, **known)


def check_maskable(graph: MaskedGraph) -> None:
    """Raises `UserError` if no layer of a network can have masks."""
    if not graph.blocks and not graph.masks:
        raise UserError(
            f"{graph.name} has no layers that can have masks ({_why_none(graph)}), so there are no masks to learn, "
            "to set or to choose blocks for: train it with --phases pretrain, or use another network"
        )


def _why_none(graph: MaskedGraph) -> str:
    """Says in one line which layers there are, and why each cannot have masks."""
    reasons: dict[str, list[str]] = {}
    for name, layer in graph.layers.items():
        reasons.setdefault(mask_problem(layer) or "is not a frequency layer", []).append(name)
    found = [f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}: {why}" for why, names in reasons.items()]
    return "; ".join(found) or "it has no layers at all"


def flat_masks(fcmask) -> dict[str, np.ndarray]:
    """Flattens an `fcmask` collection.

    Args:
      fcmask: the collection, values in [0, 1].

    Returns:
      The path of each FCMask -> its values on the host, float [C].
    """
    return {path: np.asarray(mask) for path, mask in flatten_dict(fcmask, sep="/").items()}


def collection_of(graph: MaskedGraph, counts: Counts) -> dict:
    """Makes an `fcmask` collection of kept counts.

    Args:
      graph: channel graph of the network.
      counts: the kept counts of each FCMask by its path, int [C], 0..N.

    Returns:
      The collection, with the values count / N.
    """
    sizes = graph.mask_sizes
    return unflatten_dict({path: counts_to_fcmask(count, sizes[path][1]) for path, count in counts.items()}, sep="/")


def soft_collection(graph: MaskedGraph, counts: Counts, levels: tuple[int, ...] | None) -> dict:
    """Makes an `fcmask` collection that learning can start from, which keeps the given counts.

    A soft mask has its levels at equal distances in [0, 1], where a hard one is count / N.

    Args:
      graph: channel graph of the network.
      counts: the kept counts of each FCMask by its path, int [C], 0..N; a count between two levels lies between them.
      levels: counts below N that masks fade between; None for all.

    Returns:
      The collection.
    """
    soft = {}
    for path, count in counts.items():
        steps = graph.levels_of(path, levels)
        soft[path] = np.interp(count, steps, np.linspace(0, 1, len(steps))).astype(np.float32)
    return unflatten_dict(soft, sep="/")


def counts_of(graph: MaskedGraph, fcmask: Any) -> dict[str, np.ndarray]:
    """Rounds an `fcmask` collection to kept counts, without levels and gate.

    Args:
      graph: channel graph of the network.
      fcmask: the collection, values in [0, 1].

    Returns:
      The kept counts of each FCMask by its path, int [C], 0..N.
    """
    sizes = graph.mask_sizes
    return {path: np.asarray(kept_counts(jnp.asarray(m), sizes[path][1])) for path, m in flat_masks(fcmask).items()}


def hard_masks(
    learn: LearnConfig,
    graph: MaskedGraph,
    fcmask,
    *,
    to_target: bool,
    released: Collection[str] = (),
    table: TimeTable | None = None,
) -> HardMasks:
    """Rounds and gates an `fcmask` collection by the mask settings.

    Args:
      learn: levels, gate, convention and target.
      graph: channel graph of the network.
      fcmask: the collection.
      to_target: whether to shift the rounding so that the target is met; otherwise each mask is rounded by itself.
      released: layers to release whatever they cost.
      table: measured times, if the target is a time; the gate and the target then compare times.

    Returns:
      The hard masks.
    """
    masks = flat_masks(fcmask)
    rounding: Any = {
        "levels": learn.counts_below_whole,
        "gate": "none" if learn.gate == "none" else "macs",
        "convention": learn.target_convention,
        "group_multiple": learn.multiple,
        "released": released if table is None else {*released, *table.outside(graph)},
        "time": None if table is None else functools.partial(table.ratio, graph),
    }
    target = learn.target_macs if table is None else learn.target_time
    if to_target and target is not None:
        return harden_to_target(graph, masks, target, **rounding)
    return harden(graph, masks, **rounding)


def hard_masks_by_time(learn: LearnConfig, graph: MaskedGraph, fcmask, stopwatch: Stopwatch) -> HardMasks:
    """Does as `hard_masks` with the target, and also releases layers that are slower pruned than released.

    Layers are timed frozen, on this machine. When layers are released, the other masks are rounded again, so that the
    target is still met; this repeats until no more layers are slower.
    """
    # The time does not depend on the values of the weights.
    weights, released = seeded_variables(graph), set[str]()
    while True:
        hard = hard_masks(learn, graph, fcmask, to_target=True, released=released)
        _, slower = release_slower(graph, weights, hard.counts, stopwatch)
        if released.issuperset(slower):
            return hard
        released.update(slower)


def layers_at_levels(graph: MaskedGraph, counts: Counts, levels: tuple[int, ...]) -> frozenset[str]:
    """Finds the wrapped layers that can be computed without transforms.

    Args:
      graph: channel graph of the network.
      counts: the kept counts of each FCMask by its path, int [C].
      levels: kept counts that are accepted in addition to N.

    Returns:
      The names of the layers whose kept counts are all among `levels` and N.
    """
    found = set()
    for name, block in graph.blocks.items():
        sides = (graph.side_counts(counts, name, side) for side in SIDES)
        if all(np.isin(side, (*levels, block**2)).all() for side in sides):
            found.add(name)
    return frozenset(found)


# On maps of fewer pixels, computing by groups saves less time in steps than it costs in compilation.
_SMALLEST_MAP = 64


def wide_groups(graph: MaskedGraph, counts: Counts) -> tuple[tuple[str, WideGroups], ...]:
    """Finds the runs that are faster when they are computed group by group.

    Args:
      graph: channel graph of the network.
      counts: the kept counts of each FCMask by its path, int [C].

    Returns:
      Pairs of a run's module and the groups of its wide channels. Runs that would gain nothing are left out: those
      whose channels are all dead, and those without dead channels and without tied masks.
    """
    found = []
    for space in graph.spaces.values():
        for module in {name.rpartition("/")[0] for name in space.depthwise}:
            readers = [name for name in space.readers if name.rpartition("/")[0] == module and name in graph.blocks]
            if len(readers) == 1:
                groups = _groups_of(graph, counts, space, module, graph.layers[readers[0]])
                found += [(module, groups)] if groups else []
    return tuple(found)


def _groups_of(graph: MaskedGraph, counts: Counts, space: Space, module: str, reader: Layer) -> WideGroups | None:
    block = graph.blocks[reader.name]
    depthwise = next(graph.layers[name] for name in space.depthwise if name.rpartition("/")[0] == module)
    kept, whole, means = graph.side_counts(counts, reader.name, "input"), np.array([], int), np.array([], int)
    if graph.tied_mask(space) and _unmasked_outside(graph, space) and math.prod(reader.in_size) >= _SMALLEST_MAP:
        whole = np.flatnonzero(kept == block**2)
        if all(side % block == 0 for side in (*depthwise.in_size, *depthwise.out_size)):
            means = np.flatnonzero((kept == 1) & (block > 1))
    others = np.setdiff1d(np.flatnonzero(kept), np.concatenate([whole, means]))
    if not (0 < len(others) < len(kept) or len(whole) or len(means)):
        return None
    return WideGroups(*(tuple(map(int, group)) for group in (whole, means, others)))


def _unmasked_outside(graph: MaskedGraph, space: Space) -> bool:
    """Whether the writer's input and the reader's output have no masks."""
    return graph.mask_of(space.writers[0], "input") is None and graph.mask_of(space.readers[0], "output") is None


def hard_network(network: Network, graph: MaskedGraph, counts: Counts) -> Network:
    """Rounds a network's masks; transforms that `counts` do not need and dead wide channels are left out.

    Args:
      network: with soft masks.
      graph: channel graph of the network.
      counts: the kept counts of each FCMask by its path, int [C].

    Returns:
      The network with hard masks.
    """
    if isinstance(network, OwnNetwork):
        return network.hardened(counts)
    if hasattr(network, "wide_groups"):
        network = dataclasses.replace(network, wide_groups=wide_groups(graph, counts))
    return dataclasses.replace(
        network,
        mode="hard",
        whole_channels=layers_at_levels(graph, counts, (0,)),
        block_means=layers_at_levels(graph, counts, (0, 1)),
    )
