"""What the networks have in common: frequency layers with their blocks and masks, and the spec of such a layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from fdjax.ops.conv import grouped_conv
from fdjax.spec import LayerSpec, NetworkSpec
from fdjax.zoo.frequency import FrequencyPointwise, MaskMode
from fdjax.zoo.normalization import BatchNorm

Size = tuple[int, int]

FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def round_channels(channels: float) -> int:
    """To the nearest multiple of 8, at least 8 and at least 0.9 of what was asked (the MobileNets' custom)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def strided(size: Size, stride: int) -> Size:
    """The map that a layer with this stride makes of one of `size`."""
    return -(-size[0] // stride), -(-size[1] // stride)


class Conv(nn.Module):
    """A convolution without bias; its kernel is [window, window, C / groups, D].

    Attributes:
      features: D.
      window: its side.
      stride: 1 or more.
      groups: divides C and D.
      padding: "same" or "torch".
    """

    features: int
    window: int
    stride: int = 1
    groups: int = 1
    padding: str = "same"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] -> [B, H', W', D]."""
        shape = (self.window, self.window, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", FAN_OUT, shape)
        return grouped_conv(x, kernel.astype(x.dtype), self.stride, self.padding, self.groups)


class FrequencyNetwork(nn.Module):
    """A network whose pointwise layers are frequency layers: the fields that all of them have.

    Attributes:
      variant: which member of the family.
      num_classes: outputs.
      width: multiplier of channels.
      block: K of the wrapped layers, 1 to 16.
      block_by_map: map side -> K where it differs.
      block_by_layer: layer name -> K where it differs; goes before `block_by_map`.
      sides: "both", "input", "output" or "none": which sides of a wrapped layer have masks.
      levels: kept counts below N between which soft masks fade; None for all.
      mode: of all masks, "off", "soft" or "hard" (see `FrequencyPointwise`).
      whole_channels: with mode="hard", the wrapped layers whose kept counts are all 0 or N.
      block_means: likewise 0, 1 or N.
      padding: "same" or "torch".
      batch_norm_momentum: of the running averages.
      batch_norm_epsilon: of every batch norm.
    """

    variant: str
    num_classes: int = 1000
    width: float = 1.0
    block: int = 4
    block_by_map: Mapping[int, int] | None = None
    block_by_layer: Mapping[str, int] | None = None
    sides: str = "both"
    mode: MaskMode = "soft"
    levels: tuple[int, ...] | None = None
    whole_channels: frozenset[str] = frozenset()
    block_means: frozenset[str] = frozenset()
    padding: str = "same"
    batch_norm_momentum: float = 0.9
    batch_norm_epsilon: float = 1e-5

    def spec(self, input_shape: tuple[int, int, int], count_classifier: bool = False) -> NetworkSpec:
        """The network as data, for inputs of `input_shape` (H, W, C).

        Raises:
          ValueError: a block larger than its map, or a block setting for a layer that does not exist.
        """
        raise NotImplementedError

    @property
    def hard_form(self) -> Hashable:
        """What of the network depends on its hard masks: networks alike in it are one program."""
        return self.whole_channels, self.block_means

    def without_masks(self) -> Self:
        """The dense network with the same weights: it makes and reads no masks, and takes maps of any size."""
        return dataclasses.replace(
            self, mode="off", sides="none", block=1, block_by_map=None, block_by_layer=None,
            whole_channels=frozenset(), block_means=frozenset(),
        )  # fmt: skip

    @property
    def stem_channels(self) -> int:
        """Of the stem's output."""
        raise NotImplementedError

    def stem_spec(self, input_shape: tuple[int, int, int], window: int, stride: int) -> LayerSpec:
        """The spec of the first convolution, for inputs of `input_shape` (H, W, C)."""
        size = (input_shape[0], input_shape[1])
        channels = input_shape[2], self.stem_channels
        return LayerSpec("stem", "conv", size, strided(size, stride), *channels, window, stride)

    def layer_block(self, name: str, size: Size) -> int:
        """K of the wrapped layer `name` on a map of `size`."""
        by_layer, by_map = self.block_by_layer or {}, self.block_by_map or {}
        return by_layer.get(name, by_map.get(size[0], self.block))

    def side(self, name: str, which: str) -> str | None:
        """The path of a layer's own mask on the side `which`, or None."""
        return f"{name}/{which}" if self.sides in ("both", which) else None

    def wrapped_spec(self, name: str, size: Size, channels: int, features: int, **fields) -> LayerSpec:
        """The spec of a frequency layer.

        Raises:
          ValueError: a block larger than its map.
        """
        block = self.layer_block(name, size)
        if block > min(size):
            raise ValueError(
                f"block {block} is larger than the {size[0]}x{size[1]} map of layer {name}; give that map "
                "a smaller one (block_by_map or block_by_layer)"
            )
        return LayerSpec(name, "pointwise", size, size, channels, features, block=block, **fields)

    def network_spec(
        self, input_shape: tuple[int, int, int], count_classifier: bool, layers: Iterable[LayerSpec], **fields
    ) -> NetworkSpec:
        """The spec of the whole network: `layers`, and the classifier after them.

        Raises:
          ValueError: a block setting for a map or layer that does not exist.
        """
        layers = tuple(layers)
        classifier = LayerSpec("classifier", "dense", (1, 1), (1, 1), layers[-1].out_channels, self.num_classes)
        maps = sorted({layer.in_size[0] for layer in layers if layer.block})
        for map_side in self.block_by_map or {}:
            if int(map_side) not in maps:
                raise ValueError(
                    f"block_by_map names maps of side {map_side}; wrapped layers have {', '.join(map(str, maps))}"
                )
        names = {layer.name for layer in layers if layer.block}
        for name in self.block_by_layer or {}:
            if name not in names:
                raise ValueError(f"block_by_layer names {name!r}; wrapped layers are {', '.join(sorted(names))}")
        return NetworkSpec(
            name=self.variant,
            input_shape=input_shape,
            num_classes=self.num_classes,
            layers=(*layers, classifier),
            count_classifier=count_classifier,
            padding=self.padding,
            batch_norm_epsilon=self.batch_norm_epsilon,
            **fields,
        )

    def pointwise(self, name: str, features: int, size: Size, own_masks: bool = True) -> FrequencyPointwise:
        """The frequency layer `name`, unbound, on a map of `size`; without `own_masks` it is given any it has."""
        return FrequencyPointwise(
            features=features,
            block=self.layer_block(name, size),
            input_side=own_masks and self.sides in ("both", "input"),
            output_side=own_masks and self.sides in ("both", "output"),
            mode=self.mode,
            levels=self.levels,
            whole_channels=name in self.whole_channels,
            block_means=name in self.block_means,
            parent=None,
        )

    def norms(self, train: bool) -> Callable[..., BatchNorm]:
        """Makes a batch norm of a given name; `train` uses and updates batch statistics."""
        return functools.partial(
            BatchNorm,
            use_running_average=not train,
            momentum=self.batch_norm_momentum,
            epsilon=self.batch_norm_epsilon,
        )

    def classify(self, x: jax.Array) -> jax.Array:
        """The mean over the map, in float32 or wider, and the classifier: [B, H, W, C] -> [B, num_classes]."""
        x = jnp.mean(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=(1, 2))
        return nn.Dense(self.num_classes, name="classifier")(x)
