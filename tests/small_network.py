"""Channel graphs of small networks: what several test files count and prune."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fdjax.graph.masks import Mask, MaskedGraph, layer_blocks, place_masks
from fdjax.graph.network import Layer, trace
from fdjax.zoo import MobileNet
from tests.graph_networks import network_for


def small(**settings) -> MaskedGraph:
    """14x14 maps in 2x2 blocks and 7x7 maps in one, unless `settings` say otherwise."""
    return network_for(
        MobileNet("mobilenetv2_small", 10, **{"block": 2, "block_by_map": {7: 7}, **settings}), (28, 28, 1)
    )


def units(graph: MaskedGraph) -> dict[str, dict[str, Layer]]:
    """Inverted residual -> what its layers are called in it -> layer."""
    found: dict[str, dict[str, Layer]] = {}
    for name, layer in graph.layers.items():
        unit, _, role = name.rpartition("/")
        if unit:
            found.setdefault(unit, {})[role] = layer
    return found


def tied_masks(graph: MaskedGraph) -> dict[str, Mask]:
    """Inverted residual whose layers share a mask -> that mask."""
    return {unit: graph.masks[f"{unit}/wide"] for unit in units(graph) if f"{unit}/wide" in graph.masks}


def one_unit(*, channels: int, wide: int, features: int, side: int, stride: int, block: int) -> MaskedGraph:
    """A pointwise, a depthwise and a pointwise layer, "a/expand", "a/depthwise" and "a/project", with tied masks."""

    def apply(kernels: Mapping[str, Mapping[str, jax.Array]], x: jax.Array) -> jax.Array:
        inner = kernels["a"]
        x = jax.nn.relu(x @ inner["expand"])
        x = jax.lax.conv_general_dilated(
            x, inner["depthwise"], (stride, stride), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=wide,
        )  # fmt: skip
        return jax.nn.relu(x) @ inner["project"]

    kernels = {"expand": (channels, wide), "depthwise": (3, 3, 1, wide), "project": (wide, features)}
    graph = trace(
        apply,
        {"a": {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in kernels.items()}},
        jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32),
    )
    blocks = layer_blocks(graph, ("a/expand", "a/project"), block)
    return MaskedGraph("one unit", graph, place_masks(graph, blocks, tied=True), blocks, features)


def one_layer(*, channels: int, features: int, side: int, block: int, sides: str) -> MaskedGraph:
    """A pointwise layer, "head", with masks of its own."""
    kernel = {"head": jax.ShapeDtypeStruct((channels, features), jnp.float32)}
    graph = trace(lambda k, x: x @ k["head"], kernel, jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32))
    blocks = layer_blocks(graph, ("head",), block)
    return MaskedGraph("one layer", graph, place_masks(graph, blocks, sides), blocks, features)
