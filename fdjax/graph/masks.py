"""Where masks sit on a channel graph: on one side of a layer (as in the paper), or on a space (tied)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np

from fdjax.graph.channels import ChannelWalk
from fdjax.graph.network import Graph, Layer, Space
from fdjax.graph.operations import Operations
from fdjax.graph.sides import SideMask, Sides, members_of, ranges_of
from fdjax.graph.table import graph_table
from fdjax.ops.fcmask import level_counts

Side = Literal["input", "output"]
SIDES: tuple[Side, ...] = ("input", "output")
# Path of every FCMask -> kept counts [channels], 0 to N.
Counts = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Mask:
    """One FCMask.

    Attributes:
      path: path in the collection `fcmask`.
      channels: number of channels.
      block: the block size K.
      sides: the (layer, side) pairs whose coefficients it masks.
      levels: kept counts below N that the mask fades between and is rounded to; None for the network's.
      members: for a mask on a space, the graph's numbers of its channels. A side of a layer may have some of these
        channels, among others. None: the mask has the channels of each of its sides, in order.
    """

    path: str
    channels: int
    block: int
    sides: tuple[tuple[str, Side], ...]
    levels: tuple[int, ...] | None = None
    members: tuple[int, ...] | None = None

    @property
    def num_coefs(self) -> int:
        """The number of coefficients N = K*K."""
        return self.block**2

    @property
    def tied(self) -> bool:
        """Whether the mask sits on a space rather than on one side of a layer."""
        return len(self.sides) > 1


# The collection in which a traced network of `fdjax.training` has the mean and the standard deviation of its images.
IMAGE_SCALING = "input"


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedGraph:
    """A channel graph with its masks, and what else is known of the network.

    Attributes:
      name: name of the architecture.
      graph: the network at inference, without masks, from raw images in 0..255 to logits.
      masks: path -> mask, in the order of the layers.
      blocks: layer name -> K, for every layer that is wrapped in a DCT and its inverse.
      uncounted: names of the layers that no total includes.
      num_classes: number of outputs.
      input_mean: mean per input channel, in raw units 0..255; the graph subtracts it.
      input_std: standard deviation per input channel, in the same units; the graph then divides by it.
      class_names: names of the outputs, in order.
      levels: kept counts below N that masks fade between and are rounded to, unless a mask has levels of its own; None
        for all.
      floors: path of a mask -> the least number of its channels that keep a coefficient.
    """

    name: str
    graph: Graph
    masks: Mapping[str, Mask]
    blocks: Mapping[str, int]
    num_classes: int
    uncounted: frozenset[str] = frozenset()
    input_mean: tuple[float, ...] = ()
    input_std: tuple[float, ...] = ()
    class_names: tuple[str, ...] = ()
    levels: tuple[int, ...] | None = None
    floors: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return graph_table(self.graph, self)

    def to_dict(self) -> dict[str, Any]:
        """Returns the network in plain JSON types, which `from_dict` reads."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        masks = [_written(self.graph, mask) for mask in self.masks.values()]
        changed = {
            "graph": self.graph.to_dict(),
            "masks": masks,
            "blocks": dict(self.blocks),
            "uncounted": sorted(self.uncounted),
        }
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in {**fields, **changed}.items()
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> MaskedGraph:
        """Reads a network that `to_dict` wrote.

        Args:
          fields: the result of `to_dict`, possibly after a round trip through JSON.

        Returns:
          The network.

        Raises:
          ValueError: the fields do not describe a network, or are of a newer format.
        """
        try:
            graph = Graph.from_dict(fields["graph"])
            masks = [_mask(graph, *written) for written in fields["masks"]]
            made = cls(
                **{
                    **{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()},
                    "graph": graph,
                    "masks": {mask.path: mask for mask in masks},
                    "blocks": dict(fields["blocks"]),
                    "uncounted": frozenset(fields["uncounted"]),
                }
            )
            unknown = {layer for mask in masks for layer, _ in mask.sides} - set(made.layers)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"the fields do not describe a network of fdjax: {error!r}") from error
        if unknown or not set(made.blocks) <= set(made.layers):
            raise ValueError("the network is damaged: its masks name layers that it does not have")
        return made

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image."""
        height, width, channels = self.graph.input_shape
        return height, width, channels

    @property
    def operations(self) -> Operations:
        """All operations of the network."""
        return self.graph.operations

    @property
    def walk(self) -> ChannelWalk:
        """The identities of the channels."""
        return self.graph.walk

    @property
    def spaces(self) -> Mapping[str, Space]:
        """Space name -> space."""
        return self.graph.spaces

    @property
    def layers(self) -> dict[str, Layer]:
        """Layer name -> layer, in the order of evaluation."""
        return self.graph.layers

    @property
    def counted_layers(self) -> dict[str, Layer]:
        """The layers that the totals include."""
        return {name: layer for name, layer in self.layers.items() if name not in self.uncounted}

    @property
    def dense_macs(self) -> int:
        """MACs of the network without pruning: of the counted layers, and of products that belong to no layer."""
        return sum(layer.dense_macs for layer in self.counted_layers.values()) + self.graph.product_macs

    @property
    def wrapped_layers(self) -> dict[str, Layer]:
        """The layers that are wrapped in a DCT and its inverse."""
        return {name: layer for name, layer in self.layers.items() if name in self.blocks}

    @functools.cached_property
    def _sides(self) -> Sides:
        return Sides(self.graph, self.masks)

    def side(self, layer: str, side: Side) -> SideMask | None:
        """Finds the masks on a side of a layer.

        Args:
          layer: name of the layer.
          side: "input" or "output".

        Returns:
          The masks, or None if there are none. For a depthwise layer, these are the masks of its channels.
        """
        return self._sides.of(layer, side)

    def paths_of(self, layer: str, side: Side) -> tuple[str, ...]:
        """Returns the paths of the FCMasks on a side of a layer."""
        found = self.side(layer, side)
        return found.paths if found is not None else ()

    def mask_of(self, layer: str, side: Side) -> str | None:
        """Returns the path of the FCMask that has exactly the channels of a side of a layer, in order, or None."""
        found = self.side(layer, side)
        return found.paths[0] if found is not None and found.index is None else None

    def num_coefs_of(self, layer: str) -> int:
        """Returns N of a layer; 1 if the layer is not wrapped."""
        return self.blocks.get(layer, 1) ** 2

    def side_counts(self, counts: Counts, layer: str, side: Side) -> np.ndarray:
        """Computes the kept counts of a side of a layer.

        Args:
          counts: path of every FCMask -> kept counts [channels], 0 to N.
          layer: name of the layer.
          side: "input" or "output".

        Returns:
          int [C] or [D], 0 to N of the layer; N for channels without a mask.
        """
        found, num_coefs = self.side(layer, side), self.num_coefs_of(layer)
        if found is None:
            layers = self.layers[layer]
            return np.full(layers.in_channels if side == "input" else layers.out_channels, num_coefs)
        # A mask of whole channels has counts 0 and 1, which mean none or all coefficients of a wrapped layer.
        given = {path: np.asarray(counts[path]) * (num_coefs // self.masks[path].num_coefs) for path in found.paths}
        return found.assemble(given, np.full(1, num_coefs), np.concatenate)

    def levels_of(self, path: str, levels: Collection[int] | None = None) -> tuple[int, ...]:
        """Lists the kept counts that a mask may be rounded to, including 0 and N.

        Args:
          path: path of the mask.
          levels: counts below N for masks without levels of their own; None for the network's.

        Returns:
          The counts, in ascending order.
        """
        mask = self.masks[path]
        wanted = mask.levels if mask.levels is not None else self.levels if levels is None else tuple(levels)
        return level_counts(mask.num_coefs, wanted)

    @property
    def mask_sizes(self) -> dict[str, tuple[int, int]]:
        """Path of every FCMask -> (channels, N)."""
        return {path: (mask.channels, mask.num_coefs) for path, mask in self.masks.items()}

    def full_counts(self) -> dict[str, np.ndarray]:
        """Returns the counts of the unpruned network.

        Returns:
          Path of every FCMask -> int [channels], all N.
        """
        return {path: np.full(mask.channels, mask.num_coefs) for path, mask in self.masks.items()}

    def tied_runs(self) -> dict[str, Mask]:
        """Returns space name -> mask, for every run whose writer and reader share a mask."""
        found = {}
        for space in self.graph.spaces.values():
            mask = self.tied_mask(space)
            if mask is not None:
                found[space.name] = mask
        return found

    def tied_mask(self, space: Space) -> Mask | None:
        """Returns the mask that the writer and the reader of a run share, or None."""
        if not space.is_run:
            return None
        path = self.mask_of(space.writers[0], "output")
        return self.masks[path] if path is not None and path == self.mask_of(space.readers[0], "input") else None


def _written(graph: Graph, mask: Mask) -> list[Any]:
    """Returns a mask in JSON types, without the fields that are None at the end."""
    plain: list[Any] = [mask.path, mask.channels, mask.block, list(map(list, mask.sides))]
    if mask.levels is None and mask.members is None:
        return plain
    members = None if mask.members is None else list(map(list, ranges_of(graph, mask.members)))
    return [*plain, None if mask.levels is None else list(mask.levels), members]


def _mask(graph: Graph, path: str, channels: int, block: int, sides: Any, levels: Any = None, members: Any = None):
    return Mask(
        path,
        int(channels),
        int(block),
        tuple((side[0], side[1]) for side in sides),
        None if levels is None else tuple(map(int, levels)),
        None if members is None else members_of(graph.layers, members),
    )


def layer_blocks(
    graph: Graph,
    wrapped: Collection[str],
    block: int,
    by_map: Mapping[int, int] | None = None,
    by_layer: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Chooses K for every wrapped layer.

    Args:
      graph: the network.
      wrapped: names of the layers to wrap. If there are none, the other settings are not checked.
      block: the default K.
      by_map: side length of a map -> K where it differs.
      by_layer: layer name -> K where it differs; takes precedence over `by_map`.

    Returns:
      Layer name -> K.

    Raises:
      ValueError: a block is larger than its map, or a setting names a map or a layer that does not exist.
    """
    if not wrapped:
        # A config may serve several networks, and its mask settings are then for the others.
        return {}
    by_map, by_layer = dict(by_map or {}), dict(by_layer or {})
    layers = {name: layer for name, layer in graph.layers.items() if name in wrapped}
    maps = sorted({layer.in_size[0] for layer in layers.values()})
    for side in by_map:
        if side not in maps:
            raise ValueError(f"block_by_map names maps of side {side}; wrapped layers have {', '.join(map(str, maps))}")
    for name in by_layer:
        if name not in layers:
            raise ValueError(f"block_by_layer names {name!r}; wrapped layers are {', '.join(sorted(layers))}")
    found = {}
    for name, layer in layers.items():
        # A sequence of tokens is no map, and one pixel has one coefficient (squeeze-and-excite).
        default = block if len(layer.in_size) == 2 and max(layer.in_size) > 1 else 1
        found[name] = by_layer.get(name, by_map.get(layer.in_size[0], default))
        if len(layer.in_size) != 2:
            found[name] = 1
        if found[name] > min(layer.in_size):
            raise ValueError(
                f"block {found[name]} is larger than the {layer.in_size[0]}x{layer.in_size[1]} map of layer {name}; "
                f"give a block (learn.block) of at most {min(layer.in_size)}, or that map its own one "
                "(learn.block_by_map, learn.block_by_layer)"
            )
    return found


def place_masks(graph: Graph, blocks: Mapping[str, int], sides: str = "both", tied: bool = False) -> dict[str, Mask]:
    """Places masks on wrapped layers.

    Args:
      graph: the network.
      blocks: wrapped layer -> K, from `layer_blocks`.
      sides: which sides of a wrapped layer have masks of their own: "both", "input", "output" or "none".
      tied: whether the two layers of a run share one mask. They do where both are wrapped with the same K and a
        depthwise layer lies between them; they then have no masks on their outer sides.

    Returns:
      Path -> mask, in the order of the layers. A layer's own masks are named "LAYER/input" and "LAYER/output". A run's
      mask is named "MODULE/wide", after the module that holds both layers.
    """
    shared: dict[tuple[str, Side], Mask] = {}
    for space in graph.spaces.values() if tied else ():
        ends = (*space.writers, *space.readers)
        run = space.is_run and space.depthwise and all(end in blocks for end in ends)
        if run and blocks[ends[0]] == blocks[ends[1]]:
            path = f"{_common_module(*ends) or ends[0]}/wide"
            mask = Mask(path, len(space.channels), blocks[ends[0]], ((ends[0], "output"), (ends[1], "input")))
            shared.update(dict.fromkeys(mask.sides, mask))
    found: dict[str, Mask] = {}
    for name, block in blocks.items():
        layer = graph.layers[name]
        own: tuple[tuple[Side, int], ...] = (("input", layer.in_channels), ("output", layer.out_channels))
        common = [shared[name, side] for side, _ in own if (name, side) in shared]
        found.update({mask.path: mask for mask in common})
        for side, channels in own:
            if not common and sides in ("both", side):
                found[f"{name}/{side}"] = Mask(f"{name}/{side}", channels, block, ((name, side),))
    return found


def _common_module(writer: str, reader: str) -> str:
    """Returns the path of the module that holds two layers, or ""."""
    parts = []
    for a, b in zip(writer.split("/")[:-1], reader.split("/")[:-1], strict=False):
        if a != b:
            break
        parts.append(a)
    return "/".join(parts)
