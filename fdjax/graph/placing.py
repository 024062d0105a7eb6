"""Masks for any network: rules on the paths of layers decide which spaces or layers get masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fdjax.graph.grids import on_grids
from fdjax.graph.masks import Mask, MaskedGraph, Side, place_masks
from fdjax.graph.network import Graph, Space
from fdjax.graph.prunable import mask_problem, space_problem, whole_channels_only
from fdjax.graph.rules import ByRule, check_rules, chosen

Levels = Sequence[int] | None


def with_masks(
    graph: Graph,
    *,
    block: int | Mapping[str, int] = 1,
    levels: Levels | Mapping[str, Levels] = None,
    tied: bool = True,
    streams: Literal["channels", "levels"] = "channels",
    sides: Literal["both", "input", "output"] = "both",
    grid: tuple[int, int] | Mapping[str, tuple[int, int]] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    floor: int | Mapping[str, int] = 1,
    name: str = "network",
) -> MaskedGraph:
    """Places masks on everything in a network that can be pruned.

    A tied mask sits on a space: it masks the channels of the space in every layer that writes or reads them. If one
    pointwise layer writes the space and one reads it, the mask has the requested levels. If a convolution with a
    window, a layer on vectors, or several layers write or read it, whole channels are pruned. Spaces with pinned
    channels get no mask. Without tying, each pointwise layer has masks on its own two sides, as in the paper.

    Rules name layers by their paths, as `print(graph)` shows them, with the wildcards of `fnmatch`: `stem/*`,
    `*/shortcut`. `block`, `levels`, `grid` and `floor` take one value, or a mapping from rules to values. If several
    rules fit a layer, or one of the layers that share a mask, the last one counts.

    Args:
      graph: the network, from `trace`.
      block: the side K of the DCT's blocks, 1 to 16. 1 prunes whole channels, without a transform.
      levels: kept counts below N that masks fade between and are rounded to; None for all.
      tied: whether masks sit on spaces, rather than on the sides of pointwise layers.
      streams: for tied masks, what a space gets that several pointwise layers write or read: masks of whole channels,
        or masks with the levels.
      sides: for untied masks, which sides of a layer have masks.
      grid: (rows, columns) of the map that tokens form, such as (14, 14). It lays blocks on the products over that many
        tokens. Without it, tokens get masks of whole channels.
      include: only layers that fit one of these rules are pruned.
      exclude: layers that fit one of these rules stay whole on both sides, and so do the spaces that they write or
        read.
      floor: the least number of a layer's output channels that keep a coefficient, whatever the target; all, if the
        layer has fewer.
      name: name of the network, for tables and files.

    Returns:
      The graph with its masks.

    Raises:
      ValueError: a rule fits no layer, a block is larger than its map, a grid does not have as many places as there are
        tokens, or nothing can be pruned. The message says what was found.
    """
    grid_of = ByRule[tuple[int, int] | None](grid, None)  # type: ignore[arg-type]
    if grid is not None:
        check_rules(grid_of.rules, list(graph.layers))
        graph = on_grids(graph, grid_of.of)
    block_of, levels_of, floor_of = ByRule(block, 1), ByRule(levels, None), ByRule(floor, 1)
    names = [name for name in graph.layers if tied or mask_problem(graph.layers[name]) is None]
    if not _prunable(graph, tied):
        raise ValueError(f"the network has nothing that can be masked: {_why_nothing(graph)}")
    check_rules(
        (*include, *exclude, *block_of.rules, *levels_of.rules, *floor_of.rules),
        names,
        "layer" if tied else "layer that can have masks of its own",
    )
    layers = chosen(names, include, exclude)
    if tied:
        masks = masks_on_spaces(graph, layers, block_of.of, streams == "levels")
    else:
        blocks = {layer: fitting_block(graph, layer, block_of.of(layer)) for layer in layers}
        masks = place_masks(graph, blocks, sides)
    if not masks:
        raise ValueError(
            "the rules leave nothing to prune"
            + (": an excluded layer also keeps the spaces whole that it writes and reads" if tied else "")
        )
    by_rule = isinstance(levels, Mapping)
    masks = {path: _with_levels(mask, levels_of if by_rule else None) for path, mask in masks.items()}
    outputs = [graph.operations.shapes[value] for value in graph.operations.outputs]
    return MaskedGraph(
        name=name,
        graph=graph,
        masks=masks,
        blocks=wrapped_blocks(graph, masks),
        num_classes=outputs[0][-1] if outputs and outputs[0] else 0,
        levels=None if by_rule or levels is None else tuple(sorted(levels)),  # type: ignore[arg-type]
        floors=_floors(masks, floor_of),
    )


def _prunable(graph: Graph, tied: bool) -> list[str]:
    if tied:
        return [space.name for space in graph.spaces.values() if space_problem(space) is None]
    return [name for name, layer in graph.layers.items() if mask_problem(layer) is None]


def _why_nothing(graph: Graph, most: int = 8) -> str:
    """Lists the layers, and why their channels cannot be pruned."""
    found = []
    for name, layer in graph.layers.items():
        problem = space_problem(graph.spaces[layer.target])
        found.append(f"{name} ({layer.kind}) writes channels that cannot be pruned: {problem or mask_problem(layer)}")
    more = f"; and {len(found) - most} more" if len(found) > most else ""
    return ("; ".join(found[:most]) + more) or "it has no convolution and no product with a kernel"


def masks_on_spaces(
    graph: Graph, layers: Collection[str], block_of: Callable[[str], int], streams: bool = False
) -> dict[str, Mask]:
    """Makes a mask for every space that can be pruned and whose layers are all among `layers`.

    Args:
      graph: the network.
      layers: names of the layers that may be pruned.
      block_of: name of a pointwise layer -> K.
      streams: whether spaces that several pointwise layers write or read get the levels, rather than whole channels.

    Returns:
      Path -> mask; the paths are "SPACE/channels".

    Raises:
      ValueError: a block is larger than its map, or than 16.
    """
    inside, found = set(layers), {}
    written = {int(c) for layer in graph.layers.values() if layer.mixes for c in layer.writes}
    for space in graph.spaces.values():
        if space_problem(space) is not None or not inside.issuperset(
            (*space.writers, *space.readers, *space.depthwise)
        ):
            continue
        # Channels that no layer writes, such as those of padding, are constant and get no mask.
        members = tuple(channel for channel in _in_order(graph, space) if channel in written)
        block = _block_of_space(graph, space, block_of, streams)
        path = f"{space.name}/channels"
        found[path] = Mask(path, len(members), block, _sides_of(graph, space, members), members=members)
    return found


def _in_order(graph: Graph, space: Space) -> list[int]:
    """Returns the channels of a space, in the order in which its layers write them."""
    orders = [graph.layers[name].writes.tolist() for name in space.writers]
    return list(dict.fromkeys([*(c for order in orders for c in order), *space.channels.tolist()]))


def _sides_of(graph: Graph, space: Space, members: Sequence[int]) -> tuple[tuple[str, Side], ...]:
    own = np.asarray(members)
    read = (name for name in space.readers if np.isin(graph.layers[name].reads, own).any())
    return (*((name, "output") for name in space.writers), *((name, "input") for name in read))


def _block_of_space(graph: Graph, space: Space, block_of: Callable[[str], int], streams: bool) -> int:
    """Returns K of a space's mask; 1 means whole channels."""
    ends = (*space.writers, *space.readers)
    if whole_channels_only(graph, space, streams) is not None or len({block_of(name) for name in ends}) > 1:
        return 1
    return min(fitting_block(graph, name, block_of(name)) for name in ends)


def fitting_block(graph: Graph, layer: str, block: int) -> int:
    """Returns K of a pointwise layer: the requested block, or 1 if the layer's map has one pixel.

    Raises:
      ValueError: the block is larger than the map, or than 16.
    """
    size = graph.layers[layer].in_size
    if not 1 <= block <= 16:
        raise ValueError(f"block must be from 1 to 16, got {block}")
    if block == 1 or all(side == 1 for side in size):
        return 1
    if len(size) != 2 or block > min(size):
        raise ValueError(
            f"block {block} does not fit the {'x'.join(map(str, size))} map of layer {layer}; give the layer another "
            f'block, such as 1 for whole channels (block={{"*": {block}, "{layer}": 1}})'
            + (f", or the grid of its {size[0]} tokens (grid=(rows, columns))" if len(size) == 1 else "")
        )
    return block


def _with_levels(mask: Mask, levels_of: ByRule[Levels] | None) -> Mask:
    if levels_of is None:
        return mask
    levels = levels_of.of(*(layer for layer, _ in mask.sides))
    every = tuple(range(mask.num_coefs)) if levels is None else tuple(sorted(levels))
    return dataclasses.replace(mask, levels=every)


def wrapped_blocks(graph: Graph, masks: Mapping[str, Mask]) -> dict[str, int]:
    """Returns layer name -> K, for every pointwise layer with a mask."""
    blocks: dict[str, int] = {}
    for mask in masks.values():
        for layer, _ in mask.sides:
            if mask_problem(graph.layers[layer]) is None:
                blocks[layer] = max(blocks.get(layer, 1), mask.block)
    return {name: blocks[name] for name in graph.layers if name in blocks}


def _floors(masks: Mapping[str, Mask], floor_of: ByRule[int]) -> dict[str, int]:
    """Chooses the floor of every mask; for a mask on a space, by the layers that write it."""
    found = {}
    for path, mask in masks.items():
        layers = [layer for layer, side in mask.sides if mask.members is None or side == "output"]
        count = floor_of.of(*layers)
        if count < 0:
            raise ValueError(f"a floor must be 0 channels or more, got {count}")
        if count:
            found[path] = min(count, mask.channels)
    return found


def init_fcmask(graph: MaskedGraph) -> dict[str, jax.Array]:
    """Makes the FCMasks of an unpruned network.

    Args:
      graph: the network with its masks, from `with_masks`.

    Returns:
      The collection `fcmask`: path -> ones, [channels].
    """
    return {path: jnp.ones(mask.channels) for path, mask in graph.masks.items()}
