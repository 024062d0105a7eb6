"""MobileNets with frequency layers: V1, V2 with its CIFAR variants and a small one, and EfficientNet-Lite0.

Sources: Howard et al. 2017 (V1), Sandler et al. 2018 (V2); EfficientNet-Lite0 is EfficientNet-B0 (Tan & Le 2019)
without squeeze-and-excitation and with ReLU6.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from fdjax.ops.block_means import block_means, spread_blocks
from fdjax.zoo.frequency import FCMASK, FrequencyPointwise
from fdjax.zoo.network import FAN_OUT, FrequencyNetwork, Size, round_channels, strided
from fdjax.zoo.normalization import BatchNorm, Channels, Depthwise


class Stage(NamedTuple):
    """A row of V2's Table 2 (expansion t, channels c, repeats n, stride s of the first block), and the window."""

    expansion: int
    channels: int
    repeats: int
    stride: int
    window: int = 3


class BlockPlan(NamedTuple):
    """One inverted residual block, as it will be built."""

    name: str
    stage: int
    in_channels: int
    wide_channels: int
    out_channels: int
    stride: int
    window: int
    has_expand: bool
    in_size: Size
    out_size: Size
    linear: bool

    @property
    def residual(self) -> bool:
        return self.linear and self.stride == 1 and self.in_channels == self.out_channels


@dataclasses.dataclass(frozen=True)
class Variant:
    """The differences between the members of the family.

    Attributes:
      stem_channels: channels of the stem, before the width multiplier.
      stem_window: 3 or 1.
      stem_stride: 1 or 2.
      stages: the stages, in order.
      expand_always: whether blocks with t = 1 have an expand layer as well.
      head_channels: channels of the head before the width multiplier, which only enlarges it; None if there is no head.
      linear: whether blocks end without an activation, and add their input where the shapes allow it. Otherwise blocks
        are V1's, with a ReLU6 at the end and no residual.
    """

    stem_channels: int
    stem_window: int
    stem_stride: int
    stages: tuple[Stage, ...]
    expand_always: bool
    head_channels: int | None
    linear: bool = True


def _stages(strides: tuple[int, ...]) -> tuple[Stage, ...]:
    rows = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    return tuple(Stage(*row, stride) for row, stride in zip(rows, strides, strict=True))


_V1_STAGES = tuple(
    Stage(1, *row)
    for row in ((64, 1, 1), (128, 1, 2), (128, 1, 1), (256, 1, 2), (256, 1, 1), (512, 6, 2), (1024, 2, 2))
)
_LITE0_STAGES = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 40, 2, 2, 5),
    Stage(6, 80, 3, 2),
    Stage(6, 112, 3, 1, 5),
    Stage(6, 192, 4, 2, 5),
    Stage(6, 320, 1, 1),
)

VARIANTS: Mapping[str, Variant] = {
    "mobilenetv2": Variant(32, 3, 2, _stages((1, 2, 2, 2, 1, 2, 1)), False, 1280),
    "mobilenetv2_cifar10": Variant(32, 3, 1, _stages((1, 1, 2, 2, 1, 2, 1)), True, 1280),
    "mobilenetv2_cifar100": Variant(32, 1, 1, _stages((1, 2, 2, 2, 1, 1, 1)), False, 1280),
    "mobilenetv1": Variant(32, 3, 2, _V1_STAGES, False, None, linear=False),
    "efficientnet_lite0": Variant(32, 3, 2, _LITE0_STAGES, False, 1280),
    "mobilenetv2_small": Variant(16, 3, 2, (Stage(4, 24, 2, 1), Stage(4, 64, 2, 2)), False, 256),
}


DEPTHWISE_FAN_OUT = nn.initializers.variance_scaling(
    2.0, "fan_out", "normal", in_axis=(), out_axis=(0, 1), batch_axis=2
)


class WideGroups(NamedTuple):
    """The wide channels of a block with hard masks, grouped by kept count; channels in no group are dead.

    Attributes:
      whole: tied channels that keep all coefficients and need no mask, in a block without masks on its narrow sides.
      means: tied channels that keep the mean, where blocks divide the maps. The expand layer, its batch norm and the
        project layer then see one value per block.
      others: channels that need masks.
    """

    whole: tuple[int, ...]
    means: tuple[int, ...]
    others: tuple[int, ...]


class InvertedResidual(nn.Module):
    """An expand, a depthwise and a project layer, with a residual connection where the shapes allow it.

    Attributes:
      plan: channels, stride and sizes.
      expand: an unbound layer, or None.
      project: an unbound layer.
      norm: makes a batch norm with a given name.
      tied: whether the wide channels share the FCMask `wide`.
      padding: padding of the depthwise layer, "same" or "torch".
      groups: with hard masks, the groups of the wide channels, each with a chain of layers of its own.
    """

    plan: BlockPlan
    expand: FrequencyPointwise | None
    project: FrequencyPointwise
    norm: Callable[..., BatchNorm]
    tied: bool
    padding: str
    groups: WideGroups | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] -> [B, H', W', D]."""
        plan = self.plan
        wide = self.variable(FCMASK, "wide", jnp.ones, (plan.wide_channels,)).value if self.tied else None
        expand_norm = self.norm(name="expand_norm") if self.expand is not None else None
        kernel = self.param("depthwise", DEPTHWISE_FAN_OUT, (plan.window, plan.window, plan.wide_channels))
        depthwise_norm = self.norm(relu6=True, name="depthwise_norm")
        project_norm = self.norm(relu6=not plan.linear, name="project_norm")

        def chain(channels: Channels | None, mask: jax.Array | None, norm: BatchNorm | None = None, means: int = 1):
            y = block_means(x, means)
            if self.expand is not None:
                y = self.expand(y, None, mask, norm=expand_norm, outputs=channels)
            elif channels is not None:
                y = channels.of(y)
            y = spread_blocks(y, means)
            taps = kernel if channels is None else channels.of(kernel)
            # `Depthwise` begins with the ReLU6 that follows the expand layer. Without an expand layer, x has been
            # through a ReLU6 already, and a second one changes nothing.
            y = depthwise_norm(y, Depthwise(taps, plan.stride, self.padding), channels)
            y = self.project(block_means(y, means), mask, norm=norm, inputs=channels)
            return spread_blocks(y, means)

        if self.groups is None:
            y = chain(None, wide, project_norm)
        else:
            whole, means, others = (Channels(group, plan.wide_channels) for group in self.groups)
            parts = []
            if whole.indices:
                parts.append(chain(whole if len(whole.indices) < whole.total else None, None))
            if means.indices:
                parts.append(chain(means, None, means=self.project.block))
            if others.indices:
                parts.append(chain(others, None if wide is None else others.of(wide)))
            y = project_norm(sum(parts[1:], start=parts[0]))
        return x + y if plan.residual else y


class MobileNet(FrequencyNetwork):
    """A MobileNet whose pointwise layers, except a 1x1 stem, are frequency layers.

    Attributes (in addition to those of `FrequencyNetwork`):
      variant: a key of `VARIANTS`.
      tied: whether a block's wide channels have one FCMask and its narrow sides none; the head keeps `sides`.
      wide_groups: with mode="hard", (block name, groups) of the blocks whose wide channels are computed group by group.
    """

    variant: str = "mobilenetv2"
    tied: bool = False
    wide_groups: tuple[tuple[str, WideGroups], ...] = ()

    @property
    def hard_form(self) -> Hashable:
        """See `FrequencyNetwork.hard_form`."""
        return super().hard_form, self.wide_groups

    def without_masks(self) -> Self:
        """See `FrequencyNetwork.without_masks`."""
        return dataclasses.replace(super().without_masks(), tied=False, wide_groups=())

    @property
    def stem_channels(self) -> int:
        """The number of the stem's output channels."""
        return round_channels(VARIANTS[self.variant].stem_channels * self.width)

    @property
    def head_channels(self) -> int | None:
        """The number of the head's output channels, or None if there is no head."""
        channels = VARIANTS[self.variant].head_channels
        return None if channels is None else round_channels(channels * max(1.0, self.width))

    def blocks(self, size: Size) -> Iterator[BlockPlan]:
        """Plans the inverted residual blocks, in order, for maps of `size` (H, W) after the stem."""
        variant = VARIANTS[self.variant]
        channels, index = self.stem_channels, 0
        for number, stage in enumerate(variant.stages):
            out_channels = round_channels(stage.channels * self.width)
            for repeat in range(stage.repeats):
                stride = stage.stride if repeat == 0 else 1
                out_size = strided(size, stride)
                yield BlockPlan(
                    name=f"block{index:02d}",
                    stage=number,
                    in_channels=channels,
                    wide_channels=channels * stage.expansion,
                    out_channels=out_channels,
                    stride=stride,
                    window=stage.window,
                    has_expand=stage.expansion > 1 or variant.expand_always,
                    in_size=size,
                    out_size=out_size,
                    linear=variant.linear,
                )
                channels, size, index = out_channels, out_size, index + 1

    def _is_tied(self, plan: BlockPlan) -> bool:
        """Returns whether a block is tied, for which both wide layers must be wrapped with one block size."""
        return (
            self.tied
            and plan.has_expand
            and self.wraps(f"{plan.name}/expand")
            and self.wraps(f"{plan.name}/project")
            and self.layer_block(f"{plan.name}/expand", plan.in_size)
            == self.layer_block(f"{plan.name}/project", plan.out_size)
        )

    def apply_stem(self, x: jax.Array, norm: Callable[..., BatchNorm]) -> jax.Array:
        """Applies the first convolution, its batch norm and ReLU6, as layers of the caller.

        Args:
          x: normalised images, [B, H, W, C].
          norm: makes a batch norm with a given name.

        Returns:
          [B, H', W', D].
        """
        window, stride = VARIANTS[self.variant].stem_window, VARIANTS[self.variant].stem_stride
        x = nn.Conv(
            self.stem_channels,
            (window, window),
            (stride, stride),
            padding="SAME" if self.padding == "same" else window // 2,
            use_bias=False,
            kernel_init=FAN_OUT,
            dtype=x.dtype,
            name="stem",
        )(x)
        return norm(relu6=True, name="stem_norm")(x)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Computes the network in the dtype of `x`, and the classifier in float32 or wider.

        Args:
          x: normalised images, [B, H, W, C].
          train: whether to use and update the statistics of the batch.

        Returns:
          Logits, [B, num_classes].
        """
        norm = self.norms(train)
        groups = dict(self.wide_groups)
        x = self.apply_stem(x, norm)
        size = (x.shape[1], x.shape[2])
        for plan in self.blocks(size):
            tied, expand = self._is_tied(plan), None
            if plan.has_expand:
                expand = self.pointwise(f"{plan.name}/expand", plan.wide_channels, plan.in_size, not tied)
            project = self.pointwise(f"{plan.name}/project", plan.out_channels, plan.out_size, not tied)
            x = InvertedResidual(
                plan, expand, project, norm, tied, self.padding, groups.get(plan.name), name=plan.name
            )(x)
        if self.head_channels is not None:
            head = self.pointwise("head", self.head_channels, (x.shape[1], x.shape[2]))
            x = head.copy(name="head")(x, norm=norm(relu6=True, name="head_norm"))
        return self.classify(x)
