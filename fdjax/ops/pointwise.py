"""The pointwise (1x1) convolution in three forms: dense, masked in the frequency domain, and by bands.

Training uses `masked_pointwise`. `banded_pointwise` computes the same from a static plan by dense products only. The
layers have no bias; the caller adds it in the spatial domain, after the inverse transform.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdjax.ops.bands import BandPlan
from fdjax.ops.block_means import mask_around_means
from fdjax.ops.blocks import check_block, num_blocks, pad_to_blocks
from fdjax.ops.dct import layer_dct, layer_idct, leading_dct, leading_idct
from fdjax.ops.materialize import materialize


def _check_kernel(x: jax.Array, kernel: jax.Array) -> None:
    if x.ndim < 3 or kernel.ndim != 2 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(f"x [..., H, W, C] and kernel [C, D] do not fit: got {x.shape} and {kernel.shape}")


def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum("...c,cd->...d", x, kernel)


def _matmul_forward(x, kernel):
    return _matmul(x, kernel), (x, kernel)


def _matmul_backward(residuals, g):
    x, kernel = residuals
    # Without the barrier, XLA on the CPU computes g a second time, in a transposed layout, for the product with x.
    g = lax.optimization_barrier(g)
    rows, columns = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    dx = jnp.einsum("...d,cd->...c", g, kernel)
    dkernel = lax.dot_general(rows, columns, (((0,), (0,)), ((), ())))
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_product: Any = jax.custom_vjp(_matmul)
_product.defvjp(_matmul_forward, _matmul_backward)


def dense_pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes a 1x1 convolution.

    Args:
      x: [..., H, W, C].
      kernel: [C, D].

    Returns:
      [..., H, W, D].

    Raises:
      ValueError: the shapes do not fit.
    """
    _check_kernel(x, kernel)
    return _product(x, kernel)


def masked_pointwise(
    x: jax.Array,
    kernel: jax.Array,
    block: int,
    input_mask: jax.Array | None = None,
    output_mask: jax.Array | None = None,
    *,
    block_means: bool = False,
) -> jax.Array:
    """Computes a 1x1 convolution between a DCT and its inverse, with coefficients masked on either side (Figure 4b).

    Args:
      x: [..., H, W, C].
      kernel: [C, D].
      block: the block size K, 1 to 16.
      input_mask: [N, C], any values; None for no mask.
      output_mask: [N, D], any values; None for no mask.
      block_means: whether the caller promises that, in each channel of a mask, all coefficients but the first have the
        same value. Then block means suffice, and nothing is transformed.

    Returns:
      [..., H, W, D]. Without masks, nothing is transformed.

    Raises:
      ValueError: the shapes do not fit, or the block is out of range.
    """
    _check_kernel(x, kernel)
    check_block(block)
    for name, mask, channels in (
        ("input_mask", input_mask, kernel.shape[0]),
        ("output_mask", output_mask, kernel.shape[1]),
    ):
        if mask is not None and mask.shape != (block**2, channels):
            raise ValueError(f"{name} must have shape {(block**2, channels)}, got {mask.shape}")
    if input_mask is None and output_mask is None:
        return dense_pointwise(x, kernel)

    size = (x.shape[-3], x.shape[-2])
    if block_means:
        y = pad_to_blocks(x, block)
        y = y if input_mask is None else mask_around_means(y, input_mask, block)
        y = dense_pointwise(y, kernel)
        y = y if output_mask is None else mask_around_means(y, output_mask, block)
        return y[..., : size[0], : size[1], :]
    # The transform reads x by coefficient, not by row, and would recompute it for each.
    x = materialize(x)

    def masked(y: jax.Array, mask: jax.Array) -> jax.Array:
        # With all positions on one axis, the mask's gradient is one plain sum. Over several axes, some of length 1, XLA
        # on the CPU took 20 times as long.
        return (y.reshape(y.shape[0], -1, y.shape[-1]) * mask[:, None]).reshape(y.shape)

    # The product is linear, so the transform of a side without a mask may move across the product to the narrower side,
    # where it is cheaper.
    narrowing = kernel.shape[1] < kernel.shape[0]
    if input_mask is None and narrowing:
        y = layer_dct(dense_pointwise(x, kernel), block)
    else:
        y = layer_dct(x, block)
        if input_mask is not None:
            y = masked(y, input_mask)
            if output_mask is None and not narrowing:
                return dense_pointwise(layer_idct(y, block, size), kernel)
        y = dense_pointwise(y, kernel)
    if output_mask is not None:
        y = masked(y, output_mask)
    return layer_idct(y, block, size)


def banded_pointwise(x: jax.Array, kernel: jax.Array, plan: BandPlan) -> jax.Array:
    """Computes the layer with hard masks: one dense product per band, over channel prefixes (Figure 4c).

    Transforms are truncated per channel, so that only kept coefficients are computed.

    Args:
      x: [..., H, W, C].
      kernel: [C, D].
      plan: the static plan, with C input counts and D output counts.

    Returns:
      [..., H, W, D], equal to `masked_pointwise` with the prefix masks of the plan's counts.

    Raises:
      ValueError: the shapes do not fit each other or the plan.
    """
    _check_kernel(x, kernel)
    if kernel.shape != (len(plan.input_counts), len(plan.output_counts)):
        raise ValueError(
            f"kernel must be [{len(plan.input_counts)}, {len(plan.output_counts)}] for this plan, got {kernel.shape}"
        )
    block, size = plan.block, (x.shape[-3], x.shape[-2])
    x = x[..., np.array(plan.input_order, int)]
    kernel = kernel[np.array(plan.input_order, int)][:, np.array(plan.output_order, int)]

    # A coefficient contributes only if both sides keep it.
    num_bands = sum(1 for inputs, outputs in plan.widths if inputs and outputs)
    transformed = [
        leading_dct(x[..., start:stop], block, min(count, num_bands)) for start, stop, count in plan.input_segments
    ]
    bands = []
    for band, (inputs, outputs) in enumerate(plan.widths[:num_bands]):
        coefs = jnp.concatenate([segment[band] for segment in transformed if segment.shape[0] > band], axis=-1)
        chex.assert_axis_dimension(coefs, -1, inputs)
        bands.append(coefs @ kernel[:inputs, :outputs])

    rows, columns = num_blocks(size[0], block), num_blocks(size[1], block)
    pieces = []
    for start, stop, count in plan.output_segments:
        count = min(count, num_bands)
        coefs = [bands[band][..., start:stop] for band in range(count)]
        empty = jnp.zeros((0, *x.shape[:-3], rows, columns, stop - start), x.dtype)
        pieces.append(leading_idct(jnp.stack(coefs) if coefs else empty, block, size))
    alive = sum(stop - start for start, stop, _ in plan.output_segments)
    pieces.append(jnp.zeros((*x.shape[:-1], len(plan.output_counts) - alive), x.dtype))
    return jnp.concatenate(pieces, axis=-1)[..., np.argsort(plan.output_order).astype(int)]
