"""Convolutions, with groups or without, in the form that is fastest on each backend.

XLA on the CPU is slow at the gradient of a kernel at large batches: it computes a convolution whose window is the whole
map. There the gradient is a product per row of the kernel's window instead.

XLA on the CPU is slow at grouped convolutions, too: in the gradient, two hundred times slower than at dense ones. On
the CPU, several groups are therefore joined into one dense convolution of about 32 input channels, with zeros between
groups. This was the fastest to train of the forms tried on one core (16 to 128 channels, a product per tap,
multiply-adds per tap), and close to the fastest in evaluation. GPU and TPU use the library's convolution.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdjax.ops.chunks import over_chunks
from fdjax.ops.depthwise import conv_pads

Pads = tuple[tuple[int, int], tuple[int, int]]

# Input channels of each dense convolution that groups are joined into.
_JOINED_CHANNELS = 32

# Bytes of a chunk of `_kernel_gradient`, small enough for its copies to stay in a core's own cache. Chosen by
# measurement among 0.06, 0.12, 0.25, 0.5 and 1 MB, at 16 and 128 images, on one core.
_GRADIENT_CHUNK_BYTES = 125_000


def _library(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads, groups: int) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def _dense_forward(x, kernel, strides, pads):
    return _library(x, kernel, strides, pads, 1), (x, kernel)


def _kernel_gradient(x: jax.Array, g: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads) -> jax.Array:
    """Computes the gradient of a kernel as a product per row of its window.

    The map's shifts by a column lie beside each other as channels. What a row of the window reads, times the output's
    gradient, is then a plain product of matrices, whose operands keep the order that they have in memory.
    """
    rows, columns, inputs, features = kernel.shape
    dtype = jnp.promote_types(g.dtype, jnp.float32)

    def chunk(x, g):
        height, width = ((length - 1) * stride + 1 for length, stride in zip(g.shape[1:3], strides, strict=True))
        padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        shifts = [lax.slice_in_dim(padded, j, j + width, strides[1], axis=2) for j in range(columns)]
        beside = lax.optimization_barrier(jnp.concatenate(shifts, axis=-1))
        output_gradient = g.reshape(-1, features)
        products = [
            lax.dot_general(
                lax.slice_in_dim(beside, i, i + height, strides[0], axis=1).reshape(-1, columns * inputs),
                output_gradient,
                (((0,), (0,)), ((), ())),
                preferred_element_type=dtype,
            )
            for i in range(rows)
        ]
        return jnp.stack(products), ()

    sums, _ = over_chunks(chunk, lax.optimization_barrier((x, g)), _GRADIENT_CHUNK_BYTES)
    return sums.reshape(kernel.shape).astype(kernel.dtype)


def _dense_backward(strides, pads, residuals, g):
    x, kernel = residuals
    (dx,) = jax.vjp(lambda x: _library(x, kernel, strides, pads, 1), x)[1](g)
    dkernel = lax.platform_dependent(
        x,
        g,
        kernel,
        cpu=lambda x, g, kernel: _kernel_gradient(x, g, kernel, strides, pads),
        default=lambda x, g, kernel: jax.vjp(lambda k: _library(x, k, strides, pads, 1), kernel)[1](g)[0],
    )
    return dx, dkernel


_dense: Any = jax.custom_vjp(
    lambda x, kernel, strides, pads: _library(x, kernel, strides, pads, 1), nondiff_argnums=(2, 3)
)
_dense.defvjp(_dense_forward, _dense_backward)


def _joined(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads, groups: int) -> jax.Array:
    rows, columns, inputs, features = kernel.shape
    outputs = features // groups
    together = max(m for m in range(1, groups + 1) if groups % m == 0 and m * inputs <= max(inputs, _JOINED_CHANNELS))
    parts = groups // together
    # [.., part, group, input, group, output], zero where the two groups differ.
    split = kernel.reshape(rows, columns, inputs, parts, together, outputs)
    dense = jnp.einsum("hwipgo,gk->hwpkigo", split, jnp.eye(together, dtype=kernel.dtype))
    dense = dense.reshape(rows, columns, parts, together * inputs, together * outputs)
    width = together * inputs
    made = [
        _library(x[..., part * width : (part + 1) * width], dense[:, :, part], strides, pads, 1)
        for part in range(parts)
    ]
    return made[0] if parts == 1 else jnp.concatenate(made, axis=-1)


def conv_with_pads(
    x: jax.Array, kernel: jax.Array, stride: int | tuple[int, int], pads: Pads, groups: int = 1
) -> jax.Array:
    """Computes `grouped_conv` with explicit zero padding.

    Unlike there, the window may be of any shape, and the stride may differ between rows and columns.

    Args:
      x: [B, H, W, C].
      kernel: [rows, columns, C / groups, D].
      stride: one stride for both axes, or (row stride, column stride).
      pads: zeros around the map, ((top, bottom), (left, right)).
      groups: a divisor of C and D.

    Returns:
      [B, H', W', D].
    """
    strides = (stride, stride) if isinstance(stride, int) else stride
    if groups == 1:
        return _dense(x, kernel, strides, pads)
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: _joined(x, kernel, strides, pads, groups),
        default=lambda x, kernel: _library(x, kernel, strides, pads, groups),
    )


def max_pool(x: jax.Array, pads: Pads) -> jax.Array:
    """Computes a 3x3 max pool with stride 2.

    Args:
      x: [B, H, W, C].
      pads: padding by minus infinity, ((top, bottom), (left, right)).

    Returns:
      [B, H', W', C].
    """
    pads_BHWC = ((0, 0), *pads, (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads_BHWC)


def grouped_conv(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: str = "same", groups: int = 1) -> jax.Array:
    """Computes a convolution with a square window.

    Args:
      x: [B, H, W, C].
      kernel: [window, window, C / groups, D].
      stride: 1 or more.
      padding: "same" (TensorFlow's) or "torch" (window // 2 zeros on each side).
      groups: a divisor of C and D. Output channel d reads the inputs of group d * groups // D.

    Returns:
      [B, ceil(H/stride), ceil(W/stride), D].

    Raises:
      ValueError: the groups do not divide the channels, or the kernel does not fit `x`.
    """
    channels, (inputs, features) = x.shape[-1], kernel.shape[2:]
    if channels != inputs * groups or features % groups:
        raise ValueError(
            f"x [B, H, W, C] and kernel [window, window, C / {groups}, D] in {groups} groups do not fit: got {x.shape} "
            f"and {kernel.shape}"
        )
    pads = tuple(conv_pads(length, stride, kernel.shape[0], padding) for length in x.shape[1:3])
    return conv_with_pads(x, kernel, stride, (pads[0], pads[1]), groups)
