"""Block means: what is left of a map of which only the first coefficients count, without any transform.

The first coefficient of a block is K times its mean. Gradients are written by hand: those of the sums' slices would be
K*K maps of zeros, added up.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp


def _sums(x: jax.Array, block: int) -> jax.Array:
    """[..., H, W, C] -> [..., R, S, C], over whole blocks."""
    *leading, height, width, channels = x.shape
    blocks = x.reshape(*leading, height // block, block, width // block, block, channels)
    # XLA's CPU runs a sum of slices as one loop; a reduction over axes in the midst of others is several times slower.
    pixels = itertools.product(range(block), repeat=2)
    return functools.reduce(jnp.add, (blocks[..., row, :, column, :] for row, column in pixels))


def _spread(y: jax.Array, block: int) -> jax.Array:
    *leading, rows, columns, channels = y.shape
    blocks = jnp.broadcast_to(y[..., :, None, :, None, :], (*leading, rows, block, columns, block, channels))
    return blocks.reshape(*leading, rows * block, columns * block, channels)


def block_means(x: jax.Array, block: int) -> jax.Array:
    """The mean of every block: x [..., H, W, C], whose sides K divides -> [..., H/K, W/K, C]."""
    return x if block == 1 else _block_means(x, block)


def spread_blocks(y: jax.Array, block: int) -> jax.Array:
    """One value a block to one a pixel: y [..., R, S, C] -> [..., R*K, S*K, C]."""
    return y if block == 1 else _spread_blocks(y, block)


def mask_around_means(x: jax.Array, mask: jax.Array, block: int) -> jax.Array:
    """Masks the coefficients of every block: the first by mask[0], all others by mask[-1].

    Args:
      x: [..., H, W, C], whose sides K divides.
      mask: [N, C].
      block: K.

    Returns:
      [..., H, W, C]. The gradient of all coefficients but the first goes to mask[-1].
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
    # The layer is its own transpose.
    return _masked(g, first, others, block), of_means, jnp.sum(g * x, axes) - of_means


_mask_around_means: Any = jax.custom_vjp(_masked, nondiff_argnums=(3,))
_mask_around_means.defvjp(
    lambda x, first, others, block: (_masked(x, first, others, block), (x, first, others)), _masked_backward
)
