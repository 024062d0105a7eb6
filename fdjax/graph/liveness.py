"""Which channels of inner spaces are alive under hard masks; MAC counts depend on it.

A space is inner if it has one writer and one reader, if the reader reads exactly the channels that the writer writes,
and if a layer without masks works on it in between: a depthwise layer, or a layer that is not wrapped and itself lies
between two such spaces (a 3x3 convolution between two pointwise ones). A channel of an inner space is dead if its
writer masks it away or its reader does not read it. What remains of a dead channel does not depend on the image (it is
a constant that differs at the borders) and folds into the next layer. Where a mask sits on a space, the mask itself
says which channels are dead. All channels of other spaces count.
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
    """An inner space, with channels numbered in the order in which the writer makes them.

    Attributes:
      name: name of the space.
      writer: the layer that writes it.
      reader: the layer that reads it.
      depthwise: the depthwise layers on it.
      order: [channels], the channel of each input of the reader; None if they are in order.
    """

    name: str
    writer: Layer
    reader: Layer
    depthwise: tuple[Layer, ...]
    order: np.ndarray | None

    def to_reader(self, values):
        """Reorders values [..., channels] into the reader's order."""
        return values if self.order is None else values[..., self.order]

    def of_reader(self, values):
        """Reorders values [..., channels] from the reader's order into the writer's."""
        return values if self.order is None else values[..., np.argsort(self.order)]

    def places(self, layer: Layer) -> np.ndarray | None:
        """Finds the channels that a depthwise layer works on.

        Args:
          layer: a depthwise layer of this space.

        Returns:
          Their indices, int [channels of the layer]; None for all.
        """
        if len(layer.reads) == len(self.writer.writes):
            return None
        return np.flatnonzero(np.isin(self.writer.writes, layer.reads))


@functools.lru_cache(maxsize=16)
def inner_spaces(network: MaskedGraph) -> Mapping[str, InnerSpace]:
    """Returns name -> inner space, in the order in which the spaces are written."""
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
    """Returns the layers that are not wrapped and lie between two inner spaces, by name."""
    inner = inner_spaces(network)
    return {
        name: layer
        for name, layer in network.layers.items()
        if layer.mixes and name not in network.blocks and layer.source in inner and layer.target in inner
    }


def _run(network: MaskedGraph, space: Space) -> InnerSpace | None:
    """Returns a run as an inner space if its reader reads each channel that its writer makes exactly once."""
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
    """The channels of inner spaces that are alive under hard masks, computed on demand."""

    def __init__(self, network: MaskedGraph, counts: Counts):
        self._network, self._counts = network, counts
        self._inner = inner_spaces(network)
        self._found: dict[str, np.ndarray] = {}

    def channels(self, space: str) -> np.ndarray:
        """Finds the channels of an inner space that are alive.

        Args:
          space: name of the space.

        Returns:
          bool [channels].
        """
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
        """Finds the groups of a layer whose outputs are read.

        Args:
          middle: a layer between two inner spaces.

        Returns:
          bool [groups].
        """
        return np.any(self.channels(middle.target).reshape(middle.groups, -1), axis=1)

    def sides(self, layer: str) -> tuple[np.ndarray, np.ndarray]:
        """Computes the kept counts of a layer that mixes channels, with dead channels set to 0 on both sides.

        Args:
          layer: name of the layer.

        Returns:
          (input counts [C], output counts [D]).
        """
        network, found = self._network, self._network.layers[layer]
        inputs, outputs = (network.side_counts(self._counts, layer, side) for side in ("input", "output"))
        if found.source is not None and found.source in self._inner:
            inputs = np.where(self._inner[found.source].to_reader(self.channels(found.source)), inputs, 0)
        if found.target in self._inner:
            outputs = np.where(self.channels(found.target), outputs, 0)
        return inputs, outputs
