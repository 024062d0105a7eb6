"""NetworkSpec: the network as data, and its MAC count.

`fdjax.zoo` makes the spec, checkpoints keep it, and counting, pruning, freezing and reports read it: none of them needs
the network itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np

from fdjax.ops import macs as ops_macs
from fdjax.ops.depthwise import conv_pads

Counts = Mapping[str, np.ndarray]
Kind = Literal["conv", "pointwise", "depthwise", "dense"]
# What is counted together, by role: a block, or a wrapped layer outside of any, by its own name.
Room = Mapping[str, "LayerSpec"]


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One layer.

    Attributes:
      name: path of its parameters, such as "block03/expand".
      kind: "conv" (any window), "pointwise", "depthwise" or "dense" (the classifier).
      in_size: (H, W) of its input.
      out_size: (H, W) of its output.
      in_channels: C.
      out_channels: D.
      window: the square window's side.
      stride: of the window.
      block: K where the layer is wrapped in a DCT and its inverse, else None.
      input_mask: path of the FCMask of its input channels in the `fcmask` collection; None: no mask.
      output_mask: likewise of its output channels.
      unit: the block it belongs to, else None.
      groups: of a "conv".
    """

    name: str
    kind: Kind
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    in_channels: int
    out_channels: int
    window: int = 1
    stride: int = 1
    block: int | None = None
    input_mask: str | None = None
    output_mask: str | None = None
    unit: str | None = None
    groups: int = 1

    @property
    def num_coefs(self) -> int:
        """N = K*K of a wrapped layer."""
        if self.block is None:
            raise ValueError(f"layer {self.name} is not wrapped")
        return self.block**2

    @property
    def dense_macs(self) -> int:
        """MACs of the plain layer."""
        if self.kind == "depthwise":
            return ops_macs.depthwise_macs(self.out_size, self.in_channels, self.window)
        return ops_macs.conv_macs(self.out_size, self.in_channels // self.groups, self.out_channels, self.window)

    @property
    def norm(self) -> str:
        """Path of the batch norm that follows: its own, or that of the map that an octave product adds to."""
        layer, is_product, target = self.name.rpartition("_to_")
        return f"{layer.rpartition('/')[0]}/{target}_norm" if is_product else f"{self.name}_norm"

    def input_counts(self, counts: Counts) -> np.ndarray:
        """Kept counts [C]: those of its mask, or N."""
        return counts[self.input_mask] if self.input_mask else np.full(self.in_channels, self.num_coefs)

    def output_counts(self, counts: Counts) -> np.ndarray:
        """Kept counts [D]: those of its mask, or N."""
        return counts[self.output_mask] if self.output_mask else np.full(self.out_channels, self.num_coefs)


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
    """A whole network.

    Attributes:
      name: of the architecture.
      input_shape: (H, W, C).
      num_classes: outputs of the classifier.
      layers: in the order of evaluation.
      count_classifier: whether the classifier is in every total.
      padding: of convolutions, "same" or "torch".
      batch_norm_epsilon: of every batch norm.
      tied: the wide side of a block shares one FCMask.
      linear_bottlenecks: project layers have no activation, and blocks whose shapes allow it a residual (MobileNetV2);
        else a ReLU6, and none (MobileNetV1).
      stem_pool: a 3x3 max pool with stride 2 follows the stem.
      input_mean: per input channel, in raw 0..255 units; subtracted first.
      input_std: likewise; divided by then.
      class_names: of the outputs, in order.
    """

    name: str
    input_shape: tuple[int, int, int]
    num_classes: int
    layers: tuple[LayerSpec, ...]
    count_classifier: bool = False
    padding: str = "same"
    batch_norm_epsilon: float = 1e-5
    tied: bool = False
    linear_bottlenecks: bool = True
    stem_pool: bool = False
    input_mean: tuple[float, ...] = ()
    input_std: tuple[float, ...] = ()
    class_names: tuple[str, ...] = ()

    @property
    def counted_layers(self) -> tuple[LayerSpec, ...]:
        """The layers that are in the totals."""
        return tuple(layer for layer in self.layers if layer.kind != "dense" or self.count_classifier)

    @property
    def mask_sizes(self) -> dict[str, tuple[int, int]]:
        """Path of every FCMask -> (channels, N)."""
        sizes = {}
        for layer in self.layers:
            if layer.input_mask:
                sizes[layer.input_mask] = (layer.in_channels, layer.num_coefs)
            if layer.output_mask:
                sizes[layer.output_mask] = (layer.out_channels, layer.num_coefs)
        return sizes

    def full_counts(self) -> dict[str, np.ndarray]:
        """The counts of a network in which nothing is pruned."""
        return {path: np.full(channels, num_coefs) for path, (channels, num_coefs) in self.mask_sizes.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> NetworkSpec:
        """The spec that `to_dict` wrote, also after a trip through JSON.

        Raises:
          ValueError: fields that are no spec's.
        """

        def tuples(value: Any) -> Any:
            return tuple(tuples(item) for item in value) if isinstance(value, (list, tuple)) else value

        try:
            layers = tuple(LayerSpec(**{k: tuples(v) for k, v in layer.items()}) for layer in fields["layers"])
            return cls(**{k: tuples(v) for k, v in fields.items() if k != "layers"}, layers=layers)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no NetworkSpec: {error!r}") from error


@dataclasses.dataclass(frozen=True)
class LayerMacs:
    """MACs of one layer; the fields are those of `fdjax.ops.macs.PointwiseMacs`, for every kind of layer."""

    name: str
    kind: str
    block: int | None
    form: str
    released: bool
    dense: int
    pruned: int
    full_transforms: int
    paper_total: int
    total: int
    input_histogram: tuple[int, ...] | None
    output_histogram: tuple[int, ...] | None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in `summary.json`: `kept_counts` holds the number of channels that keep 0..N coefficients."""
        fields = dataclasses.asdict(self)
        histograms = {side: fields.pop(f"{side}_histogram") for side in ("input", "output")}
        return {
            **fields,
            "num_coefs": self.block**2 if self.block else None,
            "ratio": self.total / self.dense,
            "paper_ratio": self.paper_total / self.dense,
            "kept_counts": {side: list(h) if h is not None else None for side, h in histograms.items()},
        }


@dataclasses.dataclass(frozen=True)
class NetworkMacs:
    """MACs of a network, layer by layer; the totals are sums over the counted layers."""

    layers: tuple[LayerMacs, ...]

    def _sum(self, field: str) -> int:
        return sum(getattr(layer, field) for layer in self.layers)

    @property
    def ratio(self) -> float:
        """`total` / `dense`."""
        return self._sum("total") / self._sum("dense")

    @property
    def paper_ratio(self) -> float:
        """`paper_total` / `dense`."""
        return self._sum("paper_total") / self._sum("dense")

    def to_dict(self) -> dict[str, Any]:
        """The `macs` object of `summary.json`."""
        fields = ("dense", "pruned", "full_transforms", "paper_total", "total")
        return {
            **{field: self._sum(field) for field in fields},
            "ratio": self.ratio,
            "paper_ratio": self.paper_ratio,
        }


def blocks(spec: NetworkSpec) -> dict[str, dict[str, LayerSpec]]:
    """The blocks of any kind: name -> layers by role, which is their name within the block."""
    found: dict[str, dict[str, LayerSpec]] = {}
    for layer in spec.layers:
        if layer.unit:
            found.setdefault(layer.unit, {})[layer.name.removeprefix(f"{layer.unit}/")] = layer
    return found


def units(spec: NetworkSpec) -> dict[str, dict[str, LayerSpec]]:
    """The inverted residual blocks: name -> layers by role ("expand" where there is one, "depthwise", "project")."""
    return {name: roles for name, roles in blocks(spec).items() if "depthwise" in roles}


def rooms(spec: NetworkSpec) -> list[Room]:
    """The blocks and the wrapped layers outside of them, in the order of evaluation."""
    by_unit = blocks(spec)
    found: dict[str, Room] = {}
    for layer in spec.layers:
        if layer.unit:
            found[layer.unit] = by_unit[layer.unit]
        elif layer.block:
            found[layer.name] = {layer.name: layer}
    return list(found.values())


def effective_counts(spec: NetworkSpec, counts: Counts) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Layer name -> kept counts (input [C], output [D]) of every wrapped layer, with dead channels dead on both ends.

    A wide channel that the expand layer does not produce or the project layer does not read is dead: what is left of it
    does not depend on the input (a constant, different at the borders) and folds into what follows. In a bottleneck,
    channels are dead that only feed groups of which nothing is read.
    """
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for room in rooms(spec):
        found |= _effective(room, counts)
    return found


def _effective(room: Room, counts: Counts) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = {
        layer.name: (layer.input_counts(counts), layer.output_counts(counts)) for layer in room.values() if layer.block
    }
    expand, project = room.get("expand"), room.get("project")
    if expand and project:
        (expand_in, expand_out), (project_in, project_out) = found[expand.name], found[project.name]
        dead = (expand_out == 0) | (project_in == 0)
        found[expand.name] = (expand_in, np.where(dead, 0, expand_out))
        found[project.name] = (np.where(dead, 0, project_in), project_out)
    conv2 = _bottleneck_conv(room)
    if conv2:
        first, last = room["conv1"].name, room["conv3"].name
        unread = ~np.repeat(_groups_read(conv2, found[last][0]), conv2.in_channels // conv2.groups)
        found[first] = (found[first][0], np.where(unread, 0, found[first][1]))
    return found


def _bottleneck_conv(room: Room) -> LayerSpec | None:
    """The 3x3 convolution between a bottleneck's two pointwise layers."""
    return room["conv2"] if "conv3" in room else None


def _groups_read(conv: LayerSpec, output_counts: np.ndarray) -> np.ndarray:
    """[groups], whether what follows a convolution reads any of a group's outputs."""
    return np.any(output_counts.reshape(conv.groups, -1) > 0, axis=1)


def bottleneck_conv_macs(conv: LayerSpec, input_counts: np.ndarray, output_counts: np.ndarray) -> int:
    """MACs of a bottleneck's 3x3 convolution between layers that keep these counts of its channels [C] and [D].

    Without groups, removed channels of either side are left out; with groups, those groups of which nothing is read.
    """
    if conv.groups == 1:
        alive = int((input_counts > 0).sum()), int((output_counts > 0).sum())
        return ops_macs.conv_macs(conv.out_size, *alive, conv.window)
    return conv.dense_macs * int(_groups_read(conv, output_counts).sum()) // conv.groups


def _histogram(counts: np.ndarray, num_coefs: int) -> tuple[int, ...]:
    return tuple(int(n) for n in np.bincount(np.asarray(counts, np.int64), minlength=num_coefs + 1))


def unit_group_macs(
    spec: NetworkSpec,
    roles: Mapping[str, LayerSpec],
    counts: np.ndarray,
    *,
    narrow_transforms: bool = True,
) -> Mapping[str, int]:
    """MACs by role of a block whose wide channels have tied `counts` [E], run group by group (see `group_macs`)."""
    expand, depthwise, project = roles.get("expand"), roles["depthwise"], roles["project"]
    assert project.block is not None
    before = [conv_pads(size, depthwise.stride, depthwise.window, spec.padding)[0] for size in depthwise.in_size]
    pads = (before[0], before[1])
    taps = ops_macs.block_constant_taps(depthwise.out_size, depthwise.stride, project.block, pads, depthwise.window)
    return ops_macs.group_macs(
        counts,
        project.block,
        expand.in_channels if expand else None,
        project.out_channels,
        depthwise.in_size,
        project.in_size,
        taps,
        depthwise.window,
        narrow_transforms,
    )


def tied_mask(roles: Mapping[str, LayerSpec]) -> str | None:
    """The path of the FCMask that the wide side of a block shares, or None where its two layers have their own."""
    expand, project = roles.get("expand"), roles["project"]
    shared = expand is not None and expand.output_mask is not None and expand.output_mask == project.input_mask
    return project.input_mask if shared else None


def _room_macs(spec: NetworkSpec, room: Room, counts: Counts) -> dict[str, tuple[int, str]]:
    """Layer name -> (MACs, form) of a block or a layer (see `rooms`), in its cheapest exact form."""
    totals: dict[str, tuple[int, str]] = {}
    effective = _effective(room, counts)
    for layer in room.values():
        if layer.block:
            inputs, outputs = (np.asarray(_histogram(side, layer.num_coefs)) for side in effective[layer.name])
            totals[layer.name] = ops_macs.cheapest_pointwise(layer.in_size, layer.block, inputs, outputs)
    conv2 = _bottleneck_conv(room)
    if conv2:
        macs = bottleneck_conv_macs(conv2, effective[room["conv1"].name][1], effective[room["conv3"].name][0])
        totals[conv2.name] = (macs, "dense" if macs == conv2.dense_macs else "channels")
    depthwise, project = room.get("depthwise"), room.get("project")
    if not depthwise or not project:
        return totals
    alive = depthwise.in_channels
    if project.block:
        alive = int((effective[project.name][0] > 0).sum())
    totals[depthwise.name] = (
        ops_macs.depthwise_macs(depthwise.out_size, alive, depthwise.window),
        "dense" if alive == depthwise.in_channels else "channels",
    )
    shared = tied_mask(room)
    if shared:
        by_role = unit_group_macs(spec, room, counts[shared])
        if sum(by_role.values()) < sum(macs for macs, _ in totals.values()):
            totals = {room[role].name: (macs, "groups") for role, macs in by_role.items()}
    return totals


def network_macs(spec: NetworkSpec, counts: Counts, released: Collection[str] = ()) -> NetworkMacs:
    """Counts a network with hard masks.

    In a MobileNetV1 a depthwise layer's channel counts unless the layer after it removes it; that the layer before does
    is not looked at (the frozen network leaves it out).

    Args:
      spec: the network.
      counts: path of every FCMask -> kept counts; see `NetworkSpec.full_counts`.
      released: names of the layers that the gate has released.
    """
    totals: dict[str, tuple[int, str]] = {}
    for room in rooms(spec):
        totals |= _room_macs(spec, room, counts)

    layers = []
    for layer in spec.counted_layers:
        dense = layer.dense_macs
        total, form = totals.get(layer.name, (dense, "dense"))
        pruned = full = paper = dense
        histograms: list[tuple[int, ...] | None] = [None, None]
        is_released = layer.name in released
        if layer.block:
            sides = (layer.input_counts(counts), layer.output_counts(counts))
            macs = ops_macs.pointwise_macs(layer.in_size, layer.block, *sides, released=is_released)
            pruned, full, paper = macs.pruned, macs.full_transforms, macs.paper_total
            for index, (mask, side) in enumerate(zip((layer.input_mask, layer.output_mask), sides, strict=True)):
                histograms[index] = _histogram(side, layer.num_coefs) if mask else None
        layers.append(
            LayerMacs(
                name=layer.name,
                kind=layer.kind,
                block=layer.block,
                form=form,
                released=is_released,
                dense=dense,
                pruned=pruned,
                full_transforms=full,
                paper_total=paper,
                total=total,
                input_histogram=histograms[0],
                output_histogram=histograms[1],
            )
        )
    return NetworkMacs(tuple(layers))
