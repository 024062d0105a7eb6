"""A batch a few images at a time, for the CPU: what one pass computes from another's result is then still in cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Bytes of the arrays that are read for one chunk: small enough for the last level of cache, large enough to keep the
# number of operations down (measured: 2.4, 5, 8 and 16 MB).
_CHUNK_BYTES = 8_000_000


def images_per_chunk(arrays: Sequence[jax.Array]) -> int:
    """How many images of `arrays` [B, ...] to take at once: a divisor of B.

    It is a multiple of the number of devices where that divides B: a batch split over them then needs no exchange.
    """
    batch = arrays[0].shape[0]
    devices = jax.device_count()
    shares = devices if batch % devices == 0 else 1
    image_bytes = sum(array.size * array.dtype.itemsize for array in arrays) // max(1, batch)
    images = max(1, min(batch // shares, _CHUNK_BYTES // max(1, image_bytes)))
    while (batch // shares) % images:
        images -= 1
    return images * shares


def over_chunks(function: Callable[..., tuple[Any, Any]], arrays: Sequence[jax.Array]) -> tuple[Any, Any]:
    """Applies `function` chunk by chunk.

    Args:
      function: chunks of `arrays` -> (sums, maps): a pytree of arrays to be added over the chunks, and a pytree of
        arrays [images, ...] that belong to the chunk's images.
      arrays: [B, ...] each.

    Returns:
      The sums over all chunks, and the maps [B, ...].
    """
    batch, images = arrays[0].shape[0], images_per_chunk(arrays)
    if images >= batch:
        return function(*arrays)
    # Chunk i holds the images i, i + B/images, ...: each device's part of the batch gives an equal share of a chunk.
    grouped = [array.reshape(images, batch // images, *array.shape[1:]) for array in arrays]
    sums, maps = jax.eval_shape(function, *(array[:, 0] for array in grouped))
    sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums)
    maps = jax.tree.map(lambda m: jnp.zeros((images, batch // images, *m.shape[1:]), m.dtype), maps)

    def add(chunk: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        more, new = function(*(lax.dynamic_index_in_dim(array, chunk, 1, keepdims=False) for array in grouped))
        sums, maps = carry
        new = lax.optimization_barrier(new)
        placed = jax.tree.map(lambda m, n: lax.dynamic_update_index_in_dim(m, n, chunk, 1), maps, new)
        return jax.tree.map(jnp.add, sums, more), placed

    sums, maps = lax.fori_loop(0, batch // images, add, (sums, maps))
    return sums, jax.tree.map(lambda m: m.reshape(batch, *m.shape[2:]), maps)
