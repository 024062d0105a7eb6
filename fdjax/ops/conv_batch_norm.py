"""A convolution and the batch norm after it as one function for training on the CPU, with hand-written gradients.

Memory bandwidth is the bottleneck on the CPU. What can be computed from the narrow side of a layer is not read from its
wide side, and what is read twice is read while it is in cache. On other backends, the convolution followed by
`batch_norm` is faster.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdjax.ops.activation import relu6
from fdjax.ops.chunks import over_chunks
from fdjax.ops.depthwise import correlate, correlate_grads, output_size, pad_map, unpad_map
from fdjax.ops.materialize import materialize

_AXES = (0, 1, 2)
_OVER_ROWS = (((0,), (0,)), ((), ()))


def pointwise_batch_norm(
    x: jax.Array, kernel: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes a 1x1 convolution, normalised by its batch's own statistics; cheap where C is smaller than D.

    The mean and variance of the output follow from the mean and covariance of the input: var(x k) = k' cov(x) k. In the
    same way, the sums that the gradient of batch norm needs are part of the product that the kernel's gradient needs.

    Args:
      x: [B, H, W, C].
      kernel: [C, D].
      scale: [D].
      bias: [D].
      epsilon: added to the variance, above 0.

    Returns:
      (y, mean, variance): the result [B, H, W, D], and the mean and variance [D] of the convolution's output, which
      pass no gradient.
    """
    return _pointwise(x, kernel, scale, bias, epsilon)


def _pointwise_forward(x, kernel, scale, bias, epsilon):
    rows = x.reshape(-1, x.shape[-1])
    count, dtype = rows.shape[0], scale.dtype
    wide_kernel = kernel.astype(dtype)
    centre = jnp.mean(rows.astype(dtype), axis=0)
    # The column of ones carries the bias forward, and the sum of the gradient back.
    ones = jnp.ones((count, 1), x.dtype)
    rows = lax.optimization_barrier(jnp.concatenate([(rows - centre.astype(x.dtype)), ones], axis=1))
    products = lax.dot_general(rows, rows, _OVER_ROWS, preferred_element_type=dtype)
    spread = products[:-1, :-1] / count @ wide_kernel
    variance = jnp.maximum(jnp.sum(wide_kernel * spread, axis=0), 0)
    slope = scale * lax.rsqrt(variance + epsilon)
    folded = jnp.concatenate([wide_kernel * slope, bias[None]]).astype(x.dtype)
    y = jnp.dot(rows, folded).reshape(*x.shape[:-1], -1)
    return (y, centre @ wide_kernel, variance), (rows, kernel, scale, variance, spread)


def _pointwise_backward(epsilon, residuals, gradients):
    rows, kernel, scale, variance, spread = residuals
    # Without the barrier, XLA computes g a second time, in a transposed layout, for the product with the rows.
    g = lax.optimization_barrier(gradients[0])
    shape, g = g.shape, g.reshape(-1, g.shape[-1])
    count, dtype = rows.shape[0], scale.dtype
    wide_kernel = kernel.astype(dtype)
    inverse = lax.rsqrt(variance + epsilon)
    slope = scale * inverse
    products = lax.dot_general(rows, g, _OVER_ROWS, preferred_element_type=dtype)
    products, sum_g = products[:-1], products[-1]
    sum_gx = jnp.sum(wide_kernel * products, axis=0) * inverse
    # The gradient to the convolution's output is slope * g + factor * (output - mean) - slope * sum_g / count.
    factor = -slope * sum_gx * inverse / count
    dkernel = products * slope + count * spread * factor
    from_rows = jnp.concatenate(
        [(wide_kernel * factor) @ wide_kernel.T, -(wide_kernel @ (slope * sum_g / count))[None]]
    )
    dx = jnp.einsum("nd,cd->nc", g, (wide_kernel * slope).astype(g.dtype)) + rows @ from_rows.astype(rows.dtype)
    return dx.reshape(*shape[:-1], -1), dkernel.astype(kernel.dtype), sum_gx, sum_g


def _pointwise_value(x, kernel, scale, bias, epsilon):
    return _pointwise_forward(x, kernel, scale, bias, epsilon)[0]


_pointwise: Any = jax.custom_vjp(_pointwise_value, nondiff_argnums=(4,))
_pointwise.defvjp(_pointwise_forward, _pointwise_backward)


def depthwise_batch_norm(
    x: jax.Array,
    kernel: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    stride: int,
    padding: str,
    epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes ReLU6, a depthwise convolution, batch norm by the batch's own statistics, and ReLU6 again.

    Args:
      x: [B, H, W, C], before its ReLU6 (a second ReLU6 changes nothing).
      kernel: [window, window, C].
      scale: [C].
      bias: [C].
      stride: 1 or more.
      padding: "same" or "torch", as in `depthwise_conv`.
      epsilon: added to the variance, above 0.

    Returns:
      (y, mean, variance): the result [B, H', W', C], and the mean and variance [C] of the convolution's output, which
      pass no gradient.
    """
    return _depthwise(x, kernel, scale, bias, stride, padding, epsilon)


def _depthwise_forward(x, kernel, scale, bias, stride, padding, epsilon):
    padded = materialize(pad_map(relu6(x), stride, padding, kernel.shape[0]))
    size = output_size((x.shape[1], x.shape[2]), stride)
    convolved = lax.optimization_barrier(correlate(padded, kernel.astype(x.dtype), size, stride))
    count, wide = convolved.size // convolved.shape[-1], convolved.astype(scale.dtype)
    mean = jnp.sum(wide, _AXES) / count
    variance = jnp.sum(jnp.square(wide - mean), _AXES) / count
    slope = scale * lax.rsqrt(variance + epsilon)
    y = relu6(convolved * slope.astype(x.dtype) + (bias - mean * slope).astype(x.dtype))
    # x[:0] hands on the size of x, which no other residual has.
    return (y, mean, variance), (padded, convolved, kernel, scale, bias, mean, variance, x[:0])


def _depthwise_backward(stride, padding, epsilon, residuals, gradients):
    padded, convolved, kernel, scale, bias, mean, variance, like = residuals
    size = (like.shape[1], like.shape[2])
    count, narrow = convolved.size // convolved.shape[-1], convolved.dtype
    inverse = lax.rsqrt(variance + epsilon)
    slope = scale * inverse
    narrow_slope, offset = slope.astype(narrow), (bias - mean * slope).astype(narrow)

    def through_relu6(convolved, g):
        normalised = convolved * narrow_slope + offset
        return jnp.where((normalised > 0) & (normalised < 6), g, 0)

    def sums(convolved, g):
        g = through_relu6(convolved, g).astype(mean.dtype)
        return (jnp.sum(g, _AXES), jnp.sum(g * (convolved.astype(mean.dtype) - mean), _AXES)), ()

    g = gradients[0]
    (sum_g, sum_gx), _ = over_chunks(sums, (convolved, g))
    sum_gx = sum_gx * inverse
    factor = -slope * sum_gx * inverse / count
    constant = (-slope * sum_g / count - factor * mean).astype(narrow)
    factor, taps = factor.astype(narrow), kernel.astype(narrow)

    def grads(padded, convolved, g):
        g = narrow_slope * through_relu6(convolved, g) + (factor * convolved + constant)
        dx, dkernel = correlate_grads(padded, g, taps, size, stride, padding)
        x = unpad_map(padded, size, stride, padding, taps.shape[0])
        return dkernel, jnp.where((x > 0) & (x < 6), dx, 0)

    dkernel, dx = over_chunks(grads, (padded, convolved, g))
    return dx, dkernel.astype(kernel.dtype), sum_gx, sum_g


def _depthwise_value(x, kernel, scale, bias, stride, padding, epsilon):
    return _depthwise_forward(x, kernel, scale, bias, stride, padding, epsilon)[0]


_depthwise: Any = jax.custom_vjp(_depthwise_value, nondiff_argnums=(4, 5, 6))
_depthwise.defvjp(_depthwise_forward, _depthwise_backward)
