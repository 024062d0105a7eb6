"""Traces a network to its channel graph, and places the masks that a config asks for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from fdjax.config import LearnConfig
from fdjax.graph.cuts import cutting_masks
from fdjax.graph.masks import IMAGE_SCALING, Mask, MaskedGraph, layer_blocks, place_masks
from fdjax.graph.network import Graph, trace
from fdjax.graph.placing import masks_on_spaces, wrapped_blocks
from fdjax.graph.prunable import mask_problem
from fdjax.graph.rules import check_rules, chosen
from fdjax.training.own_network import Network, OwnNetwork
from fdjax.zoo import FCMASK, FrequencyNetwork


def wrapped_layers(network: Network, input_shape: tuple[int, int, int]) -> frozenset[str]:
    """Returns the names of the layers that are wrapped in a DCT and its inverse, and so can have masks of their own.

    Args:
      network: a network of the zoo, or the user's own.
      input_shape: (H, W, C) of an image.
    """
    plain = network.without_masks()
    return (_trace_plain if isinstance(plain, OwnNetwork) else _traced)(plain, input_shape)[1]


def _trace_plain(plain: Network, input_shape: tuple[int, int, int]) -> tuple[Graph, frozenset[str]]:
    """Traces a network without masks; returns its channel graph and the names of the layers that could have masks."""
    every = plain
    if isinstance(plain, FrequencyNetwork):
        untied = {"tied": False} if hasattr(plain, "tied") else {}
        every = dataclasses.replace(plain, mode="soft", sides="input", **untied)
    image = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    shapes = dict(jax.eval_shape(lambda: every.init(jax.random.key(0), jnp.zeros(image.shape))))
    masks = flatten_dict(shapes.pop(FCMASK, {}), sep="/")
    scaling = {name: jax.ShapeDtypeStruct(input_shape[-1:], jnp.float32) for name in ("mean", "std")}

    def apply(variables: Any, images: jax.Array) -> jax.Array:
        scale = variables[IMAGE_SCALING]
        collections = {name: value for name, value in variables.items() if name != IMAGE_SCALING}
        return jnp.asarray(plain.apply(collections, (images - scale["mean"]) / scale["std"]))

    graph = trace(apply, {**shapes, IMAGE_SCALING: scaling}, image)
    if isinstance(plain, OwnNetwork):
        return graph, frozenset(name for name, layer in graph.layers.items() if mask_problem(layer) is None)
    return graph, frozenset(path.rpartition("/")[0] for path in masks)


# Flax's modules are hashable, which their type does not say.
_traced: Any = functools.lru_cache(maxsize=16)(_trace_plain)


def trace_network(
    network: Network,
    input_shape: tuple[int, int, int],
    learn: LearnConfig,
    *,
    count_classifier: bool = False,
    **facts: Any,
) -> MaskedGraph:
    """Traces a network without its masks, and places the masks on the channel graph.

    The graph takes raw images, 0..255; `graph_variables` makes its variables.

    Args:
      network: a network of the zoo, or the user's own.
      input_shape: (H, W, C) of an image.
      learn: layers, blocks, sides and tying of the masks.
      count_classifier: whether the classifier is counted in the totals.
      **facts: other fields of `MaskedGraph`, such as `class_names`.

    Returns:
      The graph with its masks.

    Raises:
      ValueError: if a block is larger than its map, or a setting names a map or layer that does not exist.
    """
    own = isinstance(network, OwnNetwork)
    graph, wrappable = (_trace_plain if own else _traced)(network.without_masks(), input_shape)
    masks, blocks = _on_spaces(graph, learn) if own and learn.tied else _on_layers(graph, wrappable, learn)
    uncounted = () if count_classifier else _classifiers(graph)
    return MaskedGraph(
        name=network.title,
        graph=graph,
        masks=masks,
        blocks=blocks,
        num_classes=network.num_classes,
        levels=learn.counts_below_whole,
        floors=_floors(graph, masks, learn),
        uncounted=frozenset(uncounted),
        **facts,
    )


def _floors(graph: Graph, masks: Mapping[str, Mask], learn: LearnConfig) -> dict[str, int]:
    """Returns a floor of 1 for masks that would cut the network if they removed all channels.

    These are masks of whole spaces and, with tied masks, masks that no connection bypasses. The paper's masks, on
    single sides of layers, have no floors, because they are rounded as they were learned.
    """
    ends = cutting_masks(graph, masks) if learn.tied else ()
    return {path: 1 for path, mask in masks.items() if path in ends or mask.members is not None}


def _on_layers(graph: Graph, wrappable: Collection[str], learn: LearnConfig) -> tuple[dict[str, Mask], dict[str, int]]:
    """Returns masks on the sides of the wrapped layers, or tied as the zoo's modules tie them, and the blocks."""
    wrapped = _chosen(wrappable, learn)
    blocks = layer_blocks(graph, wrapped, learn.block, dict(learn.block_by_map), dict(learn.block_by_layer))
    return place_masks(graph, blocks, learn.sides, learn.tied), blocks


def _on_spaces(graph: Graph, learn: LearnConfig) -> tuple[dict[str, Mask], dict[str, int]]:
    """Returns masks on all spaces that can be pruned, as `with_masks` places them, and the blocks of their layers."""
    by_map, by_layer = dict(learn.block_by_map), dict(learn.block_by_layer)
    check_rules(by_layer, graph.layers, "layer (learn.block_by_layer)")

    def block_of(name: str) -> int:
        side = graph.layers[name].in_size[:1]
        return by_layer.get(name, by_map.get(side[0] if side else 1, learn.block))

    masks = masks_on_spaces(graph, _chosen(graph.layers, learn), block_of)
    return masks, wrapped_blocks(graph, masks)


def _classifiers(graph: Graph) -> list[str]:
    """Returns the names of the dense layers whose output is the network's result."""
    read = {layer.source for layer in graph.layers.values()}
    return [
        layer.name
        for layer in graph.layers.values()
        if layer.kind == "dense" and not layer.in_size and layer.target not in read
    ]


def _chosen(wrappable: Collection[str], learn: LearnConfig) -> frozenset[str]:
    """Returns the layers that `learn.include` and `learn.exclude` allow to be pruned.

    Raises:
      ValueError: if a rule fits no layer, or the rules leave none.
    """
    if not wrappable:
        # One config may serve several networks, so rules are no mistake where a network has nothing to prune.
        return frozenset()
    names = list(wrappable)
    for field in ("include", "exclude"):
        check_rules(getattr(learn, field), names, f"layer that can have masks (learn.{field})")
    left = frozenset(chosen(names, learn.include, learn.exclude))
    if not left:
        raise ValueError(f"learn.include and learn.exclude leave none of the {len(names)} layers that can have masks")
    return left


def remasked(network: MaskedGraph, learn: LearnConfig) -> MaskedGraph:
    """Returns the same graph with masks by the blocks, sides and tying of `learn`.

    Raises:
      ValueError: if a block is larger than its map, or a setting names a map or layer that does not exist.
    """
    blocks = layer_blocks(
        network.graph, network.blocks, learn.block, dict(learn.block_by_map), dict(learn.block_by_layer)
    )
    masks = place_masks(network.graph, blocks, learn.sides, learn.tied)
    return dataclasses.replace(network, blocks=blocks, masks=masks, levels=learn.counts_below_whole)


def graph_variables(network: MaskedGraph, params: Any, batch_stats: Any) -> dict[str, Any]:
    """Makes the variables that the graph of `trace_network` takes.

    Args:
      network: the graph, with the mean and the standard deviation of its images.
      params: the module's parameters.
      batch_stats: the module's running averages.

    Returns:
      The module's collections, and the scaling of images.
    """
    channels = network.input_shape[-1]
    mean, std = network.input_mean or (0.0,) * channels, network.input_std or (1.0,) * channels
    collections = {"params": params, "batch_stats": batch_stats}
    return {**collections, IMAGE_SCALING: {"mean": jnp.asarray(mean), "std": jnp.asarray(std)}}
