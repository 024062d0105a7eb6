"""Block means: where only the first coefficient of each block counts, no transform is needed.

The first coefficient of a block is K times its mean. The gradients are written by hand, because automatic
differentiation of the slices would add up K*K maps that are mostly zeros.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp


def _sums(x: jax.Array, block: int) -> jax.Array:
    """Sums each block: [..., H, W, C] -> [..., R, S, C], where K divides H and W."""
    *leading, height, width, channels = x.shape
    blocks = x.reshape(*leading, height // block, block, width // block, block, channels)
    # On the CPU, XLA runs a sum of slices as one loop; a reduction over inner axes is several times slower.
    pixels = itertools.product(range(block), repeat=2)
    return functools.reduce(jnp.add, (blocks[..., row, :, column, :] for row, column in pixels))


def _spread(y: jax.Array, block: int) -> jax.Array:
    *leading, rows, columns, channels = y.shape
    blocks = jnp.broadcast_to(y[..., :, None, :, None, :], (*leading, rows, block, columns, block, channels))
    return blocks.reshape(*leading, rows * block, columns * block, channels)


def block_means(x: jax.Array, block: int) -> jax.Array:
    """Computes the mean of every block.

    Args:
      x: [..., H, W, C], where K divides H and W.
      block: the block size K.

    Returns:
      [..., H/K, W/K, C].
    """
    return x if block == 1 else _block_means(x, block)


def spread_blocks(y: jax.Array, block: int) -> jax.Array:
    """Repeats each value over a block of pixels; the transpose of a block sum.

    Args:
      y: one value per block, [..., R, S, C].
      block: the block size K.

    Returns:
      [..., R*K, S*K, C].
    """
    return y if block == 1 else _spread_blocks(y, block)


def mask_around_means(x: jax.Array, mask: jax.Array, block: int) -> jax.Array:
    """Multiplies the first coefficient of every block by mask[0] and all others by mask[-1].

    Args:
      x: [..., H, W, C], where K divides H and W.
      mask: coefficient mask, [N, C]. Rows 1 to N-1 are taken to be equal.
      block: the block size K.

    Returns:
      The masked map, [..., H, W, C]. The gradient of all coefficients but the first goes to mask[-1].
    """
    return x * mask[0] if block == 1 else _mask_around_means(x, mask[0], mask[-1], block)


def _means_value(x, block):
    return _sums(x, block) / block**2


_block_means: Any = jax.custom_vjp(_means_value, nondiff_argnums=(1,))
_block_means.defvjp(
    lambda x, block: (_means_value(x, block), None), lambda block, _, g: (_spread(g / block**2, block),)
)

_spread_blocks: Any = jax.custom_vjp(_spread, nondiff_argnums=(1,))
_spread_blocks.defvjp(lambda y, block: (_spread(y, block), None), lambda block, _, g: (_sums(g, block),))


def _masked(x, first, others, block):
    return x * others + _spread(_means_value(x, block) * (first - others), block)


def _masked_backward(block, residuals, g):
    x, first, others = residuals
    axes = tuple(range(x.ndim - 1))
    of_means = jnp.sum(_means_value(g, block) * _means_value(x, block), axes) * block**2
    # The masking is a symmetric linear map, so it is its own transpose.
    dothers = jnp.sum(g * x, axes) - of_means
    return _masked(g, first, others, block).astype(x.dtype), of_means.astype(first.dtype), dothers.astype(others.dtype)


_mask_around_means: Any = jax.custom_vjp(_masked, nondiff_argnums=(3,))
_mask_around_means.defvjp(
    lambda x, first, others, block: (_masked(x, first, others, block), (x, first, others)), _masked_backward
)
