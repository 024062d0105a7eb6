"""ResNets and ResNeXts with frequency layers: bottlenecks for ImageNet and CIFAR, basic blocks for CIFAR.

Sources: He et al. 2016 (ResNet, with the stride of a bottleneck in its 3x3 convolution, as has become usual), and Xie
et al. 2017 (ResNeXt). ResNeXt-29 has the 1x1 stem and the expansion of 2 that give the paper's 772.47 M MACs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fdjax.ops.conv import max_pool
from fdjax.ops.depthwise import conv_pads
from fdjax.zoo.frequency import FrequencyPointwise
from fdjax.zoo.network import Conv, FrequencyNetwork, Size, round_channels, strided
from fdjax.zoo.normalization import BatchNorm


@dataclasses.dataclass(frozen=True)
class Variant:
    """The differences between the members of the family.

    Attributes:
      repeats: number of blocks per stage.
      stem_channels: channels of the stem, before the width multiplier.
      stem_window: 7, 3 or 1.
      stem_stride: 1 or 2.
      stem_pool: whether a 3x3 max pool with stride 2 follows the stem.
      channels: channels of the 3x3 convolutions in the first stage (without groups); they double in every stage.
      expansion: a bottleneck's output channels over these channels; 0 for basic blocks.
      cardinality: groups of the bottlenecks' 3x3 convolutions.
      group_width: channels per group in the first stage; None for `channels`.
    """

    repeats: tuple[int, ...]
    stem_channels: int
    stem_window: int
    stem_stride: int
    stem_pool: bool
    channels: int
    expansion: int
    cardinality: int = 1
    group_width: int | None = None

    @property
    def bottleneck(self) -> bool:
        return self.expansion > 0


VARIANTS: Mapping[str, Variant] = {
    **{f"resnet{6 * n + 2}": Variant((n, n, n), 16, 3, 1, False, 16, 0) for n in (3, 5, 7, 9, 18)},
    "resnet50": Variant((3, 4, 6, 3), 64, 7, 2, True, 64, 4),
    "resnext50_32x4d": Variant((3, 4, 6, 3), 64, 7, 2, True, 128, 2, 32, 4),
    "resnext29": Variant((3, 3, 3), 64, 1, 1, False, 128, 2, 32, 4),
}


class BlockPlan(NamedTuple):
    """One residual block, as it will be built; `inner_channels` is the width of its first convolution."""

    name: str
    in_channels: int
    inner_channels: int
    out_channels: int
    stride: int
    groups: int
    bottleneck: bool
    in_size: Size
    out_size: Size

    @property
    def has_projection(self) -> bool:
        """Whether a convolution brings the input to the output's shape; basic blocks pad with zeros instead."""
        return self.bottleneck and (self.stride > 1 or self.in_channels != self.out_channels)


def padded_shortcut(x: jax.Array, stride: int, channels: int) -> jax.Array:
    """Computes the shortcut without parameters: every `stride`-th pixel, and zeros for new channels on either side.

    Args:
      x: [B, H, W, C].
      stride: 1 or more.
      channels: D, C or more; half of the new channels go before the old ones, half after.

    Returns:
      [B, ceil(H/stride), ceil(W/stride), D].
    """
    missing = channels - x.shape[-1]
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or a 3x3 convolution between two frequency layers; then the shortcut and ReLU.

    Attributes:
      plan: channels, stride and sizes.
      reduce: the first layer of a bottleneck, unbound; None for a basic block.
      expand: the last layer of a bottleneck, unbound; None for a basic block.
      norm: makes a batch norm with a given name.
      padding: "same" or "torch".
    """

    plan: BlockPlan
    reduce: FrequencyPointwise | None
    expand: FrequencyPointwise | None
    norm: Callable[..., BatchNorm]
    padding: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] -> [B, H', W', D]."""
        plan = self.plan
        inner, window = plan.inner_channels, 3
        if self.reduce is not None and self.expand is not None:
            y = self.reduce.copy(name="conv1")(x, norm=self.norm(name="conv1_norm"))
            y = Conv(inner, window, plan.stride, plan.groups, self.padding, name="conv2")(nn.relu(y))
            y = nn.relu(self.norm(name="conv2_norm")(y))
            y = self.expand.copy(name="conv3")(y, norm=self.norm(name="conv3_norm"))
        else:
            y = Conv(inner, window, plan.stride, 1, self.padding, name="conv1")(x)
            y = nn.relu(self.norm(name="conv1_norm")(y))
            y = Conv(plan.out_channels, window, 1, 1, self.padding, name="conv2")(y)
            y = self.norm(name="conv2_norm")(y)
        if plan.has_projection:
            x = Conv(plan.out_channels, 1, plan.stride, 1, self.padding, name="shortcut")(x)
            x = self.norm(name="shortcut_norm")(x)
        elif plan.stride > 1 or plan.in_channels != plan.out_channels:
            x = padded_shortcut(x, plan.stride, plan.out_channels)
        return nn.relu(x + y)


class ResNet(FrequencyNetwork):
    """A ResNet or ResNeXt; the pointwise layers of bottlenecks are frequency layers, the stem and shortcuts are not.

    Attributes (in addition to those of `FrequencyNetwork`):
      variant: a key of `VARIANTS`.
      cardinality: groups of the bottlenecks' 3x3 convolutions; None for the variant's.
      group_width: channels per group in the first stage; None for the variant's.
      inner_channels: width of each block's first convolution, in order, after filter pruning; empty for the variant's.
    """

    variant: str = "resnet50"
    cardinality: int | None = None
    group_width: int | None = None
    inner_channels: tuple[int, ...] = ()

    @property
    def stem_channels(self) -> int:
        """The number of the stem's output channels."""
        return round_channels(VARIANTS[self.variant].stem_channels * self.width)

    def blocks(self, size: Size) -> Iterator[BlockPlan]:
        """Plans the residual blocks, in order, for maps of `size` (H, W) after the stem and its pool.

        Raises:
          ValueError: `inner_channels` does not have one number per block.
        """
        variant = VARIANTS[self.variant]
        if self.inner_channels and len(self.inner_channels) != sum(variant.repeats):
            raise ValueError(
                f"inner_channels must have one number per block, {sum(variant.repeats)} for {self.variant}, "
                f"got {len(self.inner_channels)}"
            )
        groups = self.cardinality or variant.cardinality
        group_width = self.group_width or variant.group_width or variant.channels
        channels, index = self.stem_channels, 0
        for stage, repeats in enumerate(variant.repeats):
            if groups == 1:
                inner = round_channels(group_width * self.width) * 2**stage
            else:
                inner = groups * max(1, round(group_width * self.width)) * 2**stage
            out_channels = inner * (variant.expansion or 1)
            for repeat in range(repeats):
                stride = 2 if stage and repeat == 0 else 1
                out_size = strided(size, stride)
                yield BlockPlan(
                    name=f"block{index:02d}",
                    in_channels=channels,
                    inner_channels=self.inner_channels[index] if self.inner_channels else inner,
                    out_channels=out_channels,
                    stride=stride,
                    groups=groups,
                    bottleneck=variant.bottleneck,
                    in_size=size,
                    out_size=out_size,
                )
                channels, size, index = out_channels, out_size, index + 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Computes the network in the dtype of `x`, and the classifier in float32 or wider.

        Args:
          x: normalised images, [B, H, W, C].
          train: whether to use and update the statistics of the batch.

        Returns:
          Logits, [B, num_classes].
        """
        variant, norm = VARIANTS[self.variant], self.norms(train)
        x = Conv(self.stem_channels, variant.stem_window, variant.stem_stride, 1, self.padding, name="stem")(x)
        x = nn.relu(norm(name="stem_norm")(x))
        if variant.stem_pool:
            rows, columns = (conv_pads(length, 2, 3, self.padding) for length in x.shape[1:3])
            x = max_pool(x, (rows, columns))
        for plan in self.blocks((x.shape[1], x.shape[2])):
            reduce = expand = None
            if plan.bottleneck:
                reduce = self.pointwise(f"{plan.name}/conv1", plan.inner_channels, plan.in_size)
                expand = self.pointwise(f"{plan.name}/conv3", plan.out_channels, plan.out_size)
            x = ResidualBlock(plan, reduce, expand, norm, self.padding, name=plan.name)(x)
        return self.classify(x)
