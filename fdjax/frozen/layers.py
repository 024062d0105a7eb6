"""Layers of a frozen network while it is folded: their kernels, biases and activations can still change.

Arrays are float64 and have all channels of the graph; `finish` leaves out the channels that are not kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from fdjax.frozen.products import Indices, Window, by_count, pack, plan_reading, static_order
from fdjax.frozen.program import Activation, Bias, Conv, Pointwise
from fdjax.ops.blocks import num_blocks

HostArrays = dict[str, np.ndarray]


@dataclasses.dataclass
class OpenLayer:
    """A layer that can still take up a scale, a bias and an activation.

    Attributes:
      name: the layer's name, which is the prefix of its arrays.
      kind: "conv" (with a window) or "pointwise".
      x: the value that it reads.
      y: the value that it makes.
      x_order: the channels of `x`, in order.
      y_order: the channels of `y`, in order.
      kernel: [rows, columns, C / groups, D] or [C, D].
      size: size of its output, without batch and channels.
      bias: [D] or [H', W', D].
      activation: the activation after the bias.
      window: the window of a conv.
      groups: the groups of a conv.
      counts: kept counts of its input [C] and output [D].
      block: K; 1 if the layer is not wrapped.
      pooled: whether the layer computes the mean over its map.
      source: the open layer that makes `x`, if nothing else reads `x`.
    """

    name: str
    kind: Literal["conv", "pointwise"]
    x: int
    y: int
    x_order: np.ndarray
    y_order: np.ndarray
    kernel: np.ndarray
    size: tuple[int, ...]
    bias: np.ndarray
    counts: tuple[np.ndarray, np.ndarray]
    activation: Activation = "none"
    window: Window | None = None
    groups: int = 1
    block: int = 1
    pooled: bool = False
    source: OpenLayer | None = None

    @property
    def depthwise(self) -> bool:
        """Whether each channel has a kernel of its own."""
        return self.kind == "conv" and self.groups > 1 and self.groups == self.kernel.shape[-1]

    @property
    def num_blocks(self) -> int:
        """The number of blocks that cover its map."""
        return math.prod(num_blocks(length, self.block) for length in self.size)

    @property
    def takes_offsets(self) -> bool:
        """Whether offsets of its outputs can still go into its bias."""
        return self.activation == "none" and not self.pooled

    def scale(self, factors: np.ndarray) -> None:
        """Scales the output before the activation: multiplies kernel and bias.

        Args:
          factors: [D].
        """
        self.kernel = self.kernel * factors
        self.bias = self.bias * factors


@dataclasses.dataclass
class Held:
    """A value of the graph during the walk: value = base * scale + offset, channel by channel.

    Attributes:
      base: the value of the program that has the kept channels on its last axis; None if no channel is kept.
      order: the kept channels, in order; None for a value without channels.
      scale: [C], or None for 1.
      offset: [C], or [..., C] if it differs over the map. A channel that is not kept equals its offset.
      layer: the open layer that makes `base`, if nothing else reads it.
      activation: the activation that `base` has passed.
    """

    base: int | None
    order: np.ndarray | None = None
    scale: np.ndarray | None = None
    offset: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    layer: OpenLayer | None = None
    activation: Activation = "none"


def uniform(offset: np.ndarray) -> np.ndarray:
    """Reduces an offset to one number a channel, if it is the same everywhere on the map.

    Args:
      offset: [..., C].

    Returns:
      [C], or `offset` itself.
    """
    if offset.ndim == 1:
        return offset
    flat = offset.reshape(-1, offset.shape[-1])
    if not np.isfinite(flat).all():  # As in padding by minus infinity, before a maximum.
        return flat[0].copy() if (flat == flat[0]).all() else offset
    # Differences within rounding do not count.
    if np.ptp(flat, axis=0).max(initial=0) <= 1e-12 * max(1.0, np.abs(flat).max(initial=0)):
        return flat[0].copy()
    return offset


def with_bias(name: str, bias: np.ndarray, arrays: HostArrays) -> Bias:
    """Adds a bias to the arrays, unless it is zero.

    Args:
      name: the layer's name.
      bias: [D] or [H', W', D].
      arrays: the arrays; the bias becomes "NAME/bias".

    Returns:
      The form of the bias: "none" if it is zero, "channel", or "map".
    """
    form: Bias = "map" if bias.ndim > 1 else "channel" if bias.any() else "none"
    if form != "none":
        arrays[f"{name}/bias"] = bias
    return form


def finish(layer: OpenLayer, arrays: HostArrays) -> Conv | Pointwise:
    """Makes the operation of a layer.

    Args:
      layer: the layer.
      arrays: the program's arrays; the layer's are added.

    Returns:
      The operation.
    """
    return _finish_conv(layer, arrays) if layer.kind == "conv" else _finish_pointwise(layer, arrays)


def _finish_conv(layer: OpenLayer, arrays: HostArrays) -> Conv:
    assert layer.window is not None
    kernel, groups = layer.kernel[..., layer.y_order], layer.groups
    if layer.depthwise:
        groups = len(layer.y_order)
    elif groups > 1:
        groups = len(layer.y_order) * groups // layer.kernel.shape[-1]
    else:
        kernel = kernel[:, :, layer.x_order]
    arrays[f"{layer.name}/kernel"] = kernel
    bias = with_bias(layer.name, layer.bias[..., layer.y_order], arrays)
    return Conv(
        layer.name, layer.x, layer.y, layer.window, len(layer.x_order), len(layer.y_order), groups, bias,
        layer.activation,
    )  # fmt: skip


def _finish_pointwise(layer: OpenLayer, arrays: HostArrays) -> Pointwise:
    inputs, outputs = layer.counts
    made = by_count(layer.y_order[outputs[layer.y_order] > 0], outputs)
    product, read = plan_reading(layer.x_order, inputs, outputs[made], layer.block, layer.num_blocks)
    arrays |= pack(layer.name, layer.kernel[read][:, made], product)
    bias = with_bias(layer.name, layer.bias[..., layer.y_order], arrays)
    form = "dense" if (len(read), len(made)) == layer.kernel.shape else "channels"
    if product.transforms:
        means = layer.pooled and product.whole[1] > 0 and all(count <= 1 for *_, count in product.output_segments)
        form = "groups" if means and len(np.unique(inputs[read])) == 1 else "bands"
    return Pointwise(
        layer.name, layer.x, layer.y, form, product, layer.size, layer.block, places(layer.y_order, made), bias,
        layer.activation, layer.pooled,
    )  # fmt: skip


def places(wanted: np.ndarray, made: np.ndarray) -> Indices | None:
    """Finds channels among those that are made.

    Args:
      wanted: the channels that are wanted, int.
      made: the channels that are made, int.

    Returns:
      For each wanted channel its position in `made`, or -1; None if they are the same in the same order.
    """
    where = {int(channel): place for place, channel in enumerate(made)}
    return static_order(np.array([where.get(int(channel), -1) for channel in wanted], np.int64), len(made))


def canonical_shape(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    """Returns a shape with the channels' axis moved to the end."""
    return (*(side for at, side in enumerate(shape) if at != axis), shape[axis])
