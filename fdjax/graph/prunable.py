"""Which layers and spaces of a channel graph can have masks, and why others cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdjax.graph.network import Graph, Layer, Space


def mask_problem(layer: Layer) -> str | None:
    """Returns why a layer cannot be wrapped in a DCT and have masks of its own, or None if it can."""
    if layer.kind == "depthwise":
        return "has the masks of the channels that it works on"
    if layer.constant:
        return "has a constant of the function as its kernel"
    if not layer.in_size:
        return "reads vectors"
    if layer.kind == "conv":
        if any(side > 1 for side in layer.window):
            return "mixes channels and pixels"
        return "has groups of channels" if layer.groups > 1 else "has a stride or padding"
    return None


def space_problem(space: Space) -> str | None:
    """Returns why the channels of a space cannot be pruned, or None if they can."""
    if space.pinned is not None:
        return space.pinned
    if not space.writers:
        return "no layer writes it"
    if not space.readers:
        return "no layer reads it"
    return None


def whole_channels_only(graph: Graph, space: Space, streams: bool = False) -> str | None:
    """Returns why a space can be pruned by whole channels only, or None if levels between 0 and N are possible.

    Args:
      graph: the network.
      space: a space that can be pruned.
      streams: whether a space with several writers or readers may have levels.
    """
    for name in (*space.writers, *space.readers):
        problem = mask_problem(graph.layers[name])
        if problem is not None:
            return f"{name} {problem}"
        if len(graph.layers[name].in_size) != 2:
            return f"{name} works on tokens, and no grid is given for them"
    return None if streams or space.is_run else "several layers write or read it"
