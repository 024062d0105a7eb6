"""Which channels live under hard masks, as far as a count looks at it: those of inner spaces.

A space is inner where it has one writer and one reader, the channels of one are those of the other, and something
without masks works on it in between: a depthwise layer, or a layer that is not wrapped and itself lies between two such
spaces (a 3x3 convolution between two pointwise ones). A channel of an inner space is dead if its writer makes nothing
of it or its reader reads nothing of it: what is left of it does not depend on the image (a constant, different at the
borders) and folds into what follows. Where a mask sits on a space, it says itself which channels are dead. Other spaces
are counted as they are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from fdjax.graph.masks import Counts, MaskedGraph
from fdjax.graph.network import Layer, Space


@dataclasses.dataclass(frozen=True, eq=False)
class InnerSpace:
    """One inner space. Its channels are numbered in the order in which the writer makes them.

    Attributes:
      name: of the space.
      writer: the layer that writes it.
      reader: the layer that reads it.
      depthwise: the depthwise layers on it.
      order: [channels], which channel each input of the reader is; None: in order.
    """

    name: str
    writer: Layer
    reader: Layer
    depthwise: tuple[Layer, ...]
    order: np.ndarray | None

    def to_reader(self, values):
        """Values by channel on the last axis, in the reader's order."""
        return values if self.order is None else values[..., self.order]

    def of_reader(self, values):
        """Values in the reader's order on the last axis, by channel."""
        return values if self.order is None else values[..., np.argsort(self.order)]

    def places(self, layer: Layer) -> np.ndarray | None:
        """Which channels a depthwise layer works on; None: all."""
        if len(layer.reads) == len(self.writer.writes):
            return None
        return np.flatnonzero(np.isin(self.writer.writes, layer.reads))


@functools.lru_cache(maxsize=16)
def inner_spaces(network: MaskedGraph) -> Mapping[str, InnerSpace]:
    """Name -> inner space, in the order in which they are written."""
    runs = {space.name: _run(network, space) for space in network.spaces.values() if space.is_run}
    found = {name: run for name, run in runs.items() if run is not None}
    middle = {
        name
        for name, layer in network.layers.items()
        if layer.mixes and name not in network.blocks and layer.source in found and layer.target in found
    }
    return {
        name: run
        for name, run in found.items()
        if run.depthwise or run.writer.name in middle or run.reader.name in middle
    }


@functools.lru_cache(maxsize=16)
def middle_layers(network: MaskedGraph) -> Mapping[str, Layer]:
    """The layers that are not wrapped and lie between two inner spaces."""
    inner = inner_spaces(network)
    return {
        name: layer
        for name, layer in network.layers.items()
        if layer.mixes and name not in network.blocks and layer.source in inner and layer.target in inner
    }


def _run(network: MaskedGraph, space: Space) -> InnerSpace | None:
    """A run whose writer makes just the channels that its reader reads, each once."""
    writer, reader = network.layers[space.writers[0]], network.layers[space.readers[0]]
    made, read = np.sort(writer.writes), np.sort(reader.reads)
    if not (np.array_equal(made, space.channels) and np.array_equal(read, space.channels)):
        return None
    order = None
    if not np.array_equal(writer.writes, reader.reads):
        order = np.argsort(writer.writes)[np.searchsorted(made, reader.reads)]
    depthwise = tuple(network.layers[name] for name in space.depthwise)
    return InnerSpace(space.name, writer, reader, depthwise, order)


class Alive:
    """Which channels of a network's inner spaces live under hard masks; found out when asked for."""

    def __init__(self, network: MaskedGraph, counts: Counts):
        self._network, self._counts = network, counts
        self._inner = inner_spaces(network)
        self._found: dict[str, np.ndarray] = {}

    def channels(self, space: str) -> np.ndarray:
        """bool [channels] of an inner space."""
        if space not in self._found:
            network, run = self._network, self._inner[space]
            alive = network.side_counts(self._counts, run.writer.name, "output") > 0
            alive = alive & run.of_reader(network.side_counts(self._counts, run.reader.name, "input") > 0)
            if run.reader.name not in network.blocks and run.reader.target in self._inner:
                groups = self.groups_read(run.reader)
                alive &= run.of_reader(np.repeat(groups, run.reader.in_channels // len(groups)))
            self._found[space] = alive
        return self._found[space]

    def groups_read(self, middle: Layer) -> np.ndarray:
        """[groups], whether anything of a group's outputs is read."""
        return np.any(self.channels(middle.target).reshape(middle.groups, -1), axis=1)

    def sides(self, layer: str) -> tuple[np.ndarray, np.ndarray]:
        """Kept counts (input [C], output [D]) of a layer that mixes, with dead channels dead on both ends."""
        network, found = self._network, self._network.layers[layer]
        inputs, outputs = (network.side_counts(self._counts, layer, side) for side in ("input", "output"))
        if found.source is not None and found.source in self._inner:
            inputs = np.where(self._inner[found.source].to_reader(self.channels(found.source)), inputs, 0)
        if found.target in self._inner:
            outputs = np.where(self.channels(found.target), outputs, 0)
        return inputs, outputs
