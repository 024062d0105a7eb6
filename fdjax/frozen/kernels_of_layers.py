"""Brings a layer's kernel to one layout, and computes what the layer makes of a constant map."""

from __future__ import annotations

from collections.abc import Container

import numpy as np

from fdjax.frozen.layers import uniform
from fdjax.frozen.products import Window
from fdjax.graph.network import Layer
from fdjax.graph.operations import Operation
from fdjax.ops.blocks import num_blocks
from fdjax.ops.dct import dct_basis


def image_and_kernel(operation: Operation, live: Container[int]) -> tuple[int, int]:
    """Returns which input of a layer's operation depends on the image, and which is the kernel."""
    return (0, 1) if operation.inputs[0] in live else (1, 0)


def plain_kernel(layer: Layer, operation: Operation, kernel_side: int, kernel: np.ndarray) -> np.ndarray:
    """Brings a kernel to the layout of frozen networks.

    Args:
      layer: the layer.
      operation: the layer's operation.
      kernel_side: which of the operation's inputs is the kernel.
      kernel: the kernel in the operation's layout.

    Returns:
      [rows, columns, C / groups, D], or [C, D] for a pointwise or dense layer.

    Raises:
      ValueError: if the window is not two-dimensional.
    """
    if operation.kind == "dot_general":
        contracted = operation.params["dimension_numbers"][0]
        return kernel if contracted[kernel_side][0] == 0 else kernel.T
    dimensions = operation.params["dimension_numbers"].rhs_spec
    kernel = kernel.transpose(*dimensions[2:], dimensions[1], dimensions[0])
    if layer.kind == "pointwise":
        return kernel.reshape(kernel.shape[-2:])
    if kernel.ndim != 4:
        raise ValueError(f"layer {layer.name} has a window of {kernel.ndim - 2} dimensions; a frozen one has two")
    return kernel


def spread_of(operation: Operation) -> tuple[int, ...]:
    """Returns the dilation of a convolution's input, which is above 1 for a transposed convolution."""
    return tuple(operation.params["lhs_dilation"]) if operation.kind == "conv_general_dilated" else (1, 1)


def window_of(layer: Layer, operation: Operation) -> Window | None:
    """Returns the window of a convolution; None for a pointwise or dense layer.

    The window of a transposed convolution is on its map with zeros between the pixels.
    """
    if operation.kind == "dot_general" or layer.kind == "pointwise":
        return None
    params = operation.params
    height, width = ((side - 1) * step + 1 for side, step in zip(layer.in_size, spread_of(operation), strict=True))
    (top, bottom), (left, right) = ((int(before), int(after)) for before, after in params["padding"])
    return Window(
        window=(layer.window[0], layer.window[1]),
        stride=(layer.stride[0], layer.stride[1]),
        pads=((top, bottom), (left, right)),
        in_size=(height, width),
        out_size=(layer.out_size[0], layer.out_size[1]),
        dilation=(params["rhs_dilation"][0], params["rhs_dilation"][1]),
    )


def masked_kernel(kernel: np.ndarray, groups: int, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Sets a kernel to zero for the channels that masks remove.

    Args:
      kernel: [..., C / groups, D].
      groups: number of groups.
      inputs: kept counts of the input, int [C].
      outputs: kept counts of the output, int [D].

    Returns:
      The masked kernel.
    """
    return scale_inputs(kernel, (inputs > 0).astype(float), groups) * (outputs > 0)


def scale_inputs(kernel: np.ndarray, scale: np.ndarray, groups: int) -> np.ndarray:
    """Scales the inputs of a kernel.

    Args:
      kernel: [..., C / groups, D].
      scale: [C].
      groups: number of groups.

    Returns:
      The scaled kernel.
    """
    if groups == 1:
        return kernel * scale[:, None]
    inputs, outputs = kernel.shape[-2:]
    return kernel * np.repeat(scale.reshape(groups, inputs), outputs // groups, axis=0).T


def offset_through(
    kernel: np.ndarray,
    offset: np.ndarray,
    window: Window | None,
    layer: Layer,
    block: int | None,
    counts: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Computes what a layer makes of an offset, that is of a map that is the same for every image.

    Args:
      kernel: the kernel, as `plain_kernel` returns it.
      offset: [C] or [..., C].
      window: the window of a convolution; None for a pointwise or dense layer.
      layer: the layer.
      block: K of a wrapped layer, else None.
      counts: kept counts of its input, int [C], and its output, int [D]; 1 on sides without masks.

    Returns:
      [D], or [H', W', D] if it differs over the map.
    """
    if not offset.any():
        return np.zeros(kernel.shape[-1])
    if window is not None:
        return uniform(
            convolve(np.broadcast_to(offset, (*window.in_size, offset.shape[-1])), kernel, window, layer.groups)
        )
    inputs, outputs = counts
    if offset.ndim == 1 or block in (None, 1):
        # Blocks of one pixel have one coefficient, and of a constant map only coefficient 0 is not zero: each channel
        # with a count above 0 keeps that.
        return uniform(((offset * (inputs > 0)) @ kernel) * (outputs > 0))
    return uniform(masked_product(offset, kernel, block, inputs, outputs))


def convolve(x: np.ndarray, kernel: np.ndarray, window: Window, groups: int) -> np.ndarray:
    """Computes a convolution of one map in float64.

    Args:
      x: [H, W, C].
      kernel: [rows, columns, C / groups, D].
      window: the window.
      groups: number of groups.

    Returns:
      [H', W', D].
    """
    (height, width), (down, right) = window.out_size, window.stride
    # Negative padding cuts pixels off.
    cut = tuple(slice(max(0, -before), side + min(0, after)) for (before, after), side in
                zip(window.pads, window.in_size, strict=True))  # fmt: skip
    padded = np.pad(x[cut], (*((max(0, before), max(0, after)) for before, after in window.pads), (0, 0)))
    made = np.zeros((height, width, kernel.shape[-1]))
    varying = np.flatnonzero(x.reshape(-1, x.shape[-1]).any(axis=0))
    for i, j in np.ndindex(*kernel.shape[:2]):
        top, left = i * window.dilation[0], j * window.dilation[1]
        tap = padded[top : top + (height - 1) * down + 1 : down, left : left + (width - 1) * right + 1 : right]
        if groups == 1:
            made += tap[..., varying] @ kernel[i, j][varying]
        else:
            parts = tap.reshape(height, width, groups, -1)
            weights = kernel[i, j].reshape(kernel.shape[2], groups, -1)
            made += np.einsum("hwgi,igo->hwgo", parts, weights, optimize=True).reshape(made.shape)
    return made


def masked_product(
    x: np.ndarray, kernel: np.ndarray, block: int, input_counts: np.ndarray, output_counts: np.ndarray
) -> np.ndarray:
    """Computes `fdjax.ops.masked_pointwise` with hard masks on one map, in float64.

    Args:
      x: [H, W, C].
      kernel: [C, D].
      block: K.
      input_counts: kept counts, int [C].
      output_counts: kept counts, int [D].

    Returns:
      [H, W, D].
    """
    height, width = x.shape[:2]
    rows, columns = num_blocks(height, block), num_blocks(width, block)
    padded = np.pad(x, ((0, rows * block - height), (0, columns * block - width), (0, 0)), mode="edge")
    blocks = padded.reshape(rows, block, columns, block, -1)
    basis, bands = dct_basis(block, np.float64), np.arange(block**2)[:, None]
    coefs = np.einsum("rasbc,nab->nrsc", blocks, basis, optimize=True)
    coefs *= (bands < input_counts)[:, None, None]
    coefs = (coefs @ kernel) * (bands < output_counts)[:, None, None]
    blocks = np.einsum("nrsc,nab->rasbc", coefs, basis, optimize=True)
    return blocks.reshape(rows * block, columns * block, -1)[:height, :width]
