"""From a config to the network it asks for, its spec, and its hard masks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fdjax.config import Config, LearnConfig
from fdjax.errors import UserError
from fdjax.frozen.bench import seeded_variables
from fdjax.frozen.choice import Stopwatch, release_slower
from fdjax.ops.fcmask import counts_to_fcmask, kept_counts
from fdjax.pruning import HardMasks, harden, harden_to_target
from fdjax.spec import Counts, NetworkSpec, tied_mask, units
from fdjax.zoo import MOBILENETS, RESNETS, FrequencyNetwork, MobileNet, OctaveMobileNet, ResNet, WideGroups


def build_network(
    config: Config, input_shape: tuple[int, int, int], num_classes: int
) -> tuple[FrequencyNetwork, NetworkSpec]:
    """Makes the network and its spec.

    Args:
      config: model and mask settings are read.
      input_shape: (H, W, C) of an image.
      num_classes: outputs.

    Raises:
      UserError: a block larger than its map, a setting for a layer that does not exist, or an octave share that splits
        no map.
    """
    model = config.model
    common: dict[str, Any] = {
        "variant": model.name,
        "num_classes": num_classes,
        "width": model.width,
        "padding": model.padding,
        "batch_norm_epsilon": model.batch_norm_epsilon,
    }
    if model.octave:
        network = OctaveMobileNet(**common, octave=model.octave, octave_maps=model.octave_maps)
    else:
        common |= {"levels": config.learn.counts_below_whole, **mask_fields(config.learn, model.name)}
        if model.name in MOBILENETS:
            network = MobileNet(**common)
        else:
            fields = ("cardinality", "group_width", "inner_channels")
            network = ResNet(**common, **{field: getattr(model, field) for field in fields})
    try:
        return network, network.spec(input_shape, config.model.count_classifier)
    except ValueError as error:
        raise UserError(str(error)) from error


def mask_fields(learn: LearnConfig, variant: str) -> dict[str, Any]:
    """The fields of a network that say which masks it has: blocks, sides, tying.

    Raises:
      UserError: masks that such a network cannot have.
    """
    if learn.tied and (variant in RESNETS or not MOBILENETS[variant].linear):
        raise UserError(f"learn.tied is for networks of inverted residual blocks, which {variant} is not; turn it off")
    fields = {
        "block": learn.block,
        "block_by_map": dict(learn.block_by_map),
        "block_by_layer": dict(learn.block_by_layer),
        "sides": learn.sides,
    }
    if variant in MOBILENETS:
        fields["tied"] = learn.tied
    return fields


def check_maskable(spec: NetworkSpec) -> None:
    """Raises `UserError` if a network has no layer that is wrapped, and so none that could have masks."""
    if not any(layer.block for layer in spec.layers):
        raise UserError(
            f"{spec.name} has no wrapped layers, so there are no masks to learn, set or choose blocks for (a ResNet of "
            "3x3 convolutions has no pointwise layers, and with model.octave none is wrapped): train it with --phases "
            "pretrain, or take another network"
        )


def flat_masks(fcmask) -> dict[str, np.ndarray]:
    """The `fcmask` collection as path -> array on the host."""
    return {path: np.asarray(mask) for path, mask in flatten_dict(fcmask, sep="/").items()}


def collection_of(spec: NetworkSpec, counts: Counts) -> dict:
    """Hard masks as an `fcmask` collection: kept counts / N."""
    sizes = spec.mask_sizes
    return unflatten_dict({path: counts_to_fcmask(count, sizes[path][1]) for path, count in counts.items()}, sep="/")


def counts_of(spec: NetworkSpec, fcmask: Any) -> dict[str, np.ndarray]:
    """Kept counts of a collection as it stands, without levels or gate."""
    sizes = spec.mask_sizes
    return {path: np.asarray(kept_counts(jnp.asarray(m), sizes[path][1])) for path, m in flat_masks(fcmask).items()}


def hard_masks(
    learn: LearnConfig,
    spec: NetworkSpec,
    fcmask,
    *,
    to_target: bool,
    released: Collection[str] = (),
) -> HardMasks:
    """Rounds and gates an `fcmask` collection by the mask settings.

    Args:
      learn: levels, gate, convention and target.
      spec: the network.
      fcmask: the collection.
      to_target: shift the rounding so that the target is met; else the masks are rounded as they stand.
      released: layers to release whatever they cost.
    """
    masks = flat_masks(fcmask)
    rounding: Any = {
        "levels": learn.counts_below_whole,
        "gate": "none" if learn.gate == "none" else "macs",
        "convention": learn.target_convention,
        "group_multiple": learn.group_multiple,
        "released": released,
    }
    if to_target and learn.target_macs is not None:
        return harden_to_target(spec, masks, learn.target_macs, **rounding)
    return harden(spec, masks, **rounding)


def hard_masks_by_time(learn: LearnConfig, spec: NetworkSpec, fcmask, stopwatch: Stopwatch) -> HardMasks:
    """As `hard_masks` to the target, but also without what takes longer pruned than released, frozen, on this machine.

    Each look releases what it finds slower, and the rest is rounded anew, so that the target is still met.
    """
    # Which weights they are makes no difference to the time.
    weights, released = seeded_variables(spec), set[str]()
    while True:
        hard = hard_masks(learn, spec, fcmask, to_target=True, released=released)
        _, slower = release_slower(spec, weights, hard.counts, stopwatch)
        if released.issuperset(slower):
            return hard
        released.update(slower)


def layers_at_levels(spec: NetworkSpec, counts: Counts, levels: tuple[int, ...]) -> frozenset[str]:
    """The wrapped layers whose kept counts are all among `levels` and N."""
    found = set()
    for layer in spec.layers:
        if layer.block:
            sides = (layer.input_counts(counts), layer.output_counts(counts))
            if all(np.isin(side, (*levels, layer.num_coefs)).all() for side in sides):
                found.add(layer.name)
    return frozenset(found)


# Pixels of a map below which groups of their own gain less time in steps than they cost in compilation.
_SMALLEST_MAP = 64


def wide_groups(spec: NetworkSpec, counts: Counts) -> tuple[tuple[str, WideGroups], ...]:
    """(block name, groups of its wide channels) of the blocks that are worth running group by group.

    A block without a dead channel or anything to gain from tied masks is left out, as is one of dead channels only.
    """
    found = []
    for name, roles in units(spec).items():
        project, expand = roles["project"], roles.get("expand")
        if not project.block:
            continue
        kept, whole, means = project.input_counts(counts), np.array([], int), np.array([], int)
        narrow_masks = expand is None or expand.input_mask or project.output_mask
        if tied_mask(roles) and not narrow_masks and math.prod(project.in_size) >= _SMALLEST_MAP:
            whole = np.flatnonzero(kept == project.num_coefs)
            sides = (*roles["depthwise"].in_size, *roles["depthwise"].out_size)
            if all(side % project.block == 0 for side in sides):
                means = np.flatnonzero((kept == 1) & (project.num_coefs > 1))
        others = np.setdiff1d(np.flatnonzero(kept), np.concatenate([whole, means]))
        if 0 < len(others) < len(kept) or len(whole) or len(means):
            found.append((name, WideGroups(*(tuple(map(int, group)) for group in (whole, means, others)))))
    return tuple(found)


def hard_network(network: FrequencyNetwork, spec: NetworkSpec, counts: Counts) -> FrequencyNetwork:
    """The network with rounded masks: without transforms where `counts` need none, and without dead wide channels."""
    if isinstance(network, MobileNet):
        network = dataclasses.replace(network, wide_groups=wide_groups(spec, counts))
    return dataclasses.replace(
        network,
        mode="hard",
        whole_channels=layers_at_levels(spec, counts, (0,)),
        block_means=layers_at_levels(spec, counts, (0, 1)),
    )
