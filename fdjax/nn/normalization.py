"""Batch norm as a module, with the ReLU6 that follows it."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from fdjax.ops.batch_norm import batch_norm


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
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] -> the same shape."""
        channels = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        var = self.variable("batch_stats", "var", jnp.ones, channels)
        if self.use_running_average or self.is_initializing():
            slope = scale * lax.rsqrt(var.value + self.epsilon)
            y = x * slope.astype(x.dtype) + (bias - mean.value * slope).astype(x.dtype)
            return jnp.clip(y, 0, 6) if self.relu6 else y
        y, batch_mean, batch_var = batch_norm(x, scale, bias, mean.value, self.epsilon, self.relu6)
        mean.value = self.momentum * mean.value + (1 - self.momentum) * batch_mean
        var.value = self.momentum * var.value + (1 - self.momentum) * batch_var
        return y
