"""The masks on a side of a layer: one mask in its own order, or several, found by the identity of the channels.

A mask on a space holds channel numbers of the graph. A layer may read channels of several such masks (after a
concatenation), and channels without a mask; the values of its side are then assembled from those of the masks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fdjax.graph.network import Graph, Layer

if TYPE_CHECKING:
    from fdjax.graph.masks import Mask, Side

# Ranges of output channels, (layer, start, stop), one after another: the form of a mask's channels in a file.
Ranges = Sequence[tuple[str, int, int]]


@dataclasses.dataclass(frozen=True, eq=False)
class SideMask:
    """The masks on one side of a layer.

    Attributes:
      paths: paths of the masks.
      index: [channels of the side], the place of each channel among the channels of all `paths` in turn; a channel
        without a mask has the place after the last. None: the one mask has the channels of the side, in order.
    """

    paths: tuple[str, ...]
    index: np.ndarray | None

    def assemble(self, values: Mapping[str, Any], whole: Any, concatenate: Any) -> Any:
        """Assembles values by channel of the side, on the last axis.

        Args:
          values: path -> values of that mask, [..., channels of the mask].
          whole: the value of a channel without a mask, [..., 1].
          concatenate: `np.concatenate`, or its equivalent for the kind of arrays at hand.

        Returns:
          [..., channels of the side].
        """
        if self.index is None:
            return values[self.paths[0]]
        return concatenate([*(values[path] for path in self.paths), whole], axis=-1)[..., self.index]


class Sides:
    """Finds the masks on the sides of a graph's layers."""

    def __init__(self, graph: Graph, masks: Mapping[str, Mask]):
        self._graph, self._masks = graph, masks
        self._own = {side: mask.path for mask in masks.values() if mask.members is None for side in mask.sides}
        self._paths = [path for path, mask in masks.items() if mask.members is not None]
        self._found: dict[tuple[str, Side], SideMask | None] = {}

    @functools.cached_property
    def _owners(self) -> tuple[np.ndarray, np.ndarray]:
        """For each channel number, the mask on a space that has it (-1 for none), and the channel's place there."""
        members = [np.asarray(self._masks[path].members) for path in self._paths]
        size = 1 + max((int(ids.max(initial=0)) for ids in members), default=0)
        owners, places = np.full(size, -1), np.zeros(size, np.int64)
        for number, ids in enumerate(members):
            owners[ids], places[ids] = number, np.arange(len(ids))
        return owners, places

    def of(self, layer: str, side: Side) -> SideMask | None:
        """Returns the masks on a side of a layer, or None; for a depthwise layer, those of its channels."""
        if (layer, side) not in self._found:
            self._found[layer, side] = self._find(layer, side)
        return self._found[layer, side]

    def _find(self, layer: str, side: Side) -> SideMask | None:
        if (layer, side) in self._own:
            return SideMask((self._own[layer, side],), None)
        found = self._graph.layers[layer]
        return self._on(found.reads if side == "input" else found.writes) if self._paths else None

    def _on(self, ids: np.ndarray) -> SideMask | None:
        owners, places = self._owners
        known = ids < len(owners)
        owner = np.where(known, owners[np.where(known, ids, 0)], -1)
        numbers = list(dict.fromkeys(owner[owner >= 0].tolist()))
        if not numbers:
            return None
        paths = tuple(self._paths[number] for number in numbers)
        sizes = [self._masks[path].channels for path in paths]
        starts = np.zeros(len(self._paths) + 1, np.int64)
        starts[numbers] = np.cumsum([0, *sizes[:-1]])
        index = np.where(owner < 0, sum(sizes), starts[owner] + np.where(owner < 0, 0, places[np.where(known, ids, 0)]))
        plain = len(paths) == 1 and np.array_equal(index, np.arange(sizes[0]))
        return SideMask(paths, None if plain else index)


def ranges_of(graph: Graph, members: Sequence[int]) -> list[tuple[str, int, int]]:
    """Describes channel numbers as ranges of the outputs of the layers that write them.

    Raises:
      ValueError: no layer writes one of the channels.
    """
    where: dict[int, tuple[str, int]] = {}
    wanted = set(members)
    for layer in graph.layers.values():
        if layer.mixes:
            for place, channel in enumerate(layer.writes.tolist()):
                if channel in wanted:
                    where.setdefault(channel, (layer.name, place))
    if len(where) < len(wanted):
        raise ValueError("the mask has channels that no layer writes")
    found: list[tuple[str, int, int]] = []
    for name, place in (where[channel] for channel in members):
        if found and found[-1][0] == name and found[-1][2] == place:
            found[-1] = (name, found[-1][1], place + 1)
        else:
            found.append((name, place, place + 1))
    return found


def members_of(layers: Mapping[str, Layer], ranges: Ranges) -> tuple[int, ...]:
    """Returns the channel numbers of ranges that `ranges_of` made.

    Raises:
      KeyError: the graph does not have one of the layers.
    """
    return tuple(channel for name, start, stop in ranges for channel in layers[name].writes[start:stop].tolist())
