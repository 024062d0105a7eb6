"""Makes the writers and readers (`runs.h`) and the chains (`chains.h`) of products, with their weights in panels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from fdjax.errors import UserError
from fdjax.frozen.native.source import (
    PANEL,
    RANGE_OF,
    Raw,
    Source,
    in_panels,
    largest_of_8,
    padded,
    panel_width,
    round8,
)
from fdjax.frozen.native.structs import NULL, Chain, Pixels, Reader, Writer
from fdjax.frozen.products import ProductPlan, Size, Window

# The floats of a chain's maps between two moves of its buffer, so that they stay in the second-level cache; and the
# number of pixels that pass from the depthwise step to the reader at a time.
_STRIPE, _STEP = 40_000, 48


def map_pixels(size: Size, channels: int, index: Sequence[int]) -> Pixels:
    """Returns the offsets of a whole map."""
    pitch = round8(channels)
    return Pixels(size[0] * size[1] * pitch, size[1] * pitch, pitch, index)


def kernel_of(arrays: Mapping[str, np.ndarray], name: str, plan: ProductPlan) -> np.ndarray:
    """Puts the matrices of `fdjax.frozen.products.pack` together again.

    Args:
      arrays: the network's arrays, by name.
      name: prefix of the matrices.
      plan: the products.

    Returns:
      The kernel, float32 [inputs, outputs]; it is zero for pairs that no band multiplies.
    """
    kernel = np.zeros((plan.inputs, plan.outputs), np.float32)
    inner, outer = plan.whole
    if inner and outer:
        kernel[:inner, :outer] = arrays[f"{name}/whole"]
    for first, _, inputs, outputs in plan.runs:
        if inputs > inner:
            kernel[inner:inputs, :outputs] = arrays[f"{name}/rest{first}"]
        if inner and outputs > outer:
            kernel[:inner, outer:outputs] = arrays[f"{name}/edge{first}"]
    return kernel


def order_of(plan: ProductPlan) -> np.ndarray:
    """Returns the channels of the map that a product reads.

    Args:
      plan: the products.

    Returns:
      The channels in order, int [inputs].
    """
    return np.asarray(range(plan.inputs) if plan.input_order is None else plan.input_order, np.int64)


def band_widths(plan: ProductPlan, num_coefs: int) -> tuple[list[int], list[int]]:
    """Returns the numbers of input and of output channels that take part in each band."""
    inputs = [sum(count > n for count in plan.input_counts) for n in range(num_coefs)]
    outputs = [sum(count > n for count in plan.output_counts) for n in range(num_coefs)]
    both = [(i, o) if i and o else (0, 0) for i, o in zip(inputs, outputs, strict=True)]
    return [i for i, _ in both], [o for _, o in both]


def needed_coefs(plans: Sequence[ProductPlan], channels: int, num_coefs: int) -> np.ndarray:
    """Finds the coefficients of a map that several products read.

    Args:
      plans: the products.
      channels: number of channels of the map.
      num_coefs: N.

    Returns:
      The number of coefficients of each channel, int [channels].
    """
    counts = np.zeros(channels, np.int64)
    for plan in plans:
        depth = sum(1 for width in band_widths(plan, num_coefs)[0] if width)
        np.maximum.at(counts, order_of(plan), np.minimum(plan.input_counts, depth))
    return counts


def blocks_of(size: Size, block: int) -> Size:
    """Returns the numbers of blocks that cover a map."""
    return -(-size[0] // block), -(-size[1] // block)


def on_pixels(
    source: Source, size: Size, pixels: Pixels, kernel: np.ndarray, bias: np.ndarray, activation: str
) -> Writer:
    """Makes the writer of a product on pixels.

    Args:
      source: collects its tables.
      size: (H, W) of the output.
      pixels: the offsets that it reads.
      kernel: [inputs, outputs], in the order of the offsets.
      bias: [outputs].
      activation: the activation.

    Returns:
      The writer, without a place for its weights.
    """
    outputs = kernel.shape[1]
    return Writer(
        Raw("PIXELS"), *size, round8(outputs), panel_width(outputs), RANGE_OF[activation], inputs=kernel.shape[0],
        index=source.table(pixels.index, "std::int32_t"), image=pixels.image, row=pixels.row, pixel=pixels.pixel,
        columns=(kernel, bias),
    )  # fmt: skip


def on_map(
    source: Source, size: Size, channels: int, plan: ProductPlan, kernel: np.ndarray, bias: np.ndarray, activation: str
) -> Writer:
    """Makes the writer of a product without transforms.

    Args:
      source: collects its tables.
      size: (H, W).
      channels: number of channels of the map that it reads.
      plan: the products.
      kernel: [inputs, outputs], in the plan's order.
      bias: [outputs].
      activation: the activation.

    Returns:
      The writer, without a place for its weights.
    """
    inner = plan.whole[0] if plan.whole[1] else 0
    order, kernel = order_of(plan)[:inner], kernel[:inner]
    ascending = np.argsort(order, kind="stable")
    pixels = map_pixels(size, channels, order[ascending].tolist())
    return on_pixels(source, size, pixels, kernel[ascending], bias, activation)


def by_bands(
    source: Source,
    size: Size,
    block: int,
    channels: int,
    plan: ProductPlan,
    kernel: np.ndarray,
    bias: np.ndarray,
    activation: str,
) -> Writer:
    """Makes the writer of a product by bands.

    Args:
      source: collects its tables.
      size: (H, W).
      block: K.
      channels: number of channels of the map whose coefficients it reads.
      plan: the products.
      kernel: [inputs, outputs], in the plan's order.
      bias: [outputs].
      activation: the activation.

    Returns:
      The writer, without a place for its weights.
    """
    source.block(block)
    outputs, (rows, columns), pitch = kernel.shape[1], blocks_of(size, block), round8(channels)
    widths = band_widths(plan, block * block)
    return Writer(
        Raw("BANDS"), *size, round8(outputs), panel_width(outputs), RANGE_OF[activation], inputs=kernel.shape[0],
        index=source.table(order_of(plan), "std::int32_t"), image=block * block * rows * columns * pitch,
        row=columns * pitch, pixel=pitch, block=block, band=rows * columns * pitch, widths_in=source.table(widths[0]),
        widths_out=source.table(widths[1]), to_pixels=Raw(f"to_pixels<{block}>"), columns=(kernel, bias),
    )  # fmt: skip


def copying(size: Size, channels: int) -> Writer:
    """Makes a writer that copies a map."""
    pitch = round8(channels)
    return Writer(Raw("COPY"), *size, pitch, panel_width(channels), RANGE_OF["none"], image=size[0] * size[1] * pitch,
                  row=size[1] * pitch, pixel=pitch, columns=(np.zeros(pitch, np.float32),))  # fmt: skip


def with_weights(
    source: Source, writer: Writer, more: Sequence[np.ndarray] = (), rows: np.ndarray | None = None, width: int = 1
) -> Writer:
    """Stores the weights of a writer panel by panel of its channels.

    Args:
      source: collects the weights.
      writer: the writer.
      more: other arrays that follow the writer's, [..., E].
      rows: weights of a reader that follow those, [E, D].
      width: number of columns of a reader's panel.

    Returns:
      The writer with the place of its weights.
    """
    columns, packed = [padded(np.atleast_2d(array)) for array in (*writer.columns, *more)], []
    for at in range(0, writer.outputs, writer.panel):
        packed += [array[:, at : at + writer.panel].ravel() for array in columns]
        if rows is not None:
            packed.append(in_panels(rows[at : at + writer.panel], width))
    unit = sum(len(array) for array in columns) + (0 if rows is None else round8(rows.shape[1]))
    return dataclasses.replace(writer, weights=source.weight(np.concatenate(packed)), unit=unit)


def columns_at(kernel: np.ndarray, placement: Sequence[int] | None) -> np.ndarray:
    """Brings the columns of a kernel to their places.

    Args:
      kernel: [inputs, outputs].
      placement: for each column of the result its place in `kernel`, -1 for zeros; None: the same order.

    Returns:
      [inputs, columns].
    """
    if placement is None:
        return kernel
    return np.concatenate([kernel, np.zeros((kernel.shape[0], 1), np.float32)], axis=1)[:, list(placement)]


def _padded_rows(rows: np.ndarray) -> np.ndarray:
    return np.pad(rows, ((0, round8(len(rows)) - len(rows)), (0, 0)))


def to_map(source: Source, rows: np.ndarray, panel: int, image: int, activation: str = "none") -> Reader:
    """Makes a reader that adds to a map.

    Args:
      source: collects its tables.
      rows: weights, [E, D].
      panel: number of the E channels in a panel.
      image: floats of the map of an image.
      activation: the activation.

    Returns:
      The reader.
    """
    index, outputs = np.arange(round8(len(rows))) % panel, rows.shape[1]
    # Rows of zeros behind the last one read a channel that exists: what lies behind it may be no number.
    index[len(rows) :] = 0
    return Reader(Raw("TO_MAP"), round8(outputs), panel_width(outputs), RANGE_OF[activation], image,
                  source.table(index, "std::int32_t"), rows=_padded_rows(rows))  # fmt: skip


def to_coefs(
    source: Source,
    channels: int,
    plan: ProductPlan,
    kernel: np.ndarray,
    panel: int,
    block: int,
    size: Size,
    image: int,
    *,
    placed: bool,
) -> Reader:
    """Makes a reader by bands, which adds to the coefficients of a map.

    Args:
      source: collects its tables.
      channels: number of channels of the chain.
      plan: the products.
      kernel: [inputs, columns].
      panel: number of channels in a panel.
      block: K.
      size: (H, W) of the map.
      image: floats of the coefficients of an image.
      placed: whether the kernel's columns are the map's channels, and every band makes all of them.

    Returns:
      The reader.
    """
    source.block(block)
    num_coefs, order, wide = block * block, order_of(plan), round8(channels)
    inputs, outputs = band_widths(plan, num_coefs)
    if placed:
        outputs = [kernel.shape[1] if width else 0 for width in outputs]
    counts, rows = np.zeros(wide, np.int64), np.zeros((wide, kernel.shape[1]), np.float32)
    counts[order] = np.minimum(plan.input_counts, sum(1 for width in inputs if width))
    rows[order] = kernel
    index, sizes = [], []
    for at in range(0, wide, panel):
        inside = np.argsort(-counts[at : at + panel], kind="stable")
        index += inside.tolist()
        sizes += [int((counts[at : at + panel] > n).sum()) for n in range(num_coefs)]
        rows[at : at + panel] = rows[at + inside]
    blocks, pitch = math.prod(blocks_of(size, block)), round8(kernel.shape[1])
    return Reader(
        Raw("TO_BANDS"), pitch, panel_width(kernel.shape[1]), RANGE_OF["none"], image,
        source.table(index, "std::int32_t"), block, blocks * pitch, source.table(sizes), source.table(outputs),
        source.table(largest_of_8(counts), "std::uint8_t"), Raw(f"to_bands<{block}>"), rows=_padded_rows(rows),
    )  # fmt: skip


def as_is(channels: int, image: int) -> Reader:
    """Makes the placeholder for a reader of a chain that ends with its depthwise step."""
    return Reader(Raw("AS_IS"), round8(channels), PANEL, RANGE_OF["none"], image, NULL)


def chain_of(
    source: Source, writer: Writer, window: Window, taps: np.ndarray, bias: np.ndarray, activation: str, reader: Reader
) -> Chain:
    """Makes a chain of a writer, a depthwise step and a reader.

    Args:
      source: collects its weights and tables.
      writer: the writer.
      window: the window of the depthwise step.
      taps: [rows, columns, E].
      bias: [E].
      activation: the activation after the depthwise step.
      reader: the reader.

    Returns:
      The chain.

    Raises:
      UserError: if the depthwise step has negative padding.
    """
    (top, bottom), (left, right) = window.pads
    if min(top, bottom, left, right) < 0:
        raise UserError(f"native code has no depthwise layer with the padding {window.pads}: use another engine")
    (height, width), (rows, columns), (down, across) = window.out_size, window.window, window.stride
    pitch = max(left + writer.width, (width - 1) * across + columns)
    unit = reader.block
    row = PANEL * down * pitch
    at_once = max(1, _STRIPE // (row * unit)) * unit
    if down > rows:
        at_once = height
    stripes = -(-height // min(height, at_once))
    at_once = min(height, math.ceil(height / stripes / unit) * unit)
    step = min(at_once, max(1, round(_STEP / width / unit)) * unit)
    more = taps.reshape(rows * columns, -1), bias
    weighted = with_weights(source, writer, more, reader.rows, reader.panel)
    made = Chain(
        weighted, reader, height, width, rows, down, top, left, pitch, RANGE_OF[activation], rows * columns,
        Raw(f"depthwise_row<{rows}, {columns}, {across}>"), at_once, step,
    )  # fmt: skip
    buffer = down * (at_once - 1) + rows + writer.block
    made_at_once = down * (step - 1) + rows + writer.block
    coefs_in = coefs_floats(writer.block, made_at_once, writer.width) if writer.source.text == "BANDS" else 0
    coefs_out = coefs_floats(reader.block, step, width) if reader.target.text == "TO_BANDS" else 0
    strip = (made_at_once * writer.stride + writer.rows) * writer.row // writer.stride
    strip = 0 if writer.border == NULL else strip
    source.needs(PANEL * (buffer * pitch + step * width) + max(coefs_in, coefs_out, strip))
    return made


def coefs_floats(block: int, rows: int, width: int) -> int:
    """Returns the floats of a panel's coefficients for a number of rows."""
    return block * block * -(-rows // block) * -(-width // block) * PANEL
