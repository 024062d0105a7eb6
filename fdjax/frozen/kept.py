"""Decides which channels a frozen network keeps, and their order.

A channel varies if it depends on the image, and it is needed if something reads it. Other channels are left out: those
that do not vary are constants, which are folded into later operations, and those that are not needed are not computed.
"""

from __future__ import annotations

import functools

import numpy as np

from fdjax.graph.masks import Counts, MaskedGraph, Side
from fdjax.graph.network import Layer

Ids = np.ndarray


class Kept:
    """The channels that a network with hard masks keeps.

    Args:
      network: the channel graph, with its masks.
      counts: path of each FCMask -> kept counts, int [C], 0..N.

    Raises:
      ValueError: if the counts do not fit the network.
    """

    def __init__(self, network: MaskedGraph, counts: Counts):
        for path, (channels, num_coefs) in network.mask_sizes.items():
            given = np.asarray(counts[path]) if path in counts else None
            if given is None or given.shape != (channels,) or given.min() < 0 or given.max() > num_coefs:
                raise ValueError(f"counts of {path} must be {channels} integers from 0 to {num_coefs}")
            if given.dtype != np.bool_ and not np.issubdtype(given.dtype, np.integer):
                raise ValueError(
                    f"counts of {path} must be integers from 0 to {num_coefs}, got {given.dtype}; soft masks become "
                    "counts by fdjax.harden"
                )
        self._network, self._counts = network, {path: np.asarray(counts[path], np.int64) for path in network.masks}
        self._walk = network.walk
        size = int(max(ids.max() for live in self._walk.live.values() if (ids := live.ids) is not None and len(ids)))
        self._roots = self._walk.classes.find(np.arange(size + 1))
        self._read = self._needed()
        self._present = self._varying() & self._read
        self._present |= self._pinned()
        self._complete_groups()
        self._rank = np.arange(size + 1)
        self._sort_spaces()

    def counts(self, layer: str, side: Side) -> np.ndarray:
        """Returns the kept counts of one side of a layer.

        Args:
          layer: the layer's name.
          side: "input" or "output".

        Returns:
          int [C]; on a side without masks, N for a wrapped layer, and 1 for any other.
        """
        found = self._network.layers[layer]
        if not found.mixes:
            return np.ones(found.in_channels, np.int64)
        return self._network.side_counts(self._counts, layer, side)

    def order(self, ids: Ids) -> np.ndarray:
        """Returns which channels of a value are kept.

        Args:
          ids: the channels of the value, int [C].

        Returns:
          Positions in `ids`, in the order of the frozen network, int [kept].
        """
        roots = self._roots[ids]
        places = np.flatnonzero(self._present[roots])
        return places[np.argsort(self._rank[roots[places]], kind="stable")] if self._sorted(ids) else places

    def are_read(self, ids: Ids) -> np.ndarray:
        """Returns which channels something reads that matters for the outputs.

        Args:
          ids: channels of a value, int [C].

        Returns:
          bool [C].
        """
        return self._read[self._roots[ids]]

    def _groups(self, layer: Layer) -> tuple[np.ndarray, np.ndarray]:
        """Returns the channels of each group, [groups, C / groups] and [groups, D / groups]."""
        return layer.reads.reshape(layer.groups, -1), layer.writes.reshape(layer.groups, -1)

    def _keeps(self, layer: Layer, side: Side, channels: np.ndarray) -> np.ndarray:
        """Returns for each channel of a layer's side whether its kept count is above 0, in the shape of `channels`."""
        return (self.counts(layer.name, side) > 0).reshape(channels.shape)

    def _varying(self) -> np.ndarray:
        varying = np.zeros(len(self._roots), bool)
        for image in self._walk.operations.images:
            ids = self._walk.live[image].ids
            if ids is not None:
                varying[self._roots[ids]] = True
        varying |= self._pinned_by_operations()
        for layer in self._network.layers.values():
            if layer.mixes:
                reads, writes = self._groups(layer)
                read = varying[reads] & self._keeps(layer, "input", reads)
                made = self._keeps(layer, "output", writes) & np.asarray(read.any(axis=1))[:, None]
                varying[writes[made]] = True
        return varying

    def _needed(self) -> np.ndarray:
        needed = self._pinned()
        for layer in reversed(self._network.layers.values()):
            if layer.mixes:
                reads, writes = self._groups(layer)
                made = needed[writes] & self._keeps(layer, "output", writes)
                read = self._keeps(layer, "input", reads) & np.asarray(made.any(axis=1))[:, None]
                needed[reads[read]] = True
        return needed

    def _pinned(self) -> np.ndarray:
        pinned = np.zeros(len(self._roots), bool)
        channels = np.array(list(self._walk.pinned), np.int64)
        pinned[self._roots[channels]] = True
        return pinned

    def _pinned_by_operations(self) -> np.ndarray:
        """Marks the channels that opaque operations make; these count as varying."""
        found = np.zeros(len(self._roots), bool)
        for index in self._walk.opaque:
            for value in self._walk.operations.operations[index].outputs:
                ids = self._walk.live[value].ids
                if ids is not None:
                    found[self._roots[ids]] = True
        return found

    def _complete_groups(self) -> None:
        """Adds channels so that grouped convolutions keep whole groups: those with a channel that is kept."""
        grouped = [layer for layer in self._network.layers.values() if layer.groups > 1 and layer.mixes]
        while True:
            before = int(self._present.sum())
            for layer in grouped:
                reads, writes = self._groups(layer)
                alive = self._present[writes].any(axis=1)
                self._present[reads[alive]] = True
                self._present[writes[alive]] = True
            if int(self._present.sum()) == before:
                return

    @functools.cached_property
    def _simple_spaces(self) -> frozenset[bytes]:
        """The spaces whose values all have the same channels in the same order, none of them pinned."""
        values: dict[int, set[bytes]] = {}
        members: dict[bytes, list[int]] = {}
        for live in self._walk.live.values():
            if live.ids is not None and len(live.ids):
                roots = self._roots[live.ids]
                key = roots.tobytes()
                members[key] = roots.tolist()
                for channel in members[key]:
                    values.setdefault(channel, set()).add(key)
        pinned = self._pinned()
        return frozenset(
            key
            for key, channels in members.items()
            if all(len(values[channel]) == 1 for channel in channels) and not pinned[channels].any()
        )

    def _sorted(self, ids: Ids) -> bool:
        return self._roots[ids].tobytes() in self._simple_spaces

    def _sort_spaces(self) -> None:
        """Sorts each space by the kept counts of its first reader, which then does not have to gather channels."""
        done: set[bytes] = set()
        grouped = [layer for layer in self._network.layers.values() if layer.groups > 1 and layer.mixes]
        blocked = {key for layer in grouped for key in (layer.reads.tobytes(), layer.writes.tobytes())}
        for layer in self._network.layers.values():
            key = layer.reads.tobytes()
            counts = self.counts(layer.name, "input") if layer.mixes else np.ones(1)
            if key in done or key in blocked or len(np.unique(counts)) < 2 or not self._sorted(layer.reads):
                continue
            done.add(key)
            self._rank[layer.reads[np.argsort(-counts, kind="stable")]] = np.sort(self._rank[layer.reads])
