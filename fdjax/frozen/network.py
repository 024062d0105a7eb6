"""A frozen network as one pure function of its arrays and the images."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax

from fdjax.frozen import kernels
from fdjax.frozen.octave import Maps
from fdjax.frozen.plan import BlockPlan, NetworkPlan

Arrays = Mapping[str, jax.Array]

# On the CPU maps beyond this leave the cache: so many images are taken at once that a block's widest map stays below.
_CHUNK_BYTES = 4_000_000


def compiler_options() -> dict[str, int]:
    """What XLA is told for a frozen network: the widest vectors the CPU has, 10% faster than 256 bits on AVX-512."""
    return {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else {}


def unit_images(plan: BlockPlan, batch: int) -> int:
    """How many images a block takes at once on the CPU: a divisor of `batch`."""
    pixels = plan.in_size[0] * plan.in_size[1]
    images = max(1, min(batch, _CHUNK_BYTES // max(1, 4 * pixels * plan.widest)))
    while batch % images:
        images -= 1
    return images


def _stages(plan: NetworkPlan, batch: int) -> list[tuple[int, list[BlockPlan]]]:
    """(images at once, blocks) in order; maps shrink, and so the number of images grows."""
    images = [unit_images(unit, batch) for unit in plan.units]
    for index in range(len(images) - 2, -1, -1):
        images[index] = min(images[index], images[index + 1])
    stages: list[tuple[int, list[BlockPlan]]] = []
    for count, unit in zip(images, plan.units, strict=True):
        if not stages or stages[-1][0] != count:
            stages.append((count, []))
        stages[-1][1].append(unit)
    return stages


def _in_chunks(function: Callable[[Maps], Maps], x: Maps, images: int) -> Maps:
    batch = jax.tree.leaves(x)[0].shape[0]
    if images >= batch:
        return function(x)
    y = lax.map(function, jax.tree.map(lambda part: part.reshape(-1, images, *part.shape[1:]), x))
    return jax.tree.map(lambda part: part.reshape(batch, *part.shape[2:]), y)


def apply(plan: NetworkPlan, arrays: Arrays, images: jax.Array, *, in_chunks: bool = False) -> jax.Array:
    """Logits [B, num_classes] of raw images.

    Args:
      plan: static.
      arrays: by name (`fdjax.frozen.kernels`).
      images: uint8 or float [B, H, W, C], 0..255.
      in_chunks: take the blocks on large maps few images at a time, for the CPU's caches.
    """

    def start(x: jax.Array) -> jax.Array:
        return kernels.stem(x.astype(arrays["stem/kernel"].dtype) - arrays["stem/mean"], arrays, plan.stem)

    x: Maps = images
    stages = _stages(plan, images.shape[0]) if in_chunks else [(1, list(plan.units))]
    for index, (count, units) in enumerate(stages):

        def stage(x: Maps, first: bool = index == 0, units: list[BlockPlan] = units) -> Maps:
            x = start(jnp.asarray(x)) if first else x
            for unit in units:
                x = kernels.block(x, arrays, unit)
            return x

        x = _in_chunks(stage, x, count) if in_chunks else stage(x)
    assert not isinstance(x, dict), "the last map is in two frequencies"
    features = x.mean(axis=(1, 2)) if plan.head is None else kernels.head(x, arrays, plan.head)
    return jnp.asarray(features @ arrays["classifier/kernel"] + arrays["classifier/bias"])
