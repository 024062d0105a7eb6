"""Convolutions of a frozen network in XLA: on the CPU in the fastest form, elsewhere the library's."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

from fdjax.frozen.products import Window
from fdjax.ops.conv import conv_with_pads
from fdjax.ops.depthwise import correlate
from fdjax.ops.materialize import materialize

# A convolution of images is written as shifted multiply-adds, so that XLA fuses the following operations with it.
_MAX_SHIFTED_CHANNELS = 4
_MAX_SHIFTED_WINDOW = 3


def _library(x: jax.Array, kernel: jax.Array, window: Window, groups: int) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window.stride,
        window.pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        rhs_dilation=window.dilation,
        feature_group_count=groups,
    )


def depthwise(x: jax.Array, kernel: jax.Array, window: Window, *, from_memory: bool = False) -> jax.Array:
    """Computes a depthwise convolution.

    Args:
      x: [B, H, W, C].
      kernel: [rows, columns, C].
      window: the window; static.
      from_memory: whether to store `x` first, if it is expensive to compute; XLA on the CPU would compute it again for
        the middle tap.

    Returns:
      [B, H', W', C].
    """

    def on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if window.dilation != (1, 1):
            return _shifted(x, kernel, window)
        padded = _padded(x, window)
        return correlate(materialize(padded) if from_memory else padded, kernel, window.out_size, window.stride)

    def elsewhere(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _library(x, kernel[:, :, None], window, x.shape[-1])

    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=elsewhere)


def _padded(x: jax.Array, window: Window) -> jax.Array:
    """Pads a map by zeros; negative padding leaves rows or columns out."""
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*pads, 0) for pads in window.pads), (0, 0, 0)))


def _shifted(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Sums a map times each tap; the kernel is [rows, columns, C], or [rows, columns, C, D] for few channels C."""
    padded = _padded(x, window)
    last = [(length - 1) * stride + 1 for length, stride in zip(window.out_size, window.stride, strict=True)]
    terms = []
    for i, j in itertools.product(*map(range, window.window)):
        top, left = i * window.dilation[0], j * window.dilation[1]
        stop = (x.shape[0], top + last[0], left + last[1], x.shape[3])
        view = lax.slice(padded, (0, top, left, 0), stop, (1, *window.stride, 1))
        if kernel.ndim == 3:
            terms.append(view * kernel[i, j])
        else:
            terms += [view[..., c : c + 1] * kernel[i, j, c] for c in range(x.shape[3])]
    return functools.reduce(jnp.add, terms)


def convolve(x: jax.Array, kernel: jax.Array, window: Window, groups: int, *, of_images: bool) -> jax.Array:
    """Computes a convolution.

    Args:
      x: [B, H, W, C].
      kernel: [rows, columns, C / groups, D].
      window: the window; static.
      groups: number of groups; divides C and D.
      of_images: whether `x` is cheap to compute again, such as images minus their mean.

    Returns:
      [B, H', W', D].
    """
    channels, outputs = x.shape[-1], kernel.shape[-1]
    if groups > 1 and groups == channels == outputs:
        return depthwise(x, kernel[:, :, 0], window, from_memory=True)
    narrow = 0 < channels <= _MAX_SHIFTED_CHANNELS and max(window.window) <= _MAX_SHIFTED_WINDOW
    if groups == 1 and of_images and narrow:
        shifted = functools.partial(_shifted, window=window)
        library = functools.partial(_library, window=window, groups=1)
        return lax.platform_dependent(x, kernel, cpu=shifted, default=library)
    if min(itertools.chain(*window.pads)) < 0:
        # XLA on the CPU reads beside the map where padding is negative on one side and positive on the other (0.10.2).
        x, window = _padded(x, window), dataclasses.replace(window, pads=((0, 0), (0, 0)))
    if window.dilation != (1, 1):
        return _library(x, kernel, window, groups)
    return conv_with_pads(x, kernel, window.stride, window.pads, groups)
