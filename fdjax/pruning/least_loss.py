"""Rounding tied masks by what a level loses and costs, in place of taking the nearest level.

A channel takes the level that minimises

    lost share of its block's energy + price * its MACs / the dense network's MACs

What it loses is what rounding changes: the square of the difference between its soft coefficient mask and the hard one,
times the energy of the coefficient. So a channel at 0.7 of levels 0, 1, N keeps its mean where nearly all of its energy
lies there, and is kept whole where it does not. One price holds for the network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from fdjax.ops.fcmask import coef_mask, level_counts
from fdjax.pruning.block_choice import Energies, channel_macs
from fdjax.spec import NetworkSpec, tied_mask, units

Levels = Sequence[int] | None


def level_losses(
    spec: NetworkSpec, fcmasks: Mapping[str, np.ndarray], energies: Energies, levels: Levels = None
) -> dict[str, np.ndarray]:
    """What each tied channel loses at each level, as a share of its block's energy under the soft masks.

    Args:
      spec: the network.
      fcmasks: path -> FCMask [channels], in [0, 1].
      energies: of both sides that a tied mask acts on, for the block that they have.
      levels: the accepted kept counts below N, or None for all.

    Returns:
      path of a tied mask -> float64 [levels, channels], the mean of the two sides.
    """
    found = {}
    for roles in units(spec).values():
        path, expand, project = tied_mask(roles), roles.get("expand"), roles["project"]
        if path is None:
            continue
        assert expand is not None and project.block is not None
        num_coefs = project.num_coefs
        soft = np.asarray(coef_mask(jnp.asarray(fcmasks[path], jnp.float32), num_coefs, levels), np.float64)
        accepted = np.array(level_counts(num_coefs, levels))
        hard = np.arange(num_coefs) < accepted[:, None]  # [levels, N]
        changed = np.square(soft - hard[:, :, None])  # [levels, N, channels]
        sides = []
        for layer, side in ((expand, "output"), (project, "input")):
            energy = np.asarray(energies[layer.name, side][project.block], np.float64)
            kept = float((np.square(soft) * energy).sum())
            sides.append((changed * energy).sum(axis=1) / (kept or 1.0))
        found[path] = np.mean(sides, axis=0)
    return found


def round_by_loss(
    spec: NetworkSpec, losses: Mapping[str, np.ndarray], levels: Levels, price: float
) -> dict[str, np.ndarray]:
    """Kept counts of the tied masks.

    Args:
      spec: the network.
      losses: from `level_losses`, with the same `levels`.
      levels: the accepted kept counts below N, or None for all.
      price: of all dense MACs, in shares of a block's energy; negative to keep more than costs nothing.

    Returns:
      path of a tied mask -> kept counts [channels]; of levels that do equally well the lowest.
    """
    dense = sum(layer.dense_macs for layer in spec.counted_layers)
    counts = {}
    for roles in units(spec).values():
        path = tied_mask(roles)
        if path is None:
            continue
        accepted = np.array(level_counts(roles["project"].num_coefs, levels))
        macs = channel_macs(spec, roles, accepted, narrow_transforms=False)
        counts[path] = accepted[(losses[path] + price * macs[:, None] / dense).argmin(axis=0)]
    return counts


def price_at(offset: float) -> float:
    """The price that stands for a rounding offset, so that one search serves both: -1 to 1 -> very high to very low."""
    return math.tan(-offset * math.pi / 2)
