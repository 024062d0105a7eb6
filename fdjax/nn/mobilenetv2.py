"""MobileNetV2 (Sandler et al. 2018) with frequency layers: the original, its CIFAR variants, and a small one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fdjax.nn.frequency import FCMASK, FrequencyPointwise, MaskMode
from fdjax.nn.normalization import BatchNorm, Channels, Depthwise
from fdjax.ops.block_means import block_means, spread_blocks
from fdjax.spec import LayerSpec, NetworkSpec

Size = tuple[int, int]


class Stage(NamedTuple):
    """A row of the paper's Table 2: expansion t, channels c, repeats n, stride s of the first block."""

    expansion: int
    channels: int
    repeats: int
    stride: int


class BlockPlan(NamedTuple):
    """One inverted residual block as it will be built."""

    name: str
    stage: int
    in_channels: int
    wide_channels: int
    out_channels: int
    stride: int
    has_expand: bool
    in_size: Size
    out_size: Size

    @property
    def residual(self) -> bool:
        return self.stride == 1 and self.in_channels == self.out_channels


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs between the members of the family.

    Attributes:
      stem_channels: before the width multiplier.
      stem_window: 3 or 1.
      stem_stride: 1 or 2.
      stages: in order.
      expand_always: whether blocks with t = 1 have an expand layer too.
      head_channels: before the width multiplier, which only enlarges it.
    """

    stem_channels: int
    stem_window: int
    stem_stride: int
    stages: tuple[Stage, ...]
    expand_always: bool
    head_channels: int


def _stages(strides: tuple[int, ...]) -> tuple[Stage, ...]:
    rows = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    return tuple(Stage(*row, stride) for row, stride in zip(rows, strides, strict=True))


VARIANTS: Mapping[str, Variant] = {
    "mobilenetv2": Variant(32, 3, 2, _stages((1, 2, 2, 2, 1, 2, 1)), False, 1280),
    "mobilenetv2_cifar10": Variant(32, 3, 1, _stages((1, 1, 2, 2, 1, 2, 1)), True, 1280),
    "mobilenetv2_cifar100": Variant(32, 1, 1, _stages((1, 2, 2, 2, 1, 1, 1)), False, 1280),
    "mobilenetv2_small": Variant(16, 3, 2, (Stage(4, 24, 2, 1), Stage(4, 64, 2, 2)), False, 256),
}


def round_channels(channels: float) -> int:
    """To the nearest multiple of 8, at least 8 and at least 0.9 of what was asked (the family's custom)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _strided(size: Size, stride: int) -> Size:
    return -(-size[0] // stride), -(-size[1] // stride)


_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_DEPTHWISE_FAN_OUT = nn.initializers.variance_scaling(
    2.0, "fan_out", "normal", in_axis=(), out_axis=(0, 1), batch_axis=2
)


class WideGroups(NamedTuple):
    """The wide channels of a block with hard masks, by what they keep; those in no group reach nothing.

    Attributes:
      whole: tied channels that keep all coefficients, where no narrow side has masks: they need none.
      means: likewise those that keep the mean, where blocks divide the maps: the expand layer, its batch norm and the
        project layer see one value a block.
      others: are masked.
    """

    whole: tuple[int, ...]
    means: tuple[int, ...]
    others: tuple[int, ...]


class InvertedResidual(nn.Module):
    """Expand, depthwise, project, and the residual where shapes allow it.

    Attributes:
      plan: channels, stride and sizes.
      expand: an unbound layer, or None.
      project: an unbound layer.
      norm: makes a batch norm of a given name.
      tied: the wide channels share the FCMask `wide`.
      padding: of the depthwise layer.
      groups: with hard masks, how the wide channels fall into groups; each then has its own chain of layers.
    """

    plan: BlockPlan
    expand: FrequencyPointwise | None
    project: FrequencyPointwise
    norm: Callable[..., BatchNorm]
    tied: bool
    padding: str
    groups: WideGroups | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, input_fcmask: jax.Array | None = None, output_fcmask: jax.Array | None = None
    ) -> jax.Array:
        """x [B, H, W, C] -> [B, H', W', D].

        Args:
          x: the map.
          input_fcmask: [C], the stage mask of the stream that is read.
          output_fcmask: [D], that of the stream that is written.
        """
        plan = self.plan
        wide = self.variable(FCMASK, "wide", jnp.ones, (plan.wide_channels,)).value if self.tied else None
        expand_norm = self.norm(name="expand_norm") if self.expand is not None else None
        kernel = self.param("depthwise", _DEPTHWISE_FAN_OUT, (3, 3, plan.wide_channels))
        depthwise_norm = self.norm(relu6=True, name="depthwise_norm")
        project_norm = self.norm(name="project_norm")

        def chain(channels: Channels | None, mask: jax.Array | None, norm: BatchNorm | None = None, means: int = 1):
            y = block_means(x, means)
            if self.expand is not None:
                y = self.expand(y, input_fcmask, mask, norm=expand_norm, outputs=channels)
            elif channels is not None:
                y = channels.of(y)
            y = spread_blocks(y, means)
            taps = kernel if channels is None else channels.of(kernel)
            # The ReLU6 after the expand layer is the depthwise layer's first; without one x has been through it.
            y = depthwise_norm(y, Depthwise(taps, plan.stride, self.padding), channels)
            y = self.project(block_means(y, means), mask, output_fcmask, norm=norm, inputs=channels)
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


class MobileNetV2(nn.Module):
    """MobileNetV2 whose pointwise layers, but for a 1x1 stem, are frequency layers.

    Attributes:
      variant: a key of `VARIANTS`.
      num_classes: outputs.
      width: multiplier.
      block: K of the wrapped layers, 1 to 16.
      block_by_map: map side -> K where it differs.
      block_by_layer: layer name -> K where it differs; goes before `block_by_map`.
      sides: "both", "input" or "output": which sides of a wrapped layer have masks.
      tied: one FCMask for a block's wide channels, none on the narrow sides; the head keeps `sides`.
      stage_masks: one FCMask for the channels of a residual stream, at all layers that write or read it (see
        `stage_streams`), tied or not. Only with sides="both".
      levels: kept counts below N between which soft masks fade; None for all.
      mode: of all masks, "off", "soft" or "hard" (see `FrequencyPointwise`).
      whole_channels: with mode="hard", the wrapped layers whose kept counts are all 0 or N.
      block_means: likewise 0, 1 or N.
      wide_groups: likewise, (block name, groups) of the blocks whose wide channels run group by group.
      padding: "same" or "torch".
      batch_norm_momentum: of the running averages.
      batch_norm_epsilon: of every batch norm.
    """

    variant: str = "mobilenetv2"
    num_classes: int = 1000
    width: float = 1.0
    block: int = 4
    block_by_map: Mapping[int, int] | None = None
    block_by_layer: Mapping[str, int] | None = None
    sides: str = "both"
    tied: bool = False
    stage_masks: bool = False
    mode: MaskMode = "soft"
    levels: tuple[int, ...] | None = None
    whole_channels: frozenset[str] = frozenset()
    block_means: frozenset[str] = frozenset()
    wide_groups: tuple[tuple[str, WideGroups], ...] = ()
    padding: str = "same"
    batch_norm_momentum: float = 0.9
    batch_norm_epsilon: float = 1e-5

    @property
    def stem_channels(self) -> int:
        """Of the stem's output."""
        return round_channels(VARIANTS[self.variant].stem_channels * self.width)

    @property
    def head_channels(self) -> int:
        """Of the head's output."""
        return round_channels(VARIANTS[self.variant].head_channels * max(1.0, self.width))

    def blocks(self, size: Size) -> Iterator[BlockPlan]:
        """The inverted residual blocks, in order, for maps of `size` after the stem."""
        variant = VARIANTS[self.variant]
        channels, index = self.stem_channels, 0
        for number, stage in enumerate(variant.stages):
            out_channels = round_channels(stage.channels * self.width)
            for repeat in range(stage.repeats):
                stride = stage.stride if repeat == 0 else 1
                out_size = _strided(size, stride)
                yield BlockPlan(
                    name=f"block{index:02d}",
                    stage=number,
                    in_channels=channels,
                    wide_channels=channels * stage.expansion,
                    out_channels=out_channels,
                    stride=stride,
                    has_expand=stage.expansion > 1 or variant.expand_always,
                    in_size=size,
                    out_size=out_size,
                )
                channels, size, index = out_channels, out_size, index + 1

    def layer_block(self, name: str, size: Size) -> int:
        """K of the wrapped layer `name` on a map of `size`."""
        by_layer, by_map = self.block_by_layer or {}, self.block_by_map or {}
        return by_layer.get(name, by_map.get(size[0], self.block))

    def _is_tied(self, plan: BlockPlan) -> bool:
        """Tying needs both wide layers, and one block size for both of their maps."""
        return (
            self.tied
            and plan.has_expand
            and self.layer_block(f"{plan.name}/expand", plan.in_size)
            == self.layer_block(f"{plan.name}/project", plan.out_size)
        )

    def stage_streams(self, size: Size) -> dict[str, str]:
        """The residual streams with a stage mask, for maps of `size` after the stem.

        A stream is written by the project layers of a stage's blocks and read by the expand layers of the blocks after
        them, up to the first of the next stage, or by the head. Where two stages have one width and no stride between
        them the residual runs through both, and they are one stream, named after the first. Two kinds of stream have no
        stage mask, and their layers the masks that they would have without: one that the stem feeds (block00 has a
        residual), because the stem has no mask; and one whose layers have different block sizes.

        Returns:
          Layer name -> path of the FCMask on its narrow side, the output of a project layer, the input of others.
        """
        if not self.stage_masks or self.sides != "both":
            return {}
        # Path of the FCMask (None: fed by the stem), map size, layers.
        streams: list[tuple[str | None, Size, list[str]]] = [(None, size, [])]
        for plan in self.blocks(size):
            if plan.has_expand:
                streams[-1][2].append(f"{plan.name}/expand")
            if not plan.residual:
                streams.append((f"stage{plan.stage:02d}/stream", plan.out_size, []))
            streams[-1][2].append(f"{plan.name}/project")
        streams[-1][2].append("head")
        return {
            name: path
            for path, map_size, names in streams
            if path and len({self.layer_block(name, map_size) for name in names}) == 1
            for name in names
        }

    def spec(self, input_shape: tuple[int, int, int], count_classifier: bool = False) -> NetworkSpec:
        """The network as data, for inputs of `input_shape` (H, W, C).

        Raises:
          ValueError: a block larger than its map, or a block setting for a layer that does not exist.
        """
        variant = VARIANTS[self.variant]
        size: Size = (input_shape[0], input_shape[1])
        stem_size = _strided(size, variant.stem_stride)
        layers = [
            LayerSpec(
                "stem", "conv", size, stem_size, input_shape[2], self.stem_channels,
                variant.stem_window, variant.stem_stride,
            )
        ]  # fmt: skip

        def wrapped(name: str, size: Size, channels: int, features: int, **fields) -> LayerSpec:
            block = self.layer_block(name, size)
            if block > min(size):
                raise ValueError(
                    f"block {block} is larger than the {size[0]}x{size[1]} map of layer {name}; give that map "
                    "a smaller one (block_by_map or block_by_layer)"
                )
            return LayerSpec(name, "pointwise", size, size, channels, features, block=block, **fields)

        def side(name: str, which: str) -> str | None:
            return f"{name}/{which}" if self.sides in ("both", which) else None

        streams = self.stage_streams(stem_size)
        for plan in self.blocks(stem_size):
            expand, depthwise, project = (f"{plan.name}/{role}" for role in ("expand", "depthwise", "project"))
            tied = f"{plan.name}/wide" if self._is_tied(plan) else None
            if plan.has_expand:
                layers.append(
                    wrapped(
                        expand, plan.in_size, plan.in_channels, plan.wide_channels,
                        input_mask=streams.get(expand, None if tied else side(expand, "input")),
                        output_mask=tied or side(expand, "output"),
                        unit=plan.name,
                    )
                )  # fmt: skip
            layers.append(
                LayerSpec(
                    depthwise, "depthwise", plan.in_size, plan.out_size, plan.wide_channels, plan.wide_channels,
                    3, plan.stride, unit=plan.name,
                )
            )  # fmt: skip
            layers.append(
                wrapped(
                    project, plan.out_size, plan.wide_channels, plan.out_channels,
                    input_mask=tied or side(project, "input"),
                    output_mask=streams.get(project, None if tied else side(project, "output")),
                    unit=plan.name,
                )
            )  # fmt: skip
        last = layers[-1]
        layers.append(
            wrapped(
                "head", last.out_size, last.out_channels, self.head_channels,
                input_mask=streams.get("head", side("head", "input")), output_mask=side("head", "output"),
            )
        )  # fmt: skip
        layers.append(LayerSpec("classifier", "dense", (1, 1), (1, 1), self.head_channels, self.num_classes))
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
            layers=tuple(layers),
            count_classifier=count_classifier,
            padding=self.padding,
            batch_norm_epsilon=self.batch_norm_epsilon,
            tied=self.tied,
        )

    def _pointwise(
        self, name: str, features: int, size: Size, own_input: bool = True, own_output: bool = True
    ) -> FrequencyPointwise:
        return FrequencyPointwise(
            features=features,
            block=self.layer_block(name, size),
            input_side=own_input and self.sides in ("both", "input"),
            output_side=own_output and self.sides in ("both", "output"),
            mode=self.mode,
            levels=self.levels,
            whole_channels=name in self.whole_channels,
            block_means=name in self.block_means,
            parent=None,
        )

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Normalised images [B, H, W, C] -> logits [B, num_classes]; `train` uses and updates batch statistics.

        The network computes in the type of `x`, the classifier in float32 or wider.
        """
        variant = VARIANTS[self.variant]
        norm = functools.partial(
            BatchNorm,
            use_running_average=not train,
            momentum=self.batch_norm_momentum,
            epsilon=self.batch_norm_epsilon,
        )
        groups = dict(self.wide_groups)
        window, stride = variant.stem_window, variant.stem_stride
        x = nn.Conv(
            self.stem_channels,
            (window, window),
            (stride, stride),
            padding="SAME" if self.padding == "same" else window // 2,
            use_bias=False,
            kernel_init=_FAN_OUT,
            dtype=x.dtype,
            name="stem",
        )(x)
        x = norm(relu6=True, name="stem_norm")(x)
        size = (x.shape[1], x.shape[2])
        streams = self.stage_streams(size)
        fcmasks: dict[str | None, jax.Array | None] = {None: None}
        for plan in self.blocks(size):
            names = (f"{plan.name}/expand", f"{plan.name}/project")
            path, tied = streams.get(names[1]), self._is_tied(plan)
            if path is not None and path not in fcmasks:
                stage, name = path.split("/")
                channels = plan.out_channels
                fcmasks[path] = self.variable(FCMASK, stage, lambda n=name, c=channels: {n: jnp.ones(c)}).value[name]
            reads, writes = (not tied and name not in streams for name in names)
            expand = None
            if plan.has_expand:
                expand = self._pointwise(names[0], plan.wide_channels, plan.in_size, reads, not tied)
            project = self._pointwise(names[1], plan.out_channels, plan.out_size, not tied, writes)
            block = InvertedResidual(
                plan, expand, project, norm, tied, self.padding, groups.get(plan.name), name=plan.name
            )
            x = block(x, *(fcmasks[streams.get(name)] for name in names))
        head = self._pointwise("head", self.head_channels, (x.shape[1], x.shape[2]), "head" not in streams)
        x = head.copy(name="head")(x, fcmasks[streams.get("head")], norm=norm(relu6=True, name="head_norm"))
        x = jnp.mean(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=(1, 2))
        return nn.Dense(self.num_classes, name="classifier")(x)
