"""One masked layer of a function, in the layout that the function uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdjax.graph.masks import SIDES, MaskedGraph, Side
from fdjax.ops.pointwise import masked_pointwise
from fdjax.pruning.side_masks import side_mask


class CoefMask(NamedTuple):
    """A coefficient mask.

    Attributes:
      coefs: [N, channels].
      around_means: whether all coefficients of a channel but the first are known to have one value.
      whole: whether all coefficients of a channel are known to have one value.
    """

    coefs: jax.Array
    around_means: bool
    whole: bool


class MaskedLayer:
    """One masked layer, in the layout that the function uses."""

    def __init__(
        self,
        graph: MaskedGraph,
        name: str,
        masks: Mapping[str, CoefMask],
        equation: Any,
        kernel_side: int,
        channels: Mapping[Side, np.ndarray] | None = None,
    ):
        """Looks up the layer's masks.

        Args:
          graph: the graph with its masks.
          name: the layer's name.
          masks: path -> coefficient mask.
          equation: the layer's equation.
          kernel_side: position of the kernel among its inputs, 0 or 1.
          channels: the channels that are at hand on each side, int; None, or no entry: all.
        """
        self._name, self._equation, self._side = name, equation, kernel_side
        self._block = graph.blocks.get(name, 1)
        # (H, W) of the layer's map, even where the function has it as tokens.
        self._size = graph.layers[name].in_size
        coefs = {path: mask.coefs for path, mask in masks.items()}
        self._masks: list[jax.Array | None] = [None, None]
        self._whole: list[jax.Array | None] = [None, None]
        self._around_means = True
        for at, side in enumerate(SIDES):
            paths = graph.paths_of(name, side)
            found = side_mask(graph, coefs, name, side)
            if found is not None and channels is not None and side in channels:
                found = found[:, channels[side]]
            if found is not None and all(masks[path].whole for path in paths):
                self._whole[at] = found[0]
            else:
                self._masks[at] = found
                self._around_means &= all(masks[path].around_means for path in paths)

    def apply(self, inputs: Sequence[Any]) -> Any:
        """Computes the layer's output.

        Args:
          inputs: the inputs of the layer's equation.

        Returns:
          The output, in the layout of the equation.
        """
        inputs = self._by_channels(list(inputs))
        if all(mask is None for mask in self._masks):
            return self._equation.primitive.bind(*inputs, **self._equation.params)
        return self._transformed(inputs[1 - self._side], inputs[self._side])

    def _by_channels(self, inputs: list[Any]) -> list[Any]:
        """Multiplies the kernel by masks of whole channels, or the input, if the convolution is grouped."""
        x, kernel, params = inputs[1 - self._side], inputs[self._side], self._equation.params
        if self._equation.primitive.name == "dot_general":
            contracted = params["dimension_numbers"][0]
            x_axis, in_axis = contracted[1 - self._side][0], contracted[self._side][0]
            out_axis = 1 - in_axis
        else:
            x_axis = params["dimension_numbers"].lhs_spec[1]
            out_axis, in_axis = params["dimension_numbers"].rhs_spec[:2]
        read, made = self._whole
        if read is not None and kernel.shape[in_axis] == x.shape[x_axis]:
            kernel = kernel * _along(read, in_axis, kernel)
        elif read is not None:
            inputs[1 - self._side] = x * _along(read, x_axis, x)
        if made is not None:
            kernel = kernel * _along(made, out_axis, kernel)
        inputs[self._side] = kernel
        return inputs

    def _transformed(self, x: Any, kernel: Any) -> Any:
        params, dtype = self._equation.params, self._equation.outvars[0].aval.dtype
        if self._equation.primitive.name == "dot_general":
            contracted = params["dimension_numbers"][0]
            kernel = jnp.moveaxis(kernel, contracted[self._side][0], 0)
            x = jnp.moveaxis(x, contracted[1 - self._side][0], -1)
            y = self._product(x, kernel)
            return (y if self._side == 1 else jnp.moveaxis(y, -1, 0)).astype(dtype)
        dimensions = params["dimension_numbers"]
        batch, channels, *sides = dimensions.lhs_spec
        outputs, given = dimensions.rhs_spec[:2]
        kernel = jnp.squeeze(jnp.moveaxis(kernel, (given, outputs), (-2, -1)), tuple(range(kernel.ndim - 2)))
        y = self._product(x.transpose(batch, *sides, channels), kernel)
        batch, channels, *sides = dimensions.out_spec
        return jnp.moveaxis(y, range(y.ndim), (batch, *sides, channels)).astype(dtype)

    def _product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        tokens = x.ndim == 3 and len(self._size) == 2 and x.shape[1] == self._size[0] * self._size[1]
        if tokens:
            x = x.reshape(x.shape[0], *self._size, x.shape[-1])
        if x.ndim < 4:
            raise ValueError(
                f"layer {self._name} reads a value of shape {x.shape} here, and read a map when the graph was traced; "
                "masks with counts between 0 and N need the map"
            )
        masks = [None if mask is None else mask.astype(x.dtype) for mask in self._masks]
        y = masked_pointwise(x, kernel, self._block, *masks, block_means=self._around_means)
        return y.reshape(y.shape[0], -1, y.shape[-1]) if tokens else y


def _along(vector: jax.Array, axis: int, like: Any) -> jax.Array:
    sides = [1] * like.ndim
    sides[axis] = vector.shape[0]
    return vector.reshape(sides).astype(like.dtype)
