"""A channel graph as a table that a person reads: every layer, what it costs, and whether it can be pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdjax.graph.masks import Mask
    from fdjax.graph.network import Graph, Layer

_HEADINGS = ("layer", "kind", "map", "channels", "MACs", "writes space", "masks")


def graph_table(graph: Graph, masks: Mapping[str, Mask] | None = None) -> str:
    """The layers of a graph, one a line, with MACs in thousands and shares of the whole.

    Args:
      graph: of the network.
      masks: path -> mask, where masks have been placed. Without them the last column says what could be masked.
    """
    total = sum(layer.dense_macs for layer in graph.layers.values()) or 1
    rows: list[tuple[str, ...]] = [_HEADINGS]
    for name, layer in graph.layers.items():
        share = f"{layer.dense_macs / 1e3:,.0f}k {layer.dense_macs / total:4.0%}"
        size = "x".join(map(str, layer.out_size)) or "-"
        said = _could_be(graph, layer) if masks is None else _masks_of(name, masks)
        channels = f"{layer.in_channels} -> {layer.out_channels}"
        rows.append((name, _kind_of(layer), size, channels, share, layer.target, said))
    widths = [max(len(row[at]) for row in rows) for at in range(len(_HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    pinned = [f"  {space.name}: {space.pinned}" for space in graph.spaces.values() if space.pinned is not None]
    opaque = [f"  {reason}" for reason in dict.fromkeys(graph.walk.opaque.values())]
    lines.append(f"{len(graph.layers)} layers, {total:,} MACs an image")
    if masks is not None:
        channels = sum(mask.channels for mask in masks.values())
        lines.append(f"{len(masks)} masks of {channels:,} channels")
    if pinned:
        lines += ["spaces whose channels stay:", *pinned]
    if opaque:
        lines += ["operations that are not understood, whose channels stay:", *opaque]
    return "\n".join(lines)


def _kind_of(layer: Layer) -> str:
    if layer.kind in ("pointwise", "dense"):
        return layer.kind
    window = "x".join(map(str, layer.window))
    groups = f", {layer.groups} groups" if layer.groups > 1 and layer.kind != "depthwise" else ""
    stride = f", stride {layer.stride[0]}" if any(step > 1 for step in layer.stride) else ""
    return f"{layer.kind} {window}{stride}{groups}"


def _could_be(graph: Graph, layer: Layer) -> str:
    problem = mask_problem(layer)
    if problem is not None:
        return f"none: {problem}"
    whole = "whole channels" if len(layer.in_size) != 2 else "any block"
    space = graph.spaces[layer.target]
    tied = ", tied to its reader" if space.is_run and mask_problem(graph.layers[space.readers[0]]) is None else ""
    return f"yes: {whole}{tied}"


def mask_problem(layer: Layer) -> str | None:
    """Why a layer has no masks of its own; None where it can have them."""
    if layer.kind == "depthwise":
        return "goes with the channels that it works on"
    if not layer.in_size:
        return "reads vectors"
    if layer.kind == "conv":
        return "mixes channels and pixels"
    return None


def _masks_of(name: str, masks: Mapping[str, Mask]) -> str:
    found = [mask for mask in masks.values() if any(layer == name for layer, _ in mask.sides)]
    parts = []
    for mask in found:
        sides = " and ".join(side for layer, side in mask.sides if layer == name)
        how = "whole channels" if mask.block == 1 else f"blocks of {mask.block}"
        parts.append(f"{sides}, {how}" + (f", as {mask.path}" if mask.tied else ""))
    return "; ".join(parts) or "none"
