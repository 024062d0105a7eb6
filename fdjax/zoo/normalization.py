"""Batch norm as a module, combined with the convolution before it and the ReLU6 after it."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdjax.ops.activation import relu6
from fdjax.ops.batch_norm import batch_norm
from fdjax.ops.conv_batch_norm import depthwise_batch_norm, pointwise_batch_norm
from fdjax.ops.depthwise import depthwise_conv
from fdjax.ops.platform import for_cpu
from fdjax.ops.pointwise import dense_pointwise


class Channels(NamedTuple):
    """A subset of a layer's channels.

    Attributes:
      indices: the channels, in ascending order.
      total: the number of the layer's channels.
    """

    indices: tuple[int, ...]
    total: int

    def of(self, values: jax.Array) -> jax.Array:
        """Selects the channels.

        Args:
          values: [..., total].

        Returns:
          [..., len(indices)].
        """
        return values[..., np.array(self.indices, int)]


class Pointwise(NamedTuple):
    """A dense 1x1 convolution with kernel [C, D]."""

    kernel: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return dense_pointwise(x, self.kernel.astype(x.dtype))


class Depthwise(NamedTuple):
    """ReLU6 and a depthwise convolution with kernel [window, window, C]."""

    kernel: jax.Array
    stride: int
    padding: str

    def __call__(self, x: jax.Array) -> jax.Array:
        return depthwise_conv(relu6(x), self.kernel, self.stride, self.padding)


class BatchNorm(nn.Module):
    """Batch norm over [B, H, W, C] with scale and bias; its variables have the names of Flax's `nn.BatchNorm`.

    Attributes:
      use_running_average: whether to normalise by the running averages and leave them unchanged.
      momentum: momentum of the running averages, 0 to below 1.
      epsilon: added to the variance.
      relu6: whether to clip the result to [0, 6].
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    relu6: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        convolution: Pointwise | Depthwise | None = None,
        channels: Channels | None = None,
    ) -> jax.Array:
        """Normalises a map, or the output of a convolution of it.

        In training on the CPU, the convolution and the norm are one function where that is faster.

        Args:
          x: [B, H, W, C].
          convolution: a convolution to apply before the norm.
          channels: the channels that the result has, if not all; the variables of the others stay unchanged.

        Returns:
          [B, H, W, C], or the shape of the convolution's output.
        """
        width = x.shape[-1] if convolution is None else convolution.kernel.shape[-1]
        shape = (width if channels is None else channels.total,)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        averages = [
            self.variable("batch_stats", "mean", jnp.zeros, shape),
            self.variable("batch_stats", "var", jnp.ones, shape),
        ]
        mean, var = (average.value for average in averages)
        if channels is not None:
            scale, bias, mean, var = (channels.of(values) for values in (scale, bias, mean, var))
        if self.use_running_average or self.is_initializing():
            x = x if convolution is None else convolution(x)
            slope = scale * lax.rsqrt(var + self.epsilon)
            y = x * slope.astype(x.dtype) + (bias - mean * slope).astype(x.dtype)
            return relu6(y) if self.relu6 else y

        on_cpu = for_cpu()
        if on_cpu and isinstance(convolution, Depthwise) and self.relu6:
            kernel, stride, padding = convolution
            y, batch_mean, batch_var = depthwise_batch_norm(x, kernel, scale, bias, stride, padding, self.epsilon)
        elif on_cpu and isinstance(convolution, Pointwise) and x.shape[-1] < width:
            y, batch_mean, batch_var = pointwise_batch_norm(x, convolution.kernel, scale, bias, self.epsilon)
            y = relu6(y) if self.relu6 else y
        else:
            x = x if convolution is None else convolution(x)
            y, batch_mean, batch_var = batch_norm(x, scale, bias, mean, self.epsilon, self.relu6)
        for average, old, new in zip(averages, (mean, var), (batch_mean, batch_var), strict=True):
            moved = self.momentum * old + (1 - self.momentum) * new
            if channels is not None:
                moved = average.value.at[np.array(channels.indices, int)].set(moved)
            average.value = moved
        return y
