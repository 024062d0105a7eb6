"""The coefficient mask of a layer's side, assembled from the masks of its channels."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fdjax.graph.masks import MaskedGraph, Side


def side_mask(network: MaskedGraph, masks: Mapping[str, jax.Array], layer: str, side: Side) -> jax.Array | None:
    """Assembles the coefficient mask of a layer's side.

    Args:
      network: the graph with its masks.
      masks: path -> coefficient mask [N of the mask, channels of the mask].
      layer: name of the layer.
      side: "input" or "output".

    Returns:
      [N, channels] with the layer's N, or None if no mask lies on the side.
    """
    found, num_coefs = network.side(layer, side), network.num_coefs_of(layer)
    if found is None:
        return None
    # In a mask of whole channels, one coefficient represents all.
    wide = {path: jnp.broadcast_to(masks[path], (num_coefs, masks[path].shape[1])) for path in found.paths}
    return found.assemble(wide, jnp.ones((num_coefs, 1)), jnp.concatenate)
