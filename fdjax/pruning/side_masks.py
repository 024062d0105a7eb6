"""The coefficient masks of a layer's side, put together from the masks of its channels."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fdjax.graph.masks import MaskedGraph, Side


def side_mask(network: MaskedGraph, masks: Mapping[str, jax.Array], layer: str, side: Side) -> jax.Array | None:
    """[N, channels] of a layer's side, N of the layer; None where nothing masks it.

    Args:
      network: with its masks.
      masks: path -> coefficient mask [N of the mask, channels of the mask].
      layer: its name.
      side: of it.
    """
    found, num_coefs = network.side(layer, side), network.num_coefs_of(layer)
    if found is None:
        return None
    # Whole channels: a mask of one coefficient stands for all.
    wide = {path: jnp.broadcast_to(masks[path], (num_coefs, masks[path].shape[1])) for path in found.paths}
    return found.assemble(wide, jnp.ones((num_coefs, 1)), jnp.concatenate)
