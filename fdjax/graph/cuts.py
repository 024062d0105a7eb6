"""Masks that can cut a network in two: without the channels of such a mask, the output is constant."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fdjax.graph.masks import Mask
from fdjax.graph.network import Graph


def cutting_masks(graph: Graph, masks: Mapping[str, Mask]) -> frozenset[str]:
    """Returns the paths of the masks that no connection bypasses, such as those of a chain of layers.

    If a residual connection bypasses a mask, the network still has a path from the image to its output without it.

    Args:
      graph: the network.
      masks: path -> mask.

    Returns:
      Paths of masks.
    """
    return frozenset(path for path, mask in masks.items() if not _answers_without(graph, {n for n, _ in mask.sides}))


def _answers_without(graph: Graph, layers: Collection[str]) -> bool:
    """Returns whether a path of operations from the images to an output avoids the given layers."""
    operations = graph.operations
    blocked = {graph.layers[name].operation for name in layers}
    reached = set(operations.images)
    for index, operation in enumerate(operations.operations):
        if index not in blocked and not reached.isdisjoint(operation.inputs):
            reached.update(operation.outputs)
    return not reached.isdisjoint(operations.outputs)
