"""A channel graph as a table for people: every layer, its cost, and whether it can be pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdjax.graph.prunable import space_problem, whole_channels_only

if TYPE_CHECKING:
    from fdjax.graph.masks import MaskedGraph, Side
    from fdjax.graph.network import Graph, Layer

SIDES: tuple[Side, ...] = ("input", "output")

_HEADINGS = ("layer", "kind", "map", "channels", "MACs", "writes space", "masks")


def graph_table(graph: Graph, network: MaskedGraph | None = None) -> str:
    """Formats the layers of a graph, one per line, with MACs in thousands and as a share of the total.

    Args:
      graph: the network.
      network: the graph with its masks, once they are placed. Without it, the last column says what can be pruned.

    Returns:
      The table, and below it the spaces and operations whose channels cannot be pruned.
    """
    total = sum(layer.dense_macs for layer in graph.layers.values()) + graph.product_macs or 1
    rows: list[tuple[str, ...]] = [_HEADINGS]
    for name, layer in graph.layers.items():
        share = f"{layer.dense_macs / 1e3:,.0f}k {layer.dense_macs / total:4.0%}"
        size = "x".join(map(str, layer.out_size)) or "-"
        said = _could_be(graph, layer) if network is None else _masks_of(name, network)
        channels = f"{layer.in_channels} -> {layer.out_channels}"
        rows.append((name, _kind_of(layer), size, channels, share, layer.target, said))
    widths = [max(len(row[at]) for row in rows) for at in range(len(_HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    pinned = [f"  {space.name}: {space.pinned}" for space in graph.spaces.values() if space.pinned is not None]
    opaque = [f"  {reason}" for reason in dict.fromkeys(graph.walk.opaque.values())]
    products = f", {graph.product_macs:,} of them in products that belong to no layer" if graph.product_macs else ""
    lines.append(f"{len(graph.layers)} layers, {total:,} MACs an image{products}")
    if network is not None:
        channels = sum(mask.channels for mask in network.masks.values())
        lines.append(f"{len(network.masks)} masks of {channels:,} channels")
    if pinned:
        lines += ["spaces whose channels cannot be pruned:", *pinned]
    if opaque:
        lines += ["operations that are not understood, so that their channels cannot be pruned:", *opaque]
    return "\n".join(lines)


def _kind_of(layer: Layer) -> str:
    if layer.kind in ("pointwise", "dense"):
        return layer.kind
    window = "x".join(map(str, layer.window))
    groups = f", {layer.groups} groups" if layer.groups > 1 and layer.kind != "depthwise" else ""
    stride = f", stride {layer.stride[0]}" if any(step > 1 for step in layer.stride) else ""
    return f"{layer.kind} {window}{stride}{groups}"


def _could_be(graph: Graph, layer: Layer) -> str:
    """Says whether the channels that a layer writes can be pruned, and with which other layers."""
    space = graph.spaces[layer.target]
    if not layer.mixes:
        return f"as {layer.target}"
    if space_problem(space) is not None:
        return "none"
    whole = whole_channels_only(graph, space)
    others = [name for name in (*space.writers, *space.readers) if name != layer.name]
    ends = ", ".join(others[:2]) + (f" and {len(others) - 2} more" if len(others) > 2 else "")
    return f"{'any block' if whole is None else 'whole channels'}, with {ends}" + (f" ({whole})" if whole else "")


def _masks_of(name: str, network: MaskedGraph) -> str:
    parts = []
    for side in SIDES:
        paths = network.paths_of(name, side)
        if not paths:
            continue
        of = [network.masks[path] for path in paths]
        blocks = sorted({mask.block for mask in of})
        how = " and ".join("whole channels" if block == 1 else f"blocks of {block}" for block in blocks)
        tied = [mask.path for mask in of if mask.tied]
        more = f" and {len(tied) - 2} more" if len(tied) > 2 else ""
        parts.append(f"{side}, {how}" + (f", as {', '.join(tied[:2])}{more}" if tied else ""))
    return "; ".join(parts) or "none"
