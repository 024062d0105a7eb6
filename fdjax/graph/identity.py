"""Identities of channels: which numbers are one channel, where a value has its channels, and what mixes them."""

from __future__ import annotations

import dataclasses

import numpy as np

Ids = np.ndarray


class Classes:
    """Union-find over channel numbers, on whole arrays at a time."""

    def __init__(self) -> None:
        self._parents = np.zeros(0, np.int64)

    def fresh(self, count: int) -> Ids:
        """`count` new channels."""
        made = np.arange(len(self._parents), len(self._parents) + count)
        self._parents = np.concatenate([self._parents, made])
        return made

    def find(self, ids: Ids) -> Ids:
        """The representative of each channel."""
        found = self._parents[ids]
        while True:
            above = self._parents[found]
            if np.array_equal(above, found):
                self._parents[ids] = found
                return found
            found = above

    def join(self, first: Ids, second: Ids) -> None:
        """Makes channels the same, pair by pair."""
        while True:
            one, other = self.find(first), self.find(second)
            differ = one != other
            if not differ.any():
                return
            low, high = np.minimum(one, other)[differ], np.maximum(one, other)[differ]
            # A channel that is joined to several goes to the first of them; the others follow in the next round.
            np.minimum.at(self._parents, high, low)


@dataclasses.dataclass(frozen=True)
class Live:
    """A value that depends on an image: its channel axis and their numbers; None where it has no channels."""

    axis: int | None
    ids: Ids | None


@dataclasses.dataclass(frozen=True)
class Mixing:
    """An operation with a kernel on a value with channels, before it has a name.

    Attributes:
      operation: its index.
      kind: "conv", "depthwise" or "dense".
      kernel: the path of its kernel among the variables, or "".
      value: the input that has channels.
      reads: channel numbers of the input.
      writes: of the output; those of the input for "depthwise".
      in_size: the input's other axes but the batch: (H, W) of a map, () of a vector.
      out_size: likewise of the output.
      window: along these axes.
      stride: likewise.
      groups: of a conv.
    """

    operation: int
    kind: str
    kernel: str
    value: int
    reads: Ids
    writes: Ids
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
