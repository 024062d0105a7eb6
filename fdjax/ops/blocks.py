"""Maps to blocks and back: pad, split, merge, crop.

Shape letters (whole package): H W map, C channels, K block (`block`), R = ceil(H/K) and S = ceil(W/K) blocks.
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
    """Returns how many blocks cover `size` pixels: ceil(size / block)."""
    return -(-size // block)


def pad_to_blocks(x: jax.Array, block: int) -> jax.Array:
    """Pads [..., H, W, C] at the bottom and right to multiples of `block` by repeating the edge.

    Repeating the edge commutes with a pointwise convolution, so that nothing changes when nothing is pruned; zeros
    would do too, but put energy into high frequencies that is not in the picture.
    """
    height, width = x.shape[-3], x.shape[-2]
    bottom, right = -height % block, -width % block
    if not bottom and not right:
        return x
    leading = [(0, 0)] * (x.ndim - 3)
    return jnp.pad(x, [*leading, (0, bottom), (0, right), (0, 0)], mode="edge")


def split_blocks(x: jax.Array, block: int) -> jax.Array:
    """Splits [..., H, W, C] into [..., R, K, S, K, C], padding where the block does not divide the map."""
    x = pad_to_blocks(x, block)
    *leading, height, width, channels = x.shape
    return x.reshape(*leading, height // block, block, width // block, block, channels)


def merge_blocks(blocks: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Merges [..., R, K, S, K, C] into [..., H, W, C] with (H, W) = `size`, cropping what padding added."""
    *leading, rows, block, columns, _, channels = blocks.shape
    x = blocks.reshape(*leading, rows * block, columns * block, channels)
    return x[..., : size[0], : size[1], :]
