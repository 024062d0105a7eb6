"""Counts of multiply-accumulates (MACs): exact for hard masks, and a differentiable expectation for soft masks.

There are two conventions. The paper's (section 3.1) counts N MACs per computed coefficient, and the dense product of
every band. The other counts the cheapest exact form: no transform where counts are only 0 and N, separable transforms
where they are cheaper, no work for coefficients that either side drops, and, for tied masks, one chain per group of
channels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdjax.ops.blocks import num_blocks
from fdjax.ops.dct import zigzag_order

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class PointwiseMacs:
    """Multiply-accumulates of one wrapped pointwise layer.

    Attributes:
      dense: the plain convolution.
      pruned: the kept products of every band, without transforms.
      full_transforms: the layer without pruning, with the full DCT and inverse DCT, by the paper's convention.
      paper_total: `pruned` plus N per kept coefficient of either side; a released layer has no transforms.
      total: the cheapest exact form, with its transforms.
      form: the name of that form: "dense", "channels" (fewer channels, no transform) or "bands".
    """

    dense: int
    pruned: int
    full_transforms: int
    paper_total: int
    total: int
    form: str


def conv_macs(out_size: Size, in_channels: int, out_channels: int, window: int = 1) -> int:
    """Counts a convolution with a square window and no groups: H' * W' * C * D * window**2."""
    return out_size[0] * out_size[1] * in_channels * out_channels * window**2


def depthwise_macs(out_size: Size, channels: int, window: int = 3) -> int:
    """Counts a depthwise convolution: H' * W' * C * window**2."""
    return out_size[0] * out_size[1] * channels * window**2


@functools.cache
def block_transform_macs(block: int, count: int) -> int:
    """Counts the cheapest transform, in either direction, between one block and its first `count` coefficients.

    The direct form takes N per coefficient. The separable form takes K*K for each row (or column) frequency in use,
    then K for each coefficient.
    """
    if count == 0:
        return 0
    rows, columns = (len(set(axis)) for axis in zip(*zigzag_order(block)[:count], strict=True))
    separable = block * block * min(rows, columns) + block * count
    return min(block * block * count, separable)


def _blocks(size: Size, block: int) -> int:
    return num_blocks(size[0], block) * num_blocks(size[1], block)


def _histogram(counts: np.ndarray, num_coefs: int) -> np.ndarray:
    return np.bincount(np.asarray(counts, np.int64), minlength=num_coefs + 1)


def _transforms(histogram: np.ndarray, block: int) -> int:
    """Counts the transforms of one block over all channels, given a histogram of kept counts."""
    return int(histogram @ _transform_costs(block))


@functools.cache
def _transform_costs(block: int) -> np.ndarray:
    """Returns `block_transform_macs` of the counts 0..N."""
    return np.array([block_transform_macs(block, count) for count in range(block**2 + 1)])


def _widths(histogram: np.ndarray) -> np.ndarray:
    """Returns the number of channels that keep coefficient n, for n = 0..N-1."""
    return histogram[::-1].cumsum()[::-1][1:]


def whole_channels(histogram: np.ndarray) -> bool:
    """Returns whether all kept counts are 0 or N, so that no transform is needed.

    Args:
      histogram: number of channels by kept count, [N + 1].

    Returns:
      True if no channel keeps only a part of its coefficients.
    """
    return not histogram[1:-1].any()


def pointwise_macs(
    size: Size, block: int, input_counts: np.ndarray, output_counts: np.ndarray, released: bool = False
) -> PointwiseMacs:
    """Counts the MACs of a wrapped pointwise layer.

    Args:
      size: (H, W) of the map.
      block: the block size K.
      input_counts: kept counts [C], 0 to N.
      output_counts: kept counts [D], 0 to N.
      released: whether the gate has released the layer, which then has no transforms.

    Returns:
      The layer's MACs by every convention.
    """
    num_coefs, blocks, pixels = block * block, _blocks(size, block), size[0] * size[1]
    inputs, outputs = _histogram(input_counts, num_coefs), _histogram(output_counts, num_coefs)
    channels, features = int(inputs.sum()), int(outputs.sum())
    input_widths, output_widths = _widths(inputs), _widths(outputs)
    products = int(input_widths @ output_widths)
    transforms = num_coefs * int(input_widths.sum() + output_widths.sum())
    plain = whole_channels(inputs) and whole_channels(outputs)
    pruned = pixels * int(inputs[-1] * outputs[-1]) if plain else blocks * products
    total, form = cheapest_pointwise(size, block, inputs, outputs)
    return PointwiseMacs(
        dense=pixels * channels * features,
        pruned=pruned,
        full_transforms=blocks * num_coefs * (channels * features + num_coefs * (channels + features)),
        paper_total=pruned if released and plain else blocks * (products + transforms),
        total=total,
        form=form,
    )


def explicit_mask_macs(
    size: Size, block: int, input_mask: np.ndarray, output_mask: np.ndarray, released: bool = False
) -> tuple[int, int]:
    """Counts a wrapped pointwise layer under arbitrary coefficient masks, prefixes or not.

    A coefficient of an input channel is multiplied for an output channel where both keep it, and a transform takes N
    MACs per kept coefficient (section 3.1). For prefix masks this equals `pointwise_macs`.

    Args:
      size: (H, W) of the map.
      block: the block size K.
      input_mask: bool [N, C].
      output_mask: bool [N, D].
      released: whether the gate has released the layer, which then has no transforms.

    Returns:
      (pruned, paper_total), as in `PointwiseMacs`.
    """
    inputs, outputs = (mask.sum(axis=1) for mask in (input_mask, output_mask))
    products, transforms = int(inputs @ outputs), block * block * int(inputs.sum() + outputs.sum())
    plain = all((mask == mask[:1]).all() for mask in (input_mask, output_mask))
    pruned = size[0] * size[1] * int(inputs[0] * outputs[0]) if plain else _blocks(size, block) * products
    return pruned, pruned if released and plain else _blocks(size, block) * (products + transforms)


def cheapest_pointwise(size: Size, block: int, inputs: np.ndarray, outputs: np.ndarray) -> tuple[int, str]:
    """Counts a pointwise layer in its cheapest exact form.

    Args:
      size: (H, W) of the map.
      block: the block size K.
      inputs: number of input channels by kept count, [N + 1].
      outputs: number of output channels by kept count, [N + 1].

    Returns:
      (MACs, form), with the forms of `PointwiseMacs`.
    """
    input_widths, output_widths = _widths(inputs), _widths(outputs)
    # A coefficient that no channel of one side keeps is not needed on the other side.
    num_bands = int(np.count_nonzero(input_widths * output_widths))
    if num_bands == 0:
        return 0, "channels"
    blocks = _blocks(size, block)
    transforms = sum(_transforms(_clip_counts(side, num_bands), block) for side in (inputs, outputs))
    by_bands = blocks * (int(input_widths @ output_widths) + transforms)
    if whole_channels(inputs) and whole_channels(outputs):
        in_pixels = size[0] * size[1] * int(input_widths[0] * output_widths[0])
        if in_pixels <= by_bands:
            return in_pixels, "channels" if inputs[0] or outputs[0] else "dense"
    return by_bands, "bands"


def _clip_counts(histogram: np.ndarray, highest: int) -> np.ndarray:
    clipped = histogram.copy()
    clipped[highest] += clipped[highest + 1 :].sum()
    clipped[highest + 1 :] = 0
    return clipped


@functools.cache
def block_constant_taps(out_size: Size, stride: int, block: int, pads: Size, window: int = 3) -> int:
    """Counts the MACs of one depthwise channel whose input is constant within every block.

    Taps in the same block are added up beforehand and count once. Taps on the padding count like others, as they do in
    the dense count.
    """

    def along(size_out: int, before: int) -> int:
        first = np.arange(size_out) * stride - before
        blocks_of_taps = (first[:, None] + np.arange(window)) // block
        return int(sum(len(set(row)) for row in blocks_of_taps))

    return along(out_size[0], pads[0]) * along(out_size[1], pads[1])


class RunMacs(NamedTuple):
    """Multiply-accumulates of a run: its first layer, the depthwise layer after it, and its last layer."""

    writer: int
    depthwise: int
    reader: int


def group_macs(
    counts: np.ndarray,
    block: int,
    in_channels: int,
    out_channels: int,
    in_size: Size,
    out_size: Size,
    taps_of_mean: int,
    window: int = 3,
    narrow_transforms: bool = True,
) -> RunMacs:
    """Counts a run with tied masks by groups: a widening pointwise layer, a depthwise layer and a narrowing one.

    The wide channels with one kept count g form a group with its own chain writer -> depthwise -> reader. The group g =
    N runs in the spatial domain. The group g = 1 runs at block resolution throughout, because a bias and an activation
    keep a block-constant map block-constant. Any other group computes g coefficients from the narrow input, returns to
    pixels for the depthwise layer, and sends g coefficients to the narrow output. The groups share the transforms of
    the narrow sides.

    Args:
      counts: kept counts [E] of the wide channels, 0 to N.
      block: the block size K, the same on both maps.
      in_channels: C, the input channels of the writer.
      out_channels: D, the output channels of the reader.
      in_size: (H, W) of the writer's map.
      out_size: (H', W') of the reader's map.
      taps_of_mean: `block_constant_taps` of the depthwise layer.
      window: the size of the depthwise window.
      narrow_transforms: whether to count the transforms that the groups share.

    Returns:
      The MACs of the three layers.
    """
    num_coefs = block * block
    groups = _histogram(counts, num_coefs)
    partial = [int(count) for count in np.flatnonzero(groups) if 0 < count < num_coefs]
    whole = int(groups[num_coefs])
    blocks_in, blocks_out = _blocks(in_size, block), _blocks(out_size, block)
    pixels_in, pixels_out = in_size[0] * in_size[1], out_size[0] * out_size[1]
    narrow = block_transform_macs(block, max(partial)) if partial and narrow_transforms else 0

    writer = pixels_in * in_channels * whole + blocks_in * in_channels * narrow
    depthwise = pixels_out * window**2 * whole
    reader = pixels_out * out_channels * whole + blocks_out * out_channels * narrow
    for count in partial:
        width = int(groups[count])
        wide = width * block_transform_macs(block, count)
        writer += blocks_in * (in_channels * width * count + (0 if count == 1 else wide))
        depthwise += width * (taps_of_mean if count == 1 else pixels_out * window**2)
        reader += blocks_out * (wide + out_channels * width * count)
    return RunMacs(writer, depthwise, reader)


def expected_pointwise_macs(
    size: Size,
    block: int,
    channels: int,
    features: int,
    input_mask: jax.Array | None = None,
    output_mask: jax.Array | None = None,
    transforms: bool | Sequence[float] = True,
) -> jax.Array:
    """Counts a layer by the paper's convention from soft masks, differentiably; exact where masks are 0 or 1.

    Args:
      size: (H, W) of the map.
      block: the block size K.
      channels: C.
      features: D.
      input_mask: [N, C] in [0, 1]; None if all are kept.
      output_mask: [N, D] in [0, 1]; None if all are kept.
      transforms: whether to add N per kept coefficient of either side. A sequence [N] gives instead what each further
        coefficient of a channel adds per block.

    Returns:
      A float32 scalar.
    """
    num_coefs, blocks = block * block, _blocks(size, block)

    def widths(mask: jax.Array | None, full: int) -> jax.Array:
        return jnp.full(num_coefs, float(full)) if mask is None else mask.astype(jnp.float32).sum(axis=1)

    inputs, outputs = widths(input_mask, channels), widths(output_mask, features)
    macs = inputs @ outputs
    if not isinstance(transforms, bool):
        macs += (inputs + outputs) @ jnp.asarray(transforms, jnp.float32)
    elif transforms:
        macs += num_coefs * (inputs.sum() + outputs.sum())
    return blocks * macs
