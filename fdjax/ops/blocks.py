"""Maps to blocks and back: padding, splitting, merging and cropping.

Shape letters in this package: H and W are the sides of a map, C its channels, K the block size (`block`), R = ceil(H/K)
and S = ceil(W/K) the numbers of blocks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

MAX_BLOCK = 16


def check_block(block: int) -> None:
    """Raises `ValueError` unless `block` is an integer from 1 to 16."""
    if isinstance(block, bool) or not isinstance(block, int) or not 1 <= block <= MAX_BLOCK:
        raise ValueError(f"block must be an integer from 1 to {MAX_BLOCK}, got {block!r}")


def num_blocks(size: int, block: int) -> int:
    """Returns the number of blocks that cover `size` pixels: ceil(size / block)."""
    return -(-size // block)


def pad_to_blocks(x: jax.Array, block: int) -> jax.Array:
    """Pads a map at the bottom and right to multiples of K by repeating its edge.

    Edge padding commutes with a pointwise convolution, so that the result is unchanged when nothing is pruned. Zero
    padding also commutes, but adds energy at high frequencies that the picture does not have.

    Args:
      x: [..., H, W, C].
      block: the block size K.

    Returns:
      [..., R*K, S*K, C].
    """
    height, width = x.shape[-3], x.shape[-2]
    bottom, right = -height % block, -width % block
    if not bottom and not right:
        return x
    leading = [(0, 0)] * (x.ndim - 3)
    return jnp.pad(x, [*leading, (0, bottom), (0, right), (0, 0)], mode="edge")


def split_blocks(x: jax.Array, block: int) -> jax.Array:
    """Splits a map into blocks, padding it where K does not divide its sides.

    Args:
      x: [..., H, W, C].
      block: the block size K.

    Returns:
      [..., R, K, S, K, C].
    """
    x = pad_to_blocks(x, block)
    *leading, height, width, channels = x.shape
    return x.reshape(*leading, height // block, block, width // block, block, channels)


def merge_blocks(blocks: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Merges blocks into a map and crops what padding added.

    Args:
      blocks: [..., R, K, S, K, C].
      size: (H, W) of the map.

    Returns:
      [..., H, W, C].
    """
    *leading, rows, block, columns, _, channels = blocks.shape
    x = blocks.reshape(*leading, rows * block, columns * block, channels)
    return x[..., : size[0], : size[1], :]
