"""Channel graphs of the networks that come with fdjax, with the masks that their specs have."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from fdjax.spec import NetworkSpec

from fdjax.graph.masks import MaskedGraph, layer_blocks, place_masks
from fdjax.graph.network import trace
from fdjax.zoo import FrequencyNetwork


def network_of(module: FrequencyNetwork, spec: NetworkSpec) -> MaskedGraph:
    """The network of a module and its spec."""
    dense, image = module.without_masks(), (1, *spec.input_shape)
    variables = jax.eval_shape(lambda: dense.init(jax.random.key(0), jnp.zeros(image)))
    graph = trace(lambda v, x: dense.apply(v, x), variables, jax.ShapeDtypeStruct(image, jnp.float32))
    blocks = {layer.name: layer.block for layer in spec.layers if layer.block}
    placed = layer_blocks(graph, blocks, module.block, module.block_by_map, module.block_by_layer)
    assert placed == blocks
    masks = place_masks(graph, placed, module.sides, spec.tied)
    assert {path: (mask.channels, mask.num_coefs) for path, mask in masks.items()} == spec.mask_sizes
    uncounted = frozenset() if spec.count_classifier else frozenset({"classifier"})
    return MaskedGraph(spec.name, graph, masks, placed, spec.num_classes, uncounted)


def network_for(
    module: FrequencyNetwork, input_shape: tuple[int, int, int], count_classifier: bool = False
) -> MaskedGraph:
    """The network of a module for images (H, W, C)."""
    return network_of(module, module.spec(input_shape, count_classifier))
