"""Counting multiply-accumulates: exact integers for hard masks, a differentiable expectation for soft ones.

Two conventions. The paper's (section 3.1): N multiply-accumulates for each coefficient computed, and every band's dense
product. And the cheapest exact form: no transform where counts are only 0 and N, separable transforms where they are
cheaper, nothing for coefficients that one of the two sides drops, for tied masks a chain for each group of channels.
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
      pruned: the kept products of every band, no transforms.
      full_transforms: nothing pruned, with the full DCT and inverse DCT, by the paper's convention.
      paper_total: `pruned` and N for each kept coefficient of either side (a released layer has no transforms).
      total: the cheapest exact form, transforms included.
      form: its name: "dense", "channels" (fewer channels, no transform) or "bands".
    """

    dense: int
    pruned: int
    full_transforms: int
    paper_total: int
    total: int
    form: str


def conv_macs(out_size: Size, in_channels: int, out_channels: int, window: int = 1) -> int:
    """A convolution with a square window and no groups: H' * W' * C * D * window**2."""
    return out_size[0] * out_size[1] * in_channels * out_channels * window**2


def depthwise_macs(out_size: Size, channels: int, window: int = 3) -> int:
    """A depthwise convolution: H' * W' * C * window**2."""
    return out_size[0] * out_size[1] * channels * window**2


@functools.cache
def block_transform_macs(block: int, count: int) -> int:
    """The cheapest truncated transform (either direction) of one block to or from its first `count` coefficients.

    Direct: N for each coefficient. Separable: K*K for each row (or column) frequency in use, then K for each
    coefficient.
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
    """One block's transforms of all channels, by histogram of kept counts."""
    return int(histogram @ _transform_costs(block))


@functools.cache
def _transform_costs(block: int) -> np.ndarray:
    """`block_transform_macs` by count, 0..N."""
    return np.array([block_transform_macs(block, count) for count in range(block**2 + 1)])


def _widths(histogram: np.ndarray) -> np.ndarray:
    """How many channels keep coefficient n, for n = 0..N-1."""
    return histogram[::-1].cumsum()[::-1][1:]


def whole_channels(histogram: np.ndarray) -> bool:
    """Whether all kept counts are 0 or N, so that no transform is needed."""
    return not histogram[1:-1].any()


def pointwise_macs(
    size: Size, block: int, input_counts: np.ndarray, output_counts: np.ndarray, released: bool = False
) -> PointwiseMacs:
    """Counts a wrapped pointwise layer on a map of `size`.

    Args:
      size: (H, W).
      block: K.
      input_counts: kept counts [C], 0..N.
      output_counts: kept counts [D], 0..N.
      released: the gate has released the layer: it is never transformed.
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
    """A wrapped pointwise layer under any masks on coefficients, prefixes or not: (pruned, paper_total).

    A coefficient of an input channel is multiplied for an output channel where both keep it, and a transform takes N
    for each coefficient that is kept (the paper, section 3.1). Of prefixes it is what `pointwise_macs` counts.

    Args:
      size: (H, W).
      block: K.
      input_mask: bool [N, C].
      output_mask: bool [N, D].
      released: the gate has released the layer: it is never transformed.
    """
    inputs, outputs = (mask.sum(axis=1) for mask in (input_mask, output_mask))
    products, transforms = int(inputs @ outputs), block * block * int(inputs.sum() + outputs.sum())
    plain = all((mask == mask[:1]).all() for mask in (input_mask, output_mask))
    pruned = size[0] * size[1] * int(inputs[0] * outputs[0]) if plain else _blocks(size, block) * products
    return pruned, pruned if released and plain else _blocks(size, block) * (products + transforms)


def cheapest_pointwise(size: Size, block: int, inputs: np.ndarray, outputs: np.ndarray) -> tuple[int, str]:
    """(MACs, form) of a pointwise layer in its cheapest exact form, from histograms [N+1] of kept counts."""
    input_widths, output_widths = _widths(inputs), _widths(outputs)
    # A coefficient that one side drops altogether is not needed on the other.
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
    """Multiply-accumulates of one depthwise channel whose input is constant in every block.

    Taps that fall into the same block are combined beforehand and count once; taps on the padding count like others,
    as they do in the dense count.
    """

    def along(size_out: int, before: int) -> int:
        first = np.arange(size_out) * stride - before
        blocks_of_taps = (first[:, None] + np.arange(window)) // block
        return int(sum(len(set(row)) for row in blocks_of_taps))

    return along(out_size[0], pads[0]) * along(out_size[1], pads[1])


class RunMacs(NamedTuple):
    """Multiply-accumulates of a run: its first layer, the depthwise layer after it, its last layer."""

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
    """A run with tied masks, group by group: what lies between a pointwise layer that widens and one that narrows.

    The wide channels with one kept count g form a group with its own writer -> depthwise -> reader chain. g = N runs in
    the spatial domain; g = 1 wholly at block resolution (a bias and an activation keep a block-constant map
    block-constant); other groups take g coefficients of the narrow input, return to pixels for the depthwise layer, and
    send g coefficients to the narrow output. The transforms of the narrow sides are shared by the groups.

    Args:
      counts: kept counts [E] of the wide channels.
      block: K, the same on both maps.
      in_channels: C of the writer.
      out_channels: D of the reader.
      in_size: the writer's map.
      out_size: the reader's map.
      taps_of_mean: `block_constant_taps` for this depthwise layer.
      window: of the depthwise layer.
      narrow_transforms: count the transforms that the groups share.
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
    """The paper's count with coefficient masks read as expectations: differentiable, exact when masks are 0 or 1.

    Args:
      size: (H, W).
      block: K.
      channels: C.
      features: D.
      input_mask: [N, C] in [0, 1]; None: all kept.
      output_mask: [N, D] in [0, 1]; None: all kept.
      transforms: add N for each kept coefficient of either side; or [N], what each further coefficient of a channel
        adds in each block.

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
