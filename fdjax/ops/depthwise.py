"""The depthwise convolution with a square window of odd size, in the form that is fastest on each backend.

XLA's grouped convolution is slow on the CPU. There the layer is a shifted multiply-add per tap, all fused into one
loop, with a hand-written gradient (automatic differentiation would write one padded array per tap). GPU and TPU use the
library's convolution.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdjax.ops.chunks import over_chunks
from fdjax.ops.materialize import materialize

PADDINGS = ("same", "torch")


def conv_pads(size: int, stride: int, window: int, padding: str) -> tuple[int, int]:
    """Computes the zero padding of one axis: TensorFlow's SAME, or PyTorch's window // 2 on each side.

    Args:
      size: length of the axis.
      stride: 1 or more.
      window: length of the window.
      padding: "same" or "torch".

    Returns:
      (before, after), in elements.
    """
    if padding == "torch":
        return window // 2, window // 2
    out = -(-size // stride)
    total = max((out - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


def pad_map(x: jax.Array, stride: int, padding: str, window: int = 3) -> jax.Array:
    """Adds the zeros that the layer reads beyond the edges of a map.

    Args:
      x: [B, H, W, C].
      stride: 1 or more.
      padding: "same" or "torch".
      window: size of the square window.

    Returns:
      The padded map, [B, H + top + bottom, W + left + right, C].
    """
    pads = [conv_pads(length, stride, window, padding) for length in x.shape[1:3]]
    return jnp.pad(x, ((0, 0), *pads, (0, 0)))


def unpad_map(padded: jax.Array, size: tuple[int, int], stride: int, padding: str, window: int = 3) -> jax.Array:
    """Inverts `pad_map`.

    Args:
      padded: the result of `pad_map`.
      size: (H, W) of the map without padding.
      stride: as in `pad_map`.
      padding: as in `pad_map`.
      window: as in `pad_map`.

    Returns:
      [B, H, W, C].
    """
    top, left = (conv_pads(length, stride, window, padding)[0] for length in size)
    return padded[:, top : top + size[0], left : left + size[1]]


def shifted_views(
    padded: jax.Array, size: tuple[int, int], strides: tuple[int, int], window: tuple[int, ...]
) -> list[jax.Array]:
    """Lists what each tap of a window reads.

    Args:
      padded: the padded map, [B, ..., ..., C].
      size: (H', W') of the output.
      strides: (row stride, column stride).
      window: (rows, columns) of the window.

    Returns:
      Views [B, H', W', C], row by row of the window.
    """
    batch, channels = padded.shape[0], padded.shape[-1]
    last = [(length - 1) * stride + 1 for length, stride in zip(size, strides, strict=True)]
    return [
        lax.slice(padded, (0, i, j, 0), (batch, i + last[0], j + last[1], channels), (1, *strides, 1))
        for i in range(window[0])
        for j in range(window[1])
    ]


def correlate(padded: jax.Array, kernel: jax.Array, size: tuple[int, int], stride: int | tuple[int, int]) -> jax.Array:
    """Computes the layer on a padded map by shifted multiply-adds, which XLA runs as one loop on the CPU.

    The window may be of any shape here, and the stride may differ between rows and columns.

    Args:
      padded: the padded map, [B, ..., ..., C].
      kernel: [rows, columns, C].
      size: (H', W') of the output.
      stride: one stride for both axes, or (row stride, column stride).

    Returns:
      [B, H', W', C].
    """
    strides = (stride, stride) if isinstance(stride, int) else stride
    views, taps = shifted_views(padded, size, strides, kernel.shape[:2]), kernel.reshape(-1, kernel.shape[-1])
    return functools.reduce(jnp.add, [view * tap for view, tap in zip(views, taps, strict=True)])


def output_size(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Returns (H', W') of the output for a map of `size` (H, W)."""
    return -(-size[0] // stride), -(-size[1] // stride)


def correlate_grads(
    padded: jax.Array, g: jax.Array, kernel: jax.Array, size: tuple[int, int], stride: int, padding: str
) -> tuple[jax.Array, jax.Array]:
    """Computes the gradients of `correlate(pad_map(x))`.

    Args:
      padded: `pad_map(x)`.
      g: the gradient with respect to the output, [B, H', W', C].
      kernel: [window, window, C].
      size: (H, W) of `x`.
      stride: the layer's stride.
      padding: the layer's padding, "same" or "torch".

    Returns:
      The gradients with respect to `x` [B, H, W, C], and to the kernel [window, window, C] in float32 or wider.
    """
    # With respect to the input: correlate the output's gradient, dilated by the stride, with the flipped kernel.
    window, dilation = kernel.shape[0], []
    for length, out in zip(size, g.shape[1:3], strict=True):
        before = window - 1 - conv_pads(length, stride, window, padding)[0]
        dilation.append((before, length + window - 1 - before - ((out - 1) * stride + 1), stride - 1))
    # Without the barrier, XLA computes the padding and its operand once per tap.
    dilated = lax.optimization_barrier(lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), *dilation, (0, 0, 0))))
    dx = correlate(dilated, kernel[::-1, ::-1], size, 1)

    # With respect to the kernel: one pass with an accumulator per tap. It reduces rows and columns first, because XLA
    # runs the images in parallel.
    top, left = dilation[0][0], dilation[1][0]
    last = [(out - 1) * stride + 1 for out in g.shape[1:3]]
    g = lax.slice(
        dilated, (0, top, left, 0), (g.shape[0], top + last[0], left + last[1], g.shape[3]), (1, stride, stride, 1)
    )
    dtype = jnp.promote_types(g.dtype, jnp.float32)
    views = shifted_views(padded, (g.shape[1], g.shape[2]), (stride, stride), kernel.shape[:2])
    products = [view.astype(dtype) * g.astype(dtype) for view in views]
    zeros = [jnp.zeros((), dtype)] * len(views)
    sums = lax.reduce(products, zeros, lambda a, b: [u + v for u, v in zip(a, b, strict=True)], (1, 2))
    return dx, jnp.stack(sums).sum(axis=1).reshape(kernel.shape)


def _library(x: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (stride, stride),
        [conv_pads(length, stride, kernel.shape[0], padding) for length in x.shape[1:3]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _best_form(x: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: correlate(
            pad_map(x, stride, padding, kernel.shape[0]), kernel, output_size((x.shape[1], x.shape[2]), stride), stride
        ),
        default=lambda x, kernel: _library(x, kernel, stride, padding),
    )


def _depthwise_forward(x, kernel, stride, padding):
    # In a step, several loops read the result; XLA on the CPU would compute it again in each.
    return materialize(_best_form(x, kernel, stride, padding)), (x, kernel)


def _depthwise_backward(stride, padding, residuals, g):
    def on_cpu(x, kernel, g):
        size = (x.shape[1], x.shape[2])

        def chunk(x, g):
            padded = lax.optimization_barrier(pad_map(x, stride, padding, kernel.shape[0]))
            dx, dkernel = correlate_grads(padded, g, kernel, size, stride, padding)
            return dkernel, dx

        dkernel, dx = over_chunks(chunk, lax.optimization_barrier((x, g)))
        return dx, dkernel.astype(kernel.dtype)

    def elsewhere(x, kernel, g):
        return jax.vjp(lambda x, kernel: _library(x, kernel, stride, padding), x, kernel)[1](g)

    return lax.platform_dependent(*residuals, g, cpu=on_cpu, default=elsewhere)


_depthwise: Any = jax.custom_vjp(_best_form, nondiff_argnums=(2, 3))
_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: str = "same") -> jax.Array:
    """Computes a depthwise convolution.

    Args:
      x: [..., H, W, C].
      kernel: [window, window, C], with an odd window.
      stride: 1 or more.
      padding: "same" (TensorFlow's) or "torch" (window // 2 zeros on each side). The two differ for maps with even
        sides at stride 2.

    Returns:
      [..., ceil(H/stride), ceil(W/stride), C].

    Raises:
      ValueError: the shapes do not fit, or the padding is unknown.
    """
    window = kernel.shape[0] if kernel.ndim else 0
    if x.ndim < 3 or window % 2 == 0 or kernel.shape != (window, window, x.shape[-1]):
        raise ValueError(
            f"x [..., H, W, C] and kernel [window, window, C], window odd, do not fit: got {x.shape} and {kernel.shape}"
        )
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {PADDINGS}, got {padding!r}")
    flat = x.reshape(-1, *x.shape[-3:])
    y = _depthwise(flat, kernel.astype(x.dtype), stride, padding)
    return y.reshape(*x.shape[:-3], *y.shape[1:])
