"""What all networks share: frequency layers with their blocks and masks, and other common layers."""

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
    """Rounds to the nearest multiple of 8, at least 8 and at least 0.9 of the argument, as is usual for MobileNets."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def strided(size: Size, stride: int) -> Size:
    """Returns (H', W') of the output of a layer with this stride on a map of `size` (H, W)."""
    return -(-size[0] // stride), -(-size[1] // stride)


class Conv(nn.Module):
    """A convolution without bias; its kernel is [window, window, C / groups, D].

    Attributes:
      features: D, the output channels.
      window: side of the square window.
      stride: 1 or more.
      groups: a divisor of C and D.
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
    """A network whose pointwise layers are frequency layers, with the fields that all such networks have.

    Attributes:
      variant: the member of the family.
      num_classes: number of outputs.
      width: multiplier of the channels.
      block: K of the wrapped layers, 1 to 16.
      block_by_map: side of a map -> K where it differs.
      block_by_layer: layer name -> K where it differs; takes precedence over `block_by_map`.
      include: rules on paths (`fdjax.graph.rules`); only layers that fit one of them are wrapped.
      exclude: rules on paths; layers that fit one of them are not wrapped and have no masks.
      sides: which sides of a wrapped layer have masks: "both", "input", "output" or "none".
      levels: kept counts below N between which soft masks fade; None for all.
      mode: mode of all masks, "off", "soft" or "hard" (see `FrequencyPointwise`).
      whole_channels: with mode="hard", names of the wrapped layers whose kept counts are all 0 or N.
      block_means: with mode="hard", names of the wrapped layers whose kept counts are all 0, 1 or N.
      padding: "same" or "torch".
      batch_norm_momentum: momentum of the running averages, 0 to below 1.
      batch_norm_epsilon: added to the variance in every batch norm.
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
        """The network's name in tables."""
        return self.variant

    @property
    def hard_form(self) -> Hashable:
        """What the compiled program depends on besides values: networks with equal forms compile to one program."""
        return self.whole_channels, self.block_means

    def without_masks(self) -> Self:
        """Returns the dense network with the same weights, which has no masks and takes maps of any size."""
        return dataclasses.replace(
            self, mode="off", sides="none", block=1, block_by_map=None, block_by_layer=None,
            include=("*",), exclude=(), whole_channels=frozenset(), block_means=frozenset(),
        )  # fmt: skip

    def layer_block(self, name: str, size: Size) -> int:
        """Returns K of the wrapped layer `name` on a map of `size` (H, W)."""
        by_layer, by_map = self.block_by_layer or {}, self.block_by_map or {}
        return by_layer.get(name, by_map.get(size[0], self.block))

    def wraps(self, name: str) -> bool:
        """Returns whether the pointwise layer `name` is wrapped: whether it fits `include` and not `exclude`."""
        return fits(name, self.include) and not fits(name, self.exclude)

    def pointwise(self, name: str, features: int, size: Size, own_masks: bool = True) -> FrequencyPointwise:
        """Makes the unbound frequency layer `name` on a map of `size`; without `own_masks`, it is given masks."""
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
        """Returns a function that makes a batch norm; `train` uses and updates the statistics of the batch."""
        return functools.partial(
            BatchNorm,
            use_running_average=not train,
            momentum=self.batch_norm_momentum,
            epsilon=self.batch_norm_epsilon,
        )

    def classify(self, x: jax.Array) -> jax.Array:
        """Averages over the map, in float32 or wider, and applies the classifier.

        Args:
          x: [B, H, W, C].

        Returns:
          Logits, [B, num_classes].
        """
        x = jnp.mean(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=(1, 2))
        return nn.Dense(self.num_classes, name="classifier")(x)
