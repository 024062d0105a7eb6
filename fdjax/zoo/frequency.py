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
    """A 1x1 convolution without bias between a blockwise DCT and its inverse, with a mask on either side.

    The masks are variables of the collection `fcmask`, named `input` [C] and `output` [D]; they start at 1.0.

    Attributes:
      features: D, the output channels.
      block: the block size K, 1 to 16.
      input_side: whether the layer has a mask of its own on its input side.
      output_side: whether the layer has a mask of its own on its output side.
      mode: "off" ignores the masks, so that the layer is dense. "soft" multiplies coefficients by the masks as learned.
        "hard" multiplies them by the rounded masks.
      levels: kept counts between which soft masks fade; None for all (`fdjax.ops.fcmask.level_counts`).
      whole_channels: with mode="hard", promises that all kept counts are 0 or N, so that no transform is needed.
      block_means: with mode="hard", promises that all kept counts are 0, 1 or N, so that block means replace the
        transform. With mode="soft", `levels` implies both.
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
        """Applies the layer.

        Args:
          x: the map, [B, H, W, C].
          input_fcmask: FCMask [C] to use in place of the layer's own.
          output_fcmask: FCMask [D] to use in place of the layer's own.
          norm: the batch norm that follows, which is applied here.
          inputs: the input channels that `x` (and a given `input_fcmask`) holds; the others are zero. None for all.
          outputs: the output channels to compute (and that a given `output_fcmask` holds). None for all.

        Returns:
          [B, H, W, D].

        Raises:
          ValueError: the mode is unknown.
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
        accepted = {*level_counts(num_coefs, self.levels)}
        whole_channels, block_means = accepted <= {0, num_coefs}, accepted <= {0, 1, num_coefs}
        if self.mode == "hard":
            whole_channels, block_means = self.whole_channels, self.block_means
        if whole_channels:
            # A mask is one factor a channel, and the kernel takes it without a transform.

            def factor(fcmask: jax.Array) -> jax.Array:
                return (fcmask > 0.5 if self.mode == "hard" else coef_mask(fcmask, 1)[0]).astype(x.dtype)

            kernel = kernel if input_fcmask is None else kernel * factor(input_fcmask)[:, None]
            kernel = kernel if output_fcmask is None else kernel * factor(output_fcmask)
            return dense(x, kernel)

        def to_mask(fcmask: jax.Array) -> jax.Array:
            if self.mode == "hard":
                return hard_coef_mask(fcmask, num_coefs).astype(x.dtype)
            return coef_mask(fcmask, num_coefs, self.levels).astype(x.dtype)

        masks = [None if fcmask is None else to_mask(fcmask) for fcmask in (input_fcmask, output_fcmask)]
        y = masked_pointwise(x, kernel, self.block, *masks, block_means=block_means)
        return y if norm is None else norm(y, channels=outputs)
