"""Writes the layers of a frozen network as constants, weights and calls of the kernels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from fdjax.errors import UserError
from fdjax.frozen.native import parts
from fdjax.frozen.native.calls import Calls
from fdjax.frozen.native.results import Results
from fdjax.frozen.native.source import RANGES, Raw, Source, cpp, round8
from fdjax.frozen.native.statements import Arrays, alone, analysed, bias_of, place
from fdjax.frozen.native.structs import Pixels, Writer
from fdjax.frozen.products import Window
from fdjax.frozen.program import Conv, Pointwise

POINT = Window((1, 1), (1, 1), ((0, 0), (0, 0)), (0, 0), (0, 0))


def is_depthwise(layer: Conv) -> bool:
    """Whether each channel has a kernel of its own."""
    return 1 < layer.groups == layer.inputs == layer.outputs


def emit_conv(source: Source, calls: Calls, layer: Conv, arrays: Arrays, images: str | None) -> None:
    """Adds a convolution.

    Args:
      source, calls: what is added to.
      layer: the convolution.
      arrays: the network's arrays, by name.
      images: "images" if the layer reads the raw images, else None.
    """
    kernel, bias = arrays[f"{layer.name}/kernel"], bias_of(layer, arrays)
    at_once = bias.ndim == 1
    # A bias map is added after the product, so the activation has to follow it.
    own = bias if at_once else np.zeros(layer.outputs, np.float32)
    activation, size = layer.activation if at_once else "none", layer.window.out_size
    y, pixels = calls.result(layer.y), math.prod(layer.window.out_size)
    if is_depthwise(layer):
        depthwise_alone(source, calls, layer, kernel[:, :, 0], own, activation)
    else:
        x, pixels_of = bordered(source, calls, layer, images)
        for columns, index, taps in _bundles(layer, kernel, pixels_of.index):
            chosen = dataclasses.replace(pixels_of, index=index)
            writer = parts.on_pixels(source, size, chosen, taps, own[columns], activation)
            if len(own) == taps.shape[1]:
                alone(source, calls, layer.name, writer, x, y)
            else:
                _into_columns(source, calls, layer, writer, columns.start, x, y)
    if not at_once:
        place(source, calls, pixels, layer.outputs, None, bias, layer.activation, y, y)


def _into_columns(source: Source, calls: Calls, layer: Conv, writer: Writer, column: int, x: str, y: str) -> None:
    """Adds the product of one bundle of groups, whose outputs are a part of the output's channels."""
    writer = parts.with_weights(source, writer)
    part, pitch, width = source.constant(writer, layer.name), round8(layer.outputs), writer.width
    at = f"{y} + i * {writer.height * width * pitch} + {column}"
    for panel in range(-(-writer.outputs // writer.panel)):
        to = f"{{{at} + {panel * writer.panel}, {width}, {width * pitch}, {pitch}}}"
        x_of, weights = f"{x} + i * {writer.image}", f"{part}.weights_of({panel}, {{w}})"
        calls.each(f"write({part}, {panel}, 0, {writer.height}, {x_of}, {weights}, nullptr, {to}, ahead);")


def _bundles(layer: Conv, kernel: np.ndarray, index: Sequence[int]) -> list[tuple[slice, Sequence[int], np.ndarray]]:
    """Bundles groups of a convolution that are multiplied together, so that their outputs are a multiple of 8.

    Returns:
      For each bundle its outputs, the offsets that it reads, and its kernel, with zeros between groups.
    """
    inner, outer = layer.inputs // layer.groups, layer.outputs // layer.groups
    together = 1 if layer.groups == 1 else max(8 // math.gcd(8, outer), 16 // outer)
    offsets, found = np.asarray(index).reshape(-1, layer.inputs), []
    for first in range(0, layer.groups, together):
        groups = range(first, min(first + together, layer.groups))
        taps = np.zeros((len(offsets), len(groups) * inner, len(groups) * outer), np.float32)
        for place_of, group in enumerate(groups):
            outs = slice(place_of * outer, (place_of + 1) * outer)
            taps[:, place_of * inner : (place_of + 1) * inner, outs] = kernel.reshape(-1, inner, layer.outputs)[
                :, :, group * outer : (group + 1) * outer
            ]
        ins = offsets[:, groups.start * inner : groups.stop * inner]
        columns = slice(groups.start * outer, groups.stop * outer)
        found.append((columns, ins.ravel().tolist(), taps.reshape(-1, taps.shape[-1])))
    return found


def _bordered(source: Source, layer: Conv, *, images: bool) -> tuple[str, Pixels, int]:
    """Describes the padded map that a convolution reads.

    Returns:
      The constant for the kernel `bordered` ("" if the map needs no padding), the offsets that the convolution reads,
      and the rows of the padded map.
    """
    window = layer.window
    (top, bottom), (left, right) = window.pads
    if min(top, bottom, left, right) < 0:
        raise UserError(f"native code has no convolution with the padding {window.pads}: use another engine")
    (height, width), channels = window.in_size, layer.inputs
    pitch = channels if images else round8(channels)
    rows, columns = top + height + bottom, left + width + right
    border = ""
    if images or max(top, bottom, left, right) > 0:
        fields = Raw(cpp([height, width, pitch, pitch, top, bottom, left, right, pitch]))
        border = source.constant(fields, "zeros around a map", "Border")
    index = [
        (i * columns + j) * pitch + c
        for i in range(window.window[0])
        for j in range(window.window[1])
        for c in range(channels)
    ]
    row, pixel = window.stride[0] * columns * pitch, window.stride[1] * pitch
    return border, Pixels(rows * columns * pitch, row, pixel, index), rows


def bordered(source: Source, calls: Calls, layer: Conv, images: str | None) -> tuple[str, Pixels]:
    """Adds the padding of the map that a convolution reads; returns the map and the offsets to read."""
    border, pixels, rows = _bordered(source, layer, images=images is not None)
    x = images or calls.value(layer.x)
    if not border:
        return x, pixels
    to, given = calls.temporary(pixels.image + 64), math.prod(layer.window.in_size)
    given *= layer.inputs if images else round8(layer.inputs)
    calls.each(f"bordered({border}, 0, {rows}, {x} + i * {given}, {to} + i * {pixels.image});")
    return to, pixels


def depthwise_alone(
    source: Source, calls: Calls, layer: Conv, taps: np.ndarray, bias: np.ndarray, activation: str
) -> None:
    """Adds a depthwise layer that is not part of a chain.

    Args:
      source, calls: what is added to.
      layer: the layer.
      taps: its kernel, [rows, columns, C].
      bias: [C].
      activation: the activation.
    """
    writer = parts.copying(layer.window.in_size, layer.inputs)
    reader = parts.as_is(layer.outputs, math.prod(layer.window.out_size) * round8(layer.outputs))
    chain = parts.chain_of(source, writer, layer.window, taps, bias, activation, reader)
    part, x = source.constant(chain, layer.name), calls.value(layer.x)
    calls.add(f"chain({part}, {x}, {{w}}, scratch, {calls.result(layer.y)}, n, ahead);")


def emit_pointwise(source: Source, calls: Calls, layer: Pointwise, arrays: Arrays, channels: int) -> None:
    """Adds a pointwise layer on a map, on tokens or on vectors.

    Args:
      source, calls: what is added to.
      layer: the layer.
      arrays: the network's arrays, by name.
      channels: number of channels that it reads.
    """
    plan, kernel, bias = layer.product, parts.kernel_of(arrays, layer.name, layer.product), bias_of(layer, arrays)
    size = (layer.size[0], layer.size[1]) if len(layer.size) == 2 else (1, math.prod(layer.size))
    x, y, pixels = calls.value(layer.x), calls.result(layer.y), math.prod(size)
    placement = layer.placement
    if not plan.transforms:
        kernel, placement = parts.columns_at(kernel, placement), None
    # A bias for each channel and the activation are part of the product; outputs that no product makes are constants.
    at_once, made = bias.ndim == 1, kernel.shape[1]
    own, fill = np.zeros(made, np.float32), bias
    if at_once:
        places = np.arange(made) if placement is None else np.asarray(placement)
        own[places[places >= 0]] = bias[places >= 0]
        low, high = RANGES[layer.activation]
        fill = np.where(places < 0, np.clip(bias, low, high), 0).astype(np.float32)
    activation = layer.activation if at_once else "none"
    if plan.transforms:
        writer = parts.by_bands(source, size, layer.block, channels, plan, kernel, own, activation)
        needed = parts.needed_coefs([plan], channels, layer.block**2)
        x = analysed(source, calls, x, size, channels, layer.block, needed)
    else:
        writer = parts.on_map(source, size, channels, plan, kernel, own, activation)
    means, as_it_is = layer.pooled and at_once, placement is None and at_once
    to = y if as_it_is else calls.temporary((1 if means else pixels) * writer.outputs)
    flat = not plan.transforms and not means
    if flat:
        writer = dataclasses.replace(writer, height=1, width=pixels, image=0)
    alone(source, calls, layer.name, writer, x, to, means=means, flat=flat)
    if as_it_is:
        return
    pitch = round8(layer.outputs)
    after = "none" if at_once else layer.activation
    whole = calls.temporary(pixels * pitch) if layer.pooled and not means else y
    place(source, calls, 1 if means else pixels, made, placement, fill, after, to, whole)
    if layer.pooled and not means:
        calls.each(
            f"sum_pixels({pixels}, {pitch}, {1 / pixels!r}f, {whole} + i * {pixels * pitch}, {y} + i * {pitch});"
        )


def emit_separable(
    source: Source, calls: Calls, stem: Conv | None, middle: Conv, last: Pointwise, arrays: Arrays, images: str | None
) -> None:
    """Adds successive layers as one chain.

    Args:
      source, calls: what is added to.
      stem: the convolution before the depthwise layer; None if there is none.
      middle: the depthwise layer.
      last: the pointwise layer.
      arrays: the network's arrays, by name.
      images: "images" if the first layer reads the raw images, else None.
    """
    function = "chain"
    if stem is None:
        x, writer = calls.value(middle.x), parts.copying(middle.window.in_size, middle.inputs)
    else:
        if images:
            function, x, (border, pixels, _) = "chain_of_images", images, _bordered(source, stem, images=True)
        else:
            (x, pixels), border = bordered(source, calls, stem, None), ""
        (_, index, taps), *_ = _bundles(stem, arrays[f"{stem.name}/kernel"], pixels.index)
        chosen = dataclasses.replace(pixels, index=index)
        writer = parts.on_pixels(source, middle.window.in_size, chosen, taps, bias_of(stem, arrays), stem.activation)
        if border:
            rows, stride = stem.window.window[0], stem.window.stride[0]
            writer = dataclasses.replace(writer, border=Raw(f"&{border}"), rows=rows, stride=stride)
    taps, bias = arrays[f"{middle.name}/kernel"][:, :, 0], bias_of(middle, arrays)
    results = Results(source, calls, last, (last.size[0], last.size[1]), last.block, [last.product])
    y, begins = calls.result(last.y), results.begin(bias_of(last, arrays), None, fused=not last.product.transforms)
    kernel = parts.kernel_of(arrays, last.name, last.product)
    reader, to = results.reader(last.product, kernel, middle.outputs, writer.panel, y, only=True)
    reader = dataclasses.replace(reader, bias=begins)
    chain = parts.chain_of(source, writer, middle.window, taps, bias, middle.activation, reader)
    calls.add(f"{function}({source.constant(chain, last.name)}, {x}, {{w}}, scratch, {to}, n, ahead);")
    results.finish(y)
