"""The frequency layer: a pointwise convolution that owns its FCMasks in the collection `fcmask`."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fdjax.ops.fcmask import coef_mask, hard_coef_mask, level_counts
from fdjax.ops.pointwise import dense_pointwise, masked_pointwise
from fdjax.zoo.normalization import BatchNorm, Channels, Pointwise

MaskMode = Literal["off", "soft", "hard"]
MASK_MODES = ("off", "soft", "hard")
FCMASK = "fcmask"


class FrequencyPointwise(nn.Module):
    """A 1x1 convolution without bias, wrapped in a blockwise DCT and its inverse, with a mask on either side.

    The masks are variables of the collection `fcmask`, named `input` [C] and `output` [D], and start at 1.0.

    Attributes:
      features: D.
      block: K, 1 to 16.
      input_side: whether the layer has a mask of its own on the input side.
      output_side: likewise on the output side.
      mode: "off" ignores the masks (a dense layer), "soft" multiplies the coefficients by the masks as learned, "hard"
        by the rounded ones.
      levels: kept counts between which soft masks fade; None for all (`fdjax.ops.fcmask.level_counts`).
      whole_channels: with mode="hard", promises that all kept counts are 0 or N: no transform is needed then.
      block_means: likewise, that they are 0, 1 or N: the means of blocks take the place of the transform. With
        mode="soft" `levels` says so.
    """

    features: int
    block: int
    input_side: bool = True
    output_side: bool = True
    mode: MaskMode = "soft"
    levels: tuple[int, ...] | None = None
    whole_channels: bool = False
    block_means: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        input_fcmask: jax.Array | None = None,
        output_fcmask: jax.Array | None = None,
        norm: BatchNorm | None = None,
        inputs: Channels | None = None,
        outputs: Channels | None = None,
    ) -> jax.Array:
        """x [B, H, W, C] -> [B, H, W, D].

        Args:
          x: the map.
          input_fcmask: [C], takes the place of an own mask.
          output_fcmask: [D], likewise.
          norm: the batch norm that follows, applied here.
          inputs: the layer's input channels that x has (and a given `input_fcmask` speaks of); the others are zero.
          outputs: the output channels that are wanted (and a given `output_fcmask` speaks of); None: all.
        """
        if self.mode not in MASK_MODES:
            raise ValueError(f"mode must be one of {MASK_MODES}, got {self.mode!r}")
        channels = x.shape[-1] if inputs is None else inputs.total
        kernel = self.param(
            "kernel", nn.initializers.variance_scaling(2.0, "fan_out", "normal"), (channels, self.features)
        ).astype(x.dtype)
        if self.input_side:
            input_fcmask = self.variable(FCMASK, "input", jnp.ones, (channels,)).value
            input_fcmask = input_fcmask if inputs is None else inputs.of(input_fcmask)
        if self.output_side:
            output_fcmask = self.variable(FCMASK, "output", jnp.ones, (self.features,)).value
            output_fcmask = output_fcmask if outputs is None else outputs.of(output_fcmask)
        kernel = kernel if inputs is None else inputs.of(kernel.T).T
        kernel = kernel if outputs is None else outputs.of(kernel)

        def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return dense_pointwise(x, kernel) if norm is None else norm(x, Pointwise(kernel), outputs)

        if self.mode == "off" or (input_fcmask is None and output_fcmask is None):
            return dense(x, kernel)

        num_coefs = self.block**2
        if self.mode == "hard" and self.whole_channels:
            if input_fcmask is not None:
                kernel = kernel * (input_fcmask > 0.5).astype(x.dtype)[:, None]
            if output_fcmask is not None:
                kernel = kernel * (output_fcmask > 0.5).astype(x.dtype)
            return dense(x, kernel)

        def to_mask(fcmask: jax.Array) -> jax.Array:
            if self.mode == "hard":
                return hard_coef_mask(fcmask, num_coefs).astype(x.dtype)
            return coef_mask(fcmask, num_coefs, self.levels).astype(x.dtype)

        masks = [None if fcmask is None else to_mask(fcmask) for fcmask in (input_fcmask, output_fcmask)]
        accepted = level_counts(num_coefs, self.levels)
        block_means = {*accepted} <= {0, 1, num_coefs} if self.mode != "hard" else self.block_means
        y = masked_pointwise(x, kernel, self.block, *masks, block_means=block_means)
        return y if norm is None else norm(y, channels=outputs)
