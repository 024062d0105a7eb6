"""Masks for any network: which of its layers get them, by the paths of the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import jax
import jax.numpy as jnp

from fdjax.graph.masks import MaskedGraph, place_masks
from fdjax.graph.network import Graph
from fdjax.graph.table import mask_problem


def with_masks(
    graph: Graph,
    *,
    block: int = 1,
    block_by_layer: Mapping[str, int] | None = None,
    levels: Sequence[int] | None = None,
    tied: bool = True,
    sides: Literal["both", "input", "output"] = "both",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    floor: Mapping[str, int] | None = None,
    name: str = "network",
) -> MaskedGraph:
    """Places masks on the pointwise layers of a network.

    A pointwise layer is a 1x1 convolution with stride 1, or a dense product on the last axis of maps or tokens. Rules
    name layers by their paths, as `print(graph)` shows them, with the wildcards of `fnmatch`: "stem/*", "*/shortcut".

    Args:
      graph: of `trace`.
      block: K, the side of the DCT's blocks; 1: whole channels, without a transform.
      block_by_layer: rule -> K where it differs; of several that fit, the last.
      levels: kept counts below N that masks fade between and are rounded to; None: all.
      tied: where a pointwise layer writes a space that one other pointwise layer reads, the two share one mask.
      sides: which sides of other layers have masks.
      include: only layers that fit one of these rules have masks.
      exclude: layers that fit one of these have none.
      floor: rule -> how many channels at least keep something on each masked side of such layers.
      name: of the network, for tables and files.

    Raises:
      ValueError: a rule that fits no layer, a block larger than its map, or a network without a layer for masks; the
        message says what was found.
    """
    wrappable = {name: layer for name, layer in graph.layers.items() if mask_problem(layer) is None}
    if not wrappable:
        found = "; ".join(f"{name}: {mask_problem(layer)}" for name, layer in list(graph.layers.items())[:5])
        raise ValueError(f"the network has no layer that masks could go on ({found or 'it has no layers at all'})")
    by_layer, floors = dict(block_by_layer or {}), dict(floor or {})
    for rule in (*include, *exclude, *by_layer, *floors):
        if not any(fnmatchcase(layer, rule) for layer in wrappable):
            raise ValueError(f"the rule {rule!r} fits no layer that can have masks; these are {', '.join(wrappable)}")
    chosen = [
        layer
        for layer in wrappable
        if any(fnmatchcase(layer, rule) for rule in include) and not any(fnmatchcase(layer, rule) for rule in exclude)
    ]
    if not chosen:
        raise ValueError("the rules exclude every layer that could have masks")
    blocks = {}
    for layer in chosen:
        blocks[layer] = next((k for rule, k in reversed(by_layer.items()) if fnmatchcase(layer, rule)), block)
        size = graph.layers[layer].in_size
        if blocks[layer] > 1 and (len(size) != 2 or blocks[layer] > min(size)):
            raise ValueError(
                f"block {blocks[layer]} does not fit the {'x'.join(map(str, size))} map of layer {layer}; give it "
                "another one (block_by_layer), 1 for whole channels"
            )
    masks = place_masks(graph, blocks, sides, tied, every_run=True)
    kept = {
        path: max((n for rule, n in floors.items() for layer, _ in mask.sides if fnmatchcase(layer, rule)), default=0)
        for path, mask in masks.items()
    }
    for path, count in kept.items():
        if count > masks[path].channels:
            raise ValueError(f"a floor of {count} channels is more than the {masks[path].channels} of mask {path}")
    outputs = [graph.operations.shapes[value] for value in graph.operations.outputs]
    return MaskedGraph(
        name=name,
        graph=graph,
        masks=masks,
        blocks=blocks,
        num_classes=outputs[0][-1] if outputs and outputs[0] else 0,
        levels=None if levels is None else tuple(sorted(levels)),
        floors={path: count for path, count in kept.items() if count},
    )


def init_fcmask(graph: MaskedGraph) -> dict[str, jax.Array]:
    """The collection of FCMasks of a network in which nothing is pruned: path -> ones [channels]."""
    return {path: jnp.ones(mask.channels) for path, mask in graph.masks.items()}
