"""What the networks have in common: frequency layers with their blocks and masks, and the graph of such a layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from fdjax.graph.rules import fits
from fdjax.ops.conv import grouped_conv
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
      include: rules by path (`fdjax.graph.rules`): only layers that fit one of them are wrapped.
      exclude: likewise: layers that fit one of them are not, and have no masks.
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
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    sides: str = "both"
    mode: MaskMode = "soft"
    levels: tuple[int, ...] | None = None
    whole_channels: frozenset[str] = frozenset()
    block_means: frozenset[str] = frozenset()
    padding: str = "same"
    batch_norm_momentum: float = 0.9
    batch_norm_epsilon: float = 1e-5

    @property
    def title(self) -> str:
        """What the network is called in tables."""
        return self.variant

    @property
    def hard_form(self) -> Hashable:
        """What of the network depends on its hard masks: networks alike in it are one program."""
        return self.whole_channels, self.block_means

    def without_masks(self) -> Self:
        """The dense network with the same weights: it makes and reads no masks, and takes maps of any size."""
        return dataclasses.replace(
            self, mode="off", sides="none", block=1, block_by_map=None, block_by_layer=None,
            include=("*",), exclude=(), whole_channels=frozenset(), block_means=frozenset(),
        )  # fmt: skip

    def layer_block(self, name: str, size: Size) -> int:
        """K of the wrapped layer `name` on a map of `size`."""
        by_layer, by_map = self.block_by_layer or {}, self.block_by_map or {}
        return by_layer.get(name, by_map.get(size[0], self.block))

    def wraps(self, name: str) -> bool:
        """Whether the pointwise layer `name` is wrapped: it fits `include`, and not `exclude`."""
        return fits(name, self.include) and not fits(name, self.exclude)

    def pointwise(self, name: str, features: int, size: Size, own_masks: bool = True) -> FrequencyPointwise:
        """The frequency layer `name`, unbound, on a map of `size`; without `own_masks` it is given any it has."""
        own_masks = own_masks and self.wraps(name)
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
