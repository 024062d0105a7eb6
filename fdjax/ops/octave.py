"""Octave convolution (Chen et al. 2019, "Drop an Octave", arXiv 1904.05049): maps in two frequencies.

A map is a dict with one or both of its parts: "high" [..., H, W, C] at full resolution, and "low" [..., H/2, W/2, C']
at half the resolution with the rest of the channels. A map that has both parts has even sides.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fdjax.ops.block_means import block_means, spread_blocks
from fdjax.ops.pointwise import dense_pointwise

FREQUENCIES = ("high", "low")


class Split(NamedTuple):
    """The numbers of channels of the two parts of a map."""

    high: int
    low: int


def split_channels(channels: int, share: float) -> Split:
    """Splits `channels` so that a share of them, in [0, 1) and rounded down, is low."""
    # The product is rounded first because 0.29 * 100 is slightly less than 29.
    low = int(round(share * channels, 6))
    return Split(channels - low, low)


def product_name(source: str, target: str) -> str:
    """Returns the name of the kernel that leads from one frequency to another."""
    return f"{source}_to_{target}"


def octave_pointwise(maps: Mapping[str, jax.Array], kernels: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Computes a 1x1 octave convolution: up to four products (equations 2 and 3 of the octave paper).

    A product within a frequency is a plain one. From high to low, the map is averaged over 2x2 pixels before the
    product. From low to high, the result of the product is repeated over 2x2 pixels.

    Args:
      maps: "high" [..., H, W, C], "low" [..., H/2, W/2, C'], or both.
      kernels: one or more of "high_to_high" [C, D], "low_to_high" [C', D], "high_to_low" [C, D'] and "low_to_low" [C',
        D'].

    Returns:
      "high" [..., H, W, D] and "low" [..., H/2, W/2, D'], as far as a kernel leads to them.

    Raises:
      ValueError: the shapes do not fit, a kernel reads a frequency that is absent, or a side to be halved is odd.
    """
    _check(maps, kernels)
    made = {}
    for target in FREQUENCIES:
        parts = []
        for source in FREQUENCIES:
            kernel = kernels.get(product_name(source, target))
            if kernel is None:
                continue
            y = maps[source]
            if (source, target) == ("high", "low"):
                y = block_means(y, 2)
            y = dense_pointwise(y, kernel)
            parts.append(spread_blocks(y, 2) if (source, target) == ("low", "high") else y)
        if parts:
            made[target] = functools.reduce(jnp.add, parts)
    return made


def _check(maps: Mapping[str, jax.Array], kernels: Mapping[str, jax.Array]) -> None:
    names = [product_name(source, target) for source in FREQUENCIES for target in FREQUENCIES]
    for name in kernels:
        if name not in names:
            raise ValueError(f"unknown kernel {name!r}; the kernels are {', '.join(names)}")
        source = name.partition("_")[0]
        if source not in maps:
            raise ValueError(f"the kernel {name} needs a map {source!r}, which is absent")
    sizes = {name: x.shape[-3:-1] for name, x in maps.items()}
    if "low" in sizes and "high" in sizes and sizes["high"] != tuple(2 * length for length in sizes["low"]):
        raise ValueError(
            f"the high map must have twice the sides of the low one, got {sizes['high']} and {sizes['low']}"
        )
    if "high_to_low" in kernels and any(length % 2 for length in sizes["high"]):
        raise ValueError(f"a map of {sizes['high']} cannot be halved; give even sides")
