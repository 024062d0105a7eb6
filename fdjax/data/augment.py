"""Augmentation and normalisation as pure functions, for use inside a jitted step."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike


def normalize(
    images_BHWC: ArrayLike,
    mean: ArrayLike | Sequence[float],
    std: ArrayLike | Sequence[float],
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Returns (images - mean) / std, computed in at least float32.

    Args:
      images_BHWC: uint8 or float [B, H, W, C], 0..255.
      mean: [C], in units of 0..255.
      std: [C], positive, in units of 0..255.
      dtype: the result's float type.

    Returns:
      `dtype` [B, H, W, C].
    """
    images = jnp.asarray(images_BHWC)
    working = dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32
    mean_C, std_C = (jnp.asarray(value, working).reshape(1, 1, 1, -1) for value in (mean, std))
    return ((images.astype(working) - mean_C) / std_C).astype(dtype)


def random_crop(key: jax.Array, images_BHWC: jax.Array, pad: int) -> jax.Array:
    """Pads each image with `pad` zeros on each side and cuts it back to its size at a random offset of its own.

    Zeros are zeros of the raw image (black), so crop before normalising; on uint8 it is also cheapest.

    Args:
      key: PRNG key.
      images_BHWC: [B, H, W, C], any type.
      pad: 0 or more; 0 returns the images as they are.

    Returns:
      [B, H, W, C] of the same type.

    Raises:
      ValueError: `pad` is negative.
    """
    if pad < 0:
        raise ValueError(f"pad is {pad}; it must be 0 or more")
    if pad == 0:
        return images_BHWC
    size = images_BHWC.shape[1:]
    padded = jnp.pad(images_BHWC, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    offsets = jax.random.randint(key, (images_BHWC.shape[0], 2), 0, 2 * pad + 1, dtype=jnp.int32)
    # On XLA's CPU this was the fastest of nine forms: 0.13 ms for uint8 [128, 32, 32, 3] with pad 4 on two cores;
    # two passes of take_along_axis 0.27 ms, one flat take 0.5 ms, one-hot products 1.2 ms.
    zero = jnp.zeros((), jnp.int32)
    return jax.vmap(lambda image, offset: lax.dynamic_slice(image, (offset[0], offset[1], zero), size))(padded, offsets)


def random_flip(key: jax.Array, images_BHWC: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability one half.

    Args:
      key: PRNG key.
      images_BHWC: [B, H, W, C], any type.

    Returns:
      [B, H, W, C] of the same type.
    """
    flipped = jax.random.bernoulli(key, 0.5, (images_BHWC.shape[0], 1, 1, 1))
    return jnp.where(flipped, images_BHWC[:, :, ::-1], images_BHWC)


def augment(key: jax.Array, images_BHWC: jax.Array, pad: int, flip: bool) -> jax.Array:
    """Random crop, then random flip; see `random_crop` and `random_flip`.

    Args:
      key: PRNG key.
      images_BHWC: [B, H, W, C], raw (not yet normalised).
      pad: 0 or more; 0 means no crop.
      flip: whether to flip.

    Returns:
      [B, H, W, C] of the same type.

    Raises:
      ValueError: `pad` is negative.
    """
    crop_key, flip_key = jax.random.split(key)
    images_BHWC = random_crop(crop_key, images_BHWC, pad)
    return random_flip(flip_key, images_BHWC) if flip else images_BHWC
