"""Statements that the emitters of layers and runs share: transforms, products, biases, activations, placements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fdjax.frozen.native import parts
from fdjax.frozen.native.calls import Calls
from fdjax.frozen.native.source import PANEL, RANGE_OF, Source, cpp, largest_of_8, padded, round8
from fdjax.frozen.native.structs import Writer
from fdjax.frozen.products import Size
from fdjax.frozen.program import Conv, Pointwise

Arrays = Mapping[str, np.ndarray]
# Floats of the pixels that a layer computes at a time if only their means are needed.
_AT_ONCE = 8_000


def bias_of(layer: Conv | Pointwise, arrays: Arrays) -> np.ndarray:
    """Returns the bias of a layer, which may be zeros.

    Args:
      layer: the layer.
      arrays: the network's arrays, by name.

    Returns:
      [D] or [H, W, D].
    """
    return arrays[f"{layer.name}/bias"] if layer.bias != "none" else np.zeros(layer.outputs, np.float32)


def analysed(source: Source, calls: Calls, x: str, size: Size, channels: int, block: int, counts: np.ndarray) -> str:
    """Adds the transform of a map.

    Args:
      source, calls: what is added to.
      x: the map.
      size: (H, W).
      channels: number of channels.
      block: K.
      counts: number of coefficients that each channel needs, int [C].

    Returns:
      The memory of the coefficients.
    """
    source.block(block)
    (rows, columns), pitch = parts.blocks_of(size, block), round8(channels)
    table = source.table(largest_of_8(counts), "std::uint8_t")
    image, pixels = block * block * rows * columns * pitch, size[0] * size[1] * pitch
    coefs = calls.temporary(image)
    at = f"{{{x} + i * {pixels}, {size[1]}, {size[1] * pitch}, {pitch}}}"
    calls.each(
        f"to_bands<{block}>({at}, {size[0]}, {size[1]}, {pitch}, {table.text}, {coefs} + i * {image}, "
        f"{rows * columns * pitch}, {pitch});"
    )
    return coefs


def alone(
    source: Source, calls: Calls, name: str, writer: Writer, x: str, y: str, *, means: bool = False, flat: bool = False
) -> None:
    """Adds a product that is not part of a chain; with `flat` the pixels of all images are one map of one row."""
    writer = parts.with_weights(source, writer)
    rows = writer.height
    if means:
        rows = -(-max(1, _AT_ONCE // (writer.width * PANEL)) // writer.block) * writer.block
    rows = min(rows, -(-writer.height // writer.block) * writer.block)
    coefs = parts.coefs_floats(writer.block, rows, writer.width) if writer.source.text == "BANDS" else 0
    if coefs and not means:  # A few rows of blocks at a time stay in the cache.
        fitting = max(1, _AT_ONCE * 4 // parts.coefs_floats(writer.block, writer.block, writer.width)) * writer.block
        rows, coefs = min(rows, fitting), parts.coefs_floats(writer.block, min(rows, fitting), writer.width)
    source.needs(coefs + (rows * writer.width * PANEL if means else 0))
    part, images = source.constant(writer, name), "n"
    if flat:
        part, images = f"across({part}, n)", "1"
    calls.add(f"layer({part}, {rows}, {cpp(means)}, {x}, {{w}}, scratch, {y}, {images}, ahead);")


def add_bias(source: Source, calls: Calls, pixels: int, bias: np.ndarray, added: str | None, y: str) -> None:
    """Adds the initial values of a map: a bias, and for each image the map `added`.

    Args:
      source, calls: what is added to.
      pixels: number of pixels of the map.
      bias: [D] or [H, W, D].
      added: a map, or None.
      y: the map.
    """
    pitch = round8(bias.shape[-1])
    step, image = pitch if bias.ndim > 1 else 0, pixels * pitch
    more = "nullptr" if added is None else f"{added} + i * {image}"
    where = source.weight(padded(bias))
    calls.each(f"start_map({pixels}, {pitch}, {{w}} + {where}, {step}, {more}, {y} + i * {image});")


def clamp(calls: Calls, pixels: int, channels: int, activation: str, y: str) -> None:
    """Adds the activation of a map."""
    if activation != "none":
        calls.add(f"clamp_map({pixels * round8(channels)} * n, {cpp(RANGE_OF[activation])}, {y});")


def place(
    source: Source, calls: Calls, pixels: int, made: int, placement: Sequence[int] | None, bias: np.ndarray,
    activation: str, x: str, y: str,
) -> None:  # fmt: skip
    """Adds what follows a product: the placement of channels, the bias and the activation.

    Args:
      source, calls: what is added to.
      pixels: number of pixels of the map.
      made: number of channels of `x`.
      placement: for each channel of the output its place in `x`, -1 for zero; None: the same order.
      bias: [D] or [H, W, D].
      activation: the activation.
      x, y: the input and the output.
    """
    indices = list(range(made)) if placement is None else list(placement)
    pitch, from_pitch = round8(len(indices)), round8(made)
    table = source.table([*indices, *[-1] * (pitch - len(indices))])
    step = pitch if bias.ndim > 1 else 0
    calls.each(
        f"placed({pixels}, {from_pitch}, {pitch}, {table.text}, {{w}} + {source.weight(padded(bias))}, {step}, "
        f"{cpp(RANGE_OF[activation])}, {x} + i * {pixels * from_pitch}, {y} + i * {pixels * pitch});"
    )
