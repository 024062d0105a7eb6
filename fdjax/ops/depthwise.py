"""The 3x3 depthwise convolution in the form that is fastest on each backend.

XLA's grouped convolution is slow on the CPU; there the layer is nine shifted multiply-adds, which fuse into one loop,
with a gradient written by hand (autodiff's would write nine padded arrays). GPU and TPU keep the library's own.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PADDINGS = ("same", "torch")
# Bytes of one chunk of images whose tap gradient is summed at once: what stays in a core's cache.
_CHUNK_BYTES = 1_200_000


def _pads(size: int, stride: int, padding: str) -> tuple[int, int]:
    """Zeros before and after an axis: TensorFlow's SAME, or one on each side as PyTorch's padding=1."""
    if padding == "torch":
        return 1, 1
    out = -(-size // stride)
    total = max((out - 1) * stride + 3 - size, 0)
    return total // 2, total - total // 2


def _taps(x: jax.Array, stride: int, padding: str) -> list[jax.Array]:
    """The nine shifted views [B, H', W', C] that the taps multiply, row by row."""
    batch, height, width, channels = x.shape
    out_height, out_width = -(-height // stride), -(-width // stride)
    padded = jnp.pad(x, ((0, 0), _pads(height, stride, padding), _pads(width, stride, padding), (0, 0)))
    return [
        lax.slice(
            padded,
            (0, i, j, 0),
            (batch, i + (out_height - 1) * stride + 1, j + (out_width - 1) * stride + 1, channels),
            (1, stride, stride, 1),
        )
        for i in range(3)
        for j in range(3)
    ]


def _shifted(x: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    taps = kernel.reshape(9, -1)
    return functools.reduce(jnp.add, [view * taps[t] for t, view in enumerate(_taps(x, stride, padding))])


def _shifted_input_grad(g: jax.Array, kernel: jax.Array, stride: int, padding: str, shape: tuple[int, ...]):
    """The gradient to the input: the output's gradient, dilated by the stride, under the flipped kernel."""
    batch, height, width, channels = shape
    dilation = []
    for size, out in ((height, g.shape[1]), (width, g.shape[2])):
        before = 2 - _pads(size, stride, padding)[0]
        dilation.append((before, size + 2 - before - ((out - 1) * stride + 1), stride - 1))
    padded = lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), *dilation, (0, 0, 0)))
    flipped = kernel[::-1, ::-1]
    views = [
        lax.slice(padded, (0, i, j, 0), (batch, i + height, j + width, channels)) * flipped[i, j]
        for i in range(3)
        for j in range(3)
    ]
    return functools.reduce(jnp.add, views)


def _chunk_kernel_grad(x: jax.Array, g: jax.Array, stride: int, padding: str) -> jax.Array:
    """The gradient to the taps, [9, C] in float32 or wider: one pass with nine accumulators."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    products = [view.astype(dtype) * g.astype(dtype) for view in _taps(x, stride, padding)]
    sums = lax.reduce(
        products,
        [jnp.zeros((), dtype)] * 9,
        lambda left, right: [a + b for a, b in zip(left, right, strict=True)],
        (0, 1, 2),
    )
    return jnp.stack(sums)


def _shifted_kernel_grad(x: jax.Array, g: jax.Array, stride: int, padding: str) -> jax.Array:
    """`_chunk_kernel_grad` over the batch a few images at a time, so that each chunk stays in cache."""
    batch, channels = x.shape[0], x.shape[-1]
    images = max(1, min(batch, _CHUNK_BYTES * batch // max(1, (x.size + g.size) * x.dtype.itemsize)))
    while batch % images:
        images -= 1
    if images == batch:
        total = _chunk_kernel_grad(x, g, stride, padding)
    else:
        chunks = jax.tree.map(lambda a: a.reshape(batch // images, images, *a.shape[1:]), (x, g))
        start = jnp.zeros((9, channels), jnp.promote_types(x.dtype, jnp.float32))

        def add_chunk(total: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            return total + _chunk_kernel_grad(chunk[0], chunk[1], stride, padding), None

        total, _ = lax.scan(add_chunk, start, chunks)
    return total.reshape(3, 3, channels)


def _library(x: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (stride, stride),
        [_pads(x.shape[1], stride, padding), _pads(x.shape[2], stride, padding)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _best_form(x: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: _shifted(x, kernel, stride, padding),
        default=lambda x, kernel: _library(x, kernel, stride, padding),
    )


def _depthwise_forward(x, kernel, stride, padding):
    return _best_form(x, kernel, stride, padding), (x, kernel)


def _depthwise_backward(stride, padding, residuals, g):
    def on_cpu(x, kernel, g):
        # Barriers keep XLA from fusing neighbours into the loops, which would compute them once for every tap.
        x, g = lax.optimization_barrier((x, g))
        dx = _shifted_input_grad(g, kernel, stride, padding, x.shape)
        return dx, _shifted_kernel_grad(x, g, stride, padding).astype(kernel.dtype)

    def elsewhere(x, kernel, g):
        return jax.vjp(lambda x, kernel: _library(x, kernel, stride, padding), x, kernel)[1](g)

    return lax.platform_dependent(*residuals, g, cpu=on_cpu, default=elsewhere)


_depthwise: Any = jax.custom_vjp(_best_form, nondiff_argnums=(2, 3))
_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: str = "same") -> jax.Array:
    """3x3 depthwise convolution.

    Args:
      x: [..., H, W, C].
      kernel: [3, 3, C].
      stride: 1 or more.
      padding: "same" (TensorFlow's) or "torch" (one zero on each side); they differ for even maps at stride 2.

    Returns:
      [..., ceil(H/stride), ceil(W/stride), C].

    Raises:
      ValueError: shapes that do not fit, or an unknown padding.
    """
    if x.ndim < 3 or kernel.shape != (3, 3, x.shape[-1]):
        raise ValueError(f"x [..., H, W, C] and kernel [3, 3, C] do not fit: got {x.shape} and {kernel.shape}")
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {PADDINGS}, got {padding!r}")
    flat = x.reshape(-1, *x.shape[-3:])
    y = _depthwise(flat, kernel.astype(x.dtype), stride, padding)
    return y.reshape(*x.shape[:-3], *y.shape[1:])
