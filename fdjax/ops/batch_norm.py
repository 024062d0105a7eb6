"""Batch norm for training, optionally followed by ReLU6, with a hand-written gradient.

Automatic differentiation keeps several arrays of the size of the map and reads them repeatedly, which is slow where
memory bandwidth is the bottleneck. The arithmetic is the same on every backend.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_AXES = (0, 1, 2)


def _statistics(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the mean and variance [C] of x [B, H, W, C] in one pass.

    A plain one-pass variance loses precision when the mean is large compared with the deviation. Sums about `shift`, a
    guess of the mean, keep it as long as the guess is close.
    """
    count = x.size // x.shape[-1]
    centred = x.astype(shift.dtype) - shift
    first = jnp.sum(centred, _AXES) / count
    second = jnp.sum(jnp.square(centred), _AXES) / count
    return first + shift, jnp.maximum(second - jnp.square(first), 0)


def _apply(x: jax.Array, slope: jax.Array, offset: jax.Array, relu6: bool) -> jax.Array:
    y = x * slope.astype(x.dtype) + offset.astype(x.dtype)
    return jnp.clip(y, 0, 6) if relu6 else y


def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, shift: jax.Array, epsilon: float, relu6: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises a map by the statistics of its own batch.

    Args:
      x: the map, [B, H, W, C].
      scale: [C].
      bias: [C].
      shift: a guess of the mean, [C], such as the running average. It changes the result by rounding error only.
      epsilon: added to the variance, above 0.
      relu6: whether to clip the result to [0, 6].

    Returns:
      (y, mean, variance): the result [B, H, W, C], and the batch's mean and variance [C], which pass no gradient.
    """
    return _batch_norm(x, scale, bias, shift, epsilon, relu6)


def _normalise(x, scale, bias, shift, epsilon, relu6):
    mean, variance = _statistics(lax.optimization_barrier(x), shift)
    slope = scale * lax.rsqrt(variance + epsilon)
    return _apply(x, slope, bias - mean * slope, relu6), mean, variance


def _forward(x, scale, bias, shift, epsilon, relu6):
    x = lax.optimization_barrier(x)
    y, mean, variance = _normalise(x, scale, bias, shift, epsilon, relu6)
    return (y, mean, variance), (x, scale, bias, mean, variance)


def _backward(epsilon, relu6, residuals, gradients):
    x, scale, bias, mean, variance = residuals
    g = gradients[0]
    count = x.size // x.shape[-1]
    inverse = lax.rsqrt(variance + epsilon)
    slope = scale * inverse
    if relu6:
        offset = bias - mean * slope
        y = x * slope.astype(x.dtype) + offset.astype(x.dtype)
        g = jnp.where((y > 0) & (y < 6), g, 0)
    g = lax.optimization_barrier(g)
    wide = g.astype(mean.dtype)
    sum_g = jnp.sum(wide, _AXES)
    # d loss / d scale. Sums about the mean stay accurate where x lies far from zero.
    sum_gx = jnp.sum(wide * (x.astype(mean.dtype) - mean), _AXES) * inverse
    factor = -slope * sum_gx * inverse / count
    constant = -slope * sum_g / count - factor * mean
    dx = slope.astype(x.dtype) * g + (x * factor.astype(x.dtype) + constant.astype(x.dtype))
    return dx, sum_gx, sum_g, jnp.zeros_like(mean)


_batch_norm: Any = jax.custom_vjp(_normalise, nondiff_argnums=(4, 5))
_batch_norm.defvjp(_forward, _backward)
