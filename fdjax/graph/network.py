"""The channel graph: layers, spaces, and runs.

A layer mixes channels: it reads one space and writes another. All maps that have the same channels lie in one space. If
a space has one writer and one reader, what lies between the two is a run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from fdjax.graph.channels import ChannelWalk
from fdjax.graph.identity import Mixing
from fdjax.graph.operations import Operations
from fdjax.graph.table import graph_table
from fdjax.graph.trace import trace as trace_operations

Kind = Literal["conv", "pointwise", "depthwise", "dense"]
# Parts of a path that carry no information: the kernel's own name, and the collection of the parameters.
_KERNEL_NAMES = ("kernel", "weight", "w")
_COLLECTIONS = ("params",)


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One layer.

    Attributes:
      name: path of its kernel without the collection and the kernel's own name, such as "block03/expand".
      kind: "conv" (any window), "pointwise", "depthwise", or "dense" (on vectors).
      operation: index in the graph's operations.
      in_size: (H, W) of the input; () for vectors, (tokens,) for tokens.
      out_size: (H', W') of the output, in the same form.
      in_channels: C.
      out_channels: D.
      window: size of the window along the axes of `in_size`.
      stride: stride along the same axes.
      groups: number of groups of a convolution.
      reads: channel numbers of the input, [C]; equal numbers are one channel.
      writes: channel numbers of the output, [D].
      source: the space that the layer reads; None if its channels are of several spaces.
      target: the space that the layer writes.
      constant: whether the kernel is a constant of the function, which masks cannot find.
    """

    name: str
    kind: Kind
    operation: int
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    in_channels: int
    out_channels: int
    window: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    reads: np.ndarray
    writes: np.ndarray
    source: str | None
    target: str
    constant: bool = False

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates of the layer without pruning."""
        inputs = 1 if self.kind == "depthwise" else self.in_channels // self.groups
        return math.prod(self.out_size) * inputs * self.out_channels * math.prod(self.window)

    @property
    def mixes(self) -> bool:
        """Whether the layer reads one space and writes another; a depthwise layer does not."""
        return self.kind != "depthwise"


@dataclasses.dataclass(frozen=True, eq=False)
class Space:
    """Channels that belong together.

    Attributes:
      name: name of the first layer that writes the space, or "images".
      channels: channel numbers, in the order of the first map that has them.
      writers: names of the layers that write the space.
      readers: names of the layers that read it.
      depthwise: names of the depthwise layers on it.
      pinned: why the space may not be pruned, or None.
    """

    name: str
    channels: np.ndarray
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    depthwise: tuple[str, ...]
    pinned: str | None

    @property
    def is_run(self) -> bool:
        """Whether the space lies between one writer and one reader."""
        return self.pinned is None and len(self.writers) == 1 and len(self.readers) == 1


class Graph:
    """A network as data, made by `trace`.

    Attributes:
      operations: all operations of the network.
      walk: the identities of the channels.
    """

    def __init__(self, operations: Operations):
        self.operations = operations
        self.walk = ChannelWalk(operations)

    def to_dict(self) -> dict[str, Any]:
        """Returns the graph in plain JSON types, which `from_dict` reads.

        Raises:
          ValueError: an operation has no JSON form.
        """
        return self.operations.to_dict()

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Graph:
        """Reads a graph that `to_dict` wrote.

        Args:
          fields: the result of `to_dict`, possibly after a round trip through JSON.

        Returns:
          The graph.

        Raises:
          ValueError: the fields do not describe a graph, or are of a newer format.
        """
        return cls(Operations.from_dict(fields))

    def __str__(self) -> str:
        return graph_table(self)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(H, W, C) of one image."""
        return self.operations.shapes[self.operations.images[0]][1:]

    @property
    def product_macs(self) -> int:
        """MACs of the products that belong to no layer, such as those of attention, for one image."""
        return self.walk.product_macs // self.walk.batch

    @functools.cached_property
    def layers(self) -> dict[str, Layer]:
        """Name -> layer, in the order of evaluation."""
        spaces_of = self._space_of_class
        found: dict[str, Layer] = {}
        for mixing in self.walk.mixing:
            name = _unique(layer_name(mixing.kernel), found)
            reads, writes = (self.walk.classes.find(ids) for ids in (mixing.reads, mixing.writes))
            sources = {spaces_of[channel] for channel in reads.tolist()}
            found[name] = Layer(
                name=name,
                kind=_kind(mixing),
                operation=mixing.operation,
                in_size=mixing.in_size,
                out_size=mixing.out_size,
                in_channels=len(reads),
                out_channels=len(writes),
                window=mixing.window,
                stride=mixing.stride,
                groups=mixing.groups,
                reads=reads,
                writes=writes,
                source=self._space_names[sources.pop()] if len(sources) == 1 else None,
                target=self._space_names[spaces_of[int(writes[0])]],
                constant=not mixing.kernel,
            )
        return found

    @functools.cached_property
    def _space_of_class(self) -> dict[int, int]:
        """Channel -> number of its space. Channels that are written together, or joined to such, are in one space."""
        walk = self.walk
        groups = [walk.live[image].ids for image in walk.operations.images]
        groups += [mixing.writes for mixing in walk.mixing if mixing.kind != "depthwise"]
        groups += [live.ids for live in walk.live.values()]
        space: dict[int, int] = {}
        parents: list[int] = []

        def root(number: int) -> int:
            while parents[number] != number:
                number = parents[number]
            return number

        first_pass = len(groups) - len(walk.live)
        for at, ids in enumerate(groups):
            if ids is None or not len(ids):
                continue
            channels = np.unique(walk.classes.find(ids)).tolist()
            known = [channel for channel in channels if channel in space]
            # Channels that no layer writes (padding, constants, operations not understood) join the space they meet.
            if at >= first_pass and len(known) == len(channels):
                continue
            number = len(parents)
            parents.append(number)
            if at < first_pass:
                for channel in known:
                    parents[root(space[channel])] = number
            elif known:
                parents[number] = root(space[known[0]])
            for channel in channels:
                if channel not in space:
                    space[channel] = number
        return {channel: root(number) for channel, number in space.items()}

    @functools.cached_property
    def _space_names(self) -> dict[int, str]:
        """Number of a space -> its name, which is that of its first writer."""
        names: dict[int, str] = {}
        taken: Counter[str] = Counter()
        for image in self.walk.operations.images:
            ids = self.walk.live[image].ids
            if ids is not None and len(ids):
                number = self._space_of_class[int(self.walk.classes.find(ids[:1])[0])]
                names.setdefault(number, "images")
        for mixing in self.walk.mixing:
            if mixing.kind != "depthwise":
                number = self._space_of_class[int(self.walk.classes.find(mixing.writes[:1])[0])]
                if number not in names:
                    name = layer_name(mixing.kernel)
                    taken[name] += 1
                    names[number] = name if taken[name] == 1 else f"{name}#{taken[name]}"
        for number in self._space_of_class.values():
            names.setdefault(number, f"values#{number}")
        return names

    @functools.cached_property
    def spaces(self) -> dict[str, Space]:
        """Space name -> space, in the order in which the spaces are first written."""
        walk, members = self.walk, {}
        for channel, number in sorted(self._space_of_class.items()):
            members.setdefault(self._space_names[number], []).append(channel)
        pinned: dict[str, str] = {}
        for channel, reason in walk.pinned.items():
            root = int(walk.classes.find(np.array([channel]))[0])
            if root in self._space_of_class:
                pinned.setdefault(self._space_names[self._space_of_class[root]], reason)
        roles: dict[str, tuple[list[str], list[str], list[str]]] = {name: ([], [], []) for name in members}
        for layer in self.layers.values():
            if not layer.mixes:
                roles[layer.target][2].append(layer.name)
                continue
            roles[layer.target][0].append(layer.name)
            for channel in np.unique(layer.reads).tolist():
                name = self._space_names[self._space_of_class[channel]]
                if layer.name not in roles[name][1]:
                    roles[name][1].append(layer.name)
        return {
            name: Space(
                name,
                np.array(channels),
                tuple(roles[name][0]),
                tuple(roles[name][1]),
                tuple(roles[name][2]),
                pinned.get(name),
            )
            for name, channels in members.items()
        }


def trace(apply: Callable[..., Any], variables: Any, *images: Any) -> Graph:
    """Traces a network into its channel graph.

    Args:
      apply: the network at inference, `apply(variables, *images)`: any function made of JAX operations.
      variables: a pytree of arrays or `jax.ShapeDtypeStruct`.
      *images: arrays or `jax.ShapeDtypeStruct`, [B, ..., C]: batch first, channels last.

    Returns:
      The graph. `print(graph)` lists the layers, what can be pruned, and why the rest cannot.

    Raises:
      ValueError: the function does not accept the images.
    """
    return Graph(trace_operations(apply, variables, *images))


def layer_name(kernel: str) -> str:
    """Returns the name of the layer of a kernel: its path without the collection and the kernel's own name."""
    parts = kernel.split("/") if kernel else ["unnamed"]
    if len(parts) > 1 and parts[0] in _COLLECTIONS:
        parts = parts[1:]
    # A state of Flax NNX holds its arrays under "value"; a layer may be called that, too.
    if len(parts) > 2 and parts[-1] == "value" and parts[-2] in _KERNEL_NAMES:
        parts = parts[:-1]
    if len(parts) > 1 and parts[-1] in _KERNEL_NAMES:
        parts = parts[:-1]
    return "/".join(parts)


def _unique(name: str, taken: Mapping[str, Any]) -> str:
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}#{number}"
    return unique


def _kind(mixing: Mixing) -> Kind:
    if mixing.kind == "depthwise":
        return "depthwise"
    if not mixing.out_size:
        return "dense"
    plain = mixing.groups == 1 and mixing.in_place and all(n == 1 for n in (*mixing.window, *mixing.stride))
    return "pointwise" if plain else "conv"
