"""Which masks can cut a network in two: with nothing left of them, its answer no longer depends on the image."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fdjax.graph.masks import Mask
from fdjax.graph.network import Graph


def cutting_masks(graph: Graph, masks: Mapping[str, Mask]) -> frozenset[str]:
    """The paths of the masks that nothing bypasses, such as those of a chain of layers.

    Where a residual connection goes around a mask, the network still answers without it.

    Args:
      graph: of the network.
      masks: path -> mask.
    """
    return frozenset(path for path, mask in masks.items() if not _answers_without(graph, {n for n, _ in mask.sides}))


def _answers_without(graph: Graph, layers: Collection[str]) -> bool:
    """Whether a path of operations from the images to an output goes around some layers."""
    operations = graph.operations
    blocked = {graph.layers[name].operation for name in layers}
    reached = set(operations.images)
    for index, operation in enumerate(operations.operations):
        if index not in blocked and not reached.isdisjoint(operation.inputs):
            reached.update(operation.outputs)
    return not reached.isdisjoint(operations.outputs)
