"""Batch norm as a module, with the convolution before it and the ReLU6 after it."""

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
    """Some of a layer's channels.

    Attributes:
      indices: which, ascending.
      total: how many the layer has.
    """

    indices: tuple[int, ...]
    total: int

    def of(self, values: jax.Array) -> jax.Array:
        """[..., total] -> [..., len(indices)]."""
        return values[..., np.array(self.indices, int)]


class Pointwise(NamedTuple):
    """A dense 1x1 convolution; kernel [C, D]."""

    kernel: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return dense_pointwise(x, self.kernel.astype(x.dtype))


class Depthwise(NamedTuple):
    """ReLU6 and a 3x3 depthwise convolution; kernel [3, 3, C]."""

    kernel: jax.Array
    stride: int
    padding: str

    def __call__(self, x: jax.Array) -> jax.Array:
        return depthwise_conv(relu6(x), self.kernel, self.stride, self.padding)


class BatchNorm(nn.Module):
    """Batch norm over [B, H, W, C] with scale and bias; variables are named as Flax's own `nn.BatchNorm` names them.

    Attributes:
      use_running_average: normalise by the running averages, and leave them as they are.
      momentum: of the running averages.
      epsilon: added to the variance.
      relu6: clip the result to [0, 6].
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
        """x [B, H, W, C] -> the same shape, or what `convolution` makes of it, which then comes before the norm.

        In training on the CPU the two are one function where that is faster. With `channels`, what comes is these
        channels only, and the variables of the others stay as they are.
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
