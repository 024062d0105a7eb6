"""What of a channel graph can have masks, and why not: layers of their own, and spaces."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdjax.graph.network import Graph, Layer, Space


def mask_problem(layer: Layer) -> str | None:
    """Why a layer cannot be wrapped in a DCT and its inverse, and have masks of its own; None where it can."""
    if layer.kind == "depthwise":
        return "goes with the channels that it works on"
    if not layer.in_size:
        return "reads vectors"
    if layer.kind == "conv":
        if any(side > 1 for side in layer.window):
            return "mixes channels and pixels"
        return "has groups of channels" if layer.groups > 1 else "has a stride"
    return None


def space_problem(space: Space) -> str | None:
    """Why the channels of a space stay; None where they can be pruned."""
    if space.pinned is not None:
        return space.pinned
    if not space.writers:
        return "no layer writes it"
    if not space.readers:
        return "no layer reads it"
    return None


def whole_channels_only(graph: Graph, space: Space, streams: bool = False) -> str | None:
    """Why whole channels of a space can be pruned, and levels between 0 and N not; None where they can.

    Args:
      graph: that the space is of.
      space: that can be pruned.
      streams: whether a space may have several writers or readers.
    """
    for name in (*space.writers, *space.readers):
        problem = mask_problem(graph.layers[name])
        if problem is not None:
            return f"{name} {problem}"
        if len(graph.layers[name].in_size) != 2:
            return f"{name} works on tokens, whose grid is not given"
    return None if streams or space.is_run else "several layers write or read it"
