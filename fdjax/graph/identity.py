"""Identities of channels: which channel numbers are one channel, where a value has channels, and what mixes them."""

from __future__ import annotations

import dataclasses

import numpy as np

Ids = np.ndarray


class Classes:
    """Union-find over channel numbers, vectorised over arrays."""

    def __init__(self) -> None:
        self._parents = np.zeros(0, np.int64)

    def fresh(self, count: int) -> Ids:
        """Makes new channels.

        Args:
          count: how many.

        Returns:
          Their numbers, int [count].
        """
        made = np.arange(len(self._parents), len(self._parents) + count)
        self._parents = np.concatenate([self._parents, made])
        return made

    def find(self, ids: Ids) -> Ids:
        """Returns the representative of each channel.

        Args:
          ids: channel numbers, int [channels].

        Returns:
          int [channels]; channels with equal numbers are one channel.
        """
        found = self._parents[ids]
        while True:
            above = self._parents[found]
            if np.array_equal(above, found):
                self._parents[ids] = found
                return found
            found = above

    def join(self, first: Ids, second: Ids) -> None:
        """Makes pairs of channels one channel each.

        Args:
          first: channel numbers, int [channels].
          second: channel numbers, int [channels].
        """
        while True:
            one, other = self.find(first), self.find(second)
            differ = one != other
            if not differ.any():
                return
            low, high = np.minimum(one, other)[differ], np.maximum(one, other)[differ]
            # A channel that is joined to several others joins the lowest first, and the rest in the next iterations.
            np.minimum.at(self._parents, high, low)


@dataclasses.dataclass(frozen=True)
class Live:
    """The channels of a value that depends on an image: their axis and numbers, or None where it has no channels."""

    axis: int | None
    ids: Ids | None


@dataclasses.dataclass(frozen=True)
class Mixing:
    """An operation that applies a kernel to a value with channels, before the layer has a name.

    Attributes:
      operation: index of the operation.
      kind: "conv", "depthwise" or "dense".
      kernel: path of the kernel among the variables, or "".
      value: the input that has channels.
      reads: channel numbers of the input.
      writes: channel numbers of the output; for "depthwise", those of the input.
      in_size: the input's axes other than batch and channels: (H, W) of a map, () of a vector.
      out_size: the same axes of the output.
      window: size of the window along these axes.
      stride: stride along these axes.
      groups: number of groups of a convolution.
      in_place: whether a window of one pixel reads the pixel where it writes: no padding, no spread input.
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
    in_place: bool = True
