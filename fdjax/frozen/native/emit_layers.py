"""Layers of a frozen network as constants, weights and calls of the kernels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from fdjax.errors import UserError
from fdjax.frozen.native import parts
from fdjax.frozen.native.calls import Calls
from fdjax.frozen.native.parts import Pixels, Reader, Writer
from fdjax.frozen.native.source import PANEL, RANGE_OF, RANGES, Raw, Source, cpp, largest_of_8, padded, round8
from fdjax.frozen.products import ProductPlan, Size, Window
from fdjax.frozen.program import Conv, Pointwise, Run

Arrays = Mapping[str, np.ndarray]
# Floats of the pixels of a layer that is computed at once, where its means are all that is wanted.
_AT_ONCE = 8_000
# So many channels, at most, have their coefficients in the map's order.
_PLACED = 16
POINT = Window((1, 1), (1, 1), ((0, 0), (0, 0)), (0, 0), (0, 0))


def is_depthwise(layer: Conv) -> bool:
    """Whether each channel has a kernel of its own."""
    return 1 < layer.groups == layer.inputs == layer.outputs


def bias_of(layer: Conv | Pointwise, arrays: Arrays) -> np.ndarray:
    """What is added: [D] or [H, W, D]."""
    return arrays[f"{layer.name}/bias"] if layer.bias != "none" else np.zeros(layer.outputs, np.float32)


def analysed(source: Source, calls: Calls, x: str, size: Size, channels: int, block: int, counts: np.ndarray) -> str:
    """Adds the transform of a map whose channels need `counts` coefficients; returns its memory."""
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
    """Adds a product by itself. `flat`: it takes the pixels of all images as one map of one row."""
    writer = parts.with_weights(source, writer)
    rows = writer.height
    if means:
        rows = -(-max(1, _AT_ONCE // (writer.width * PANEL)) // writer.block) * writer.block
    rows = min(rows, -(-writer.height // writer.block) * writer.block)
    coefs = parts.coefs_floats(writer.block, rows, writer.width) if writer.source.text == "BANDS" else 0
    if coefs and not means:  # A few rows of blocks at a time.
        fitting = max(1, _AT_ONCE * 4 // parts.coefs_floats(writer.block, writer.block, writer.width)) * writer.block
        rows, coefs = min(rows, fitting), parts.coefs_floats(writer.block, min(rows, fitting), writer.width)
    source.needs(coefs + (rows * writer.width * PANEL if means else 0))
    part, images = source.constant(writer, name), "n"
    if flat:
        part, images = f"across({part}, n)", "1"
    calls.add(f"layer({part}, {rows}, {cpp(means)}, {x}, {{w}}, scratch, {y}, {images}, ahead);")


def add_bias(source: Source, calls: Calls, pixels: int, bias: np.ndarray, added: str | None, y: str) -> None:
    """Adds what readers add to: a bias, and for each image the map `added`."""
    pitch = round8(bias.shape[-1])
    step, image = pitch if bias.ndim > 1 else 0, pixels * pitch
    more = "nullptr" if added is None else f"{added} + i * {image}"
    where = source.weight(padded(bias))
    calls.each(f"start_map({pixels}, {pitch}, {{w}} + {where}, {step}, {more}, {y} + i * {image});")


def clamp(calls: Calls, pixels: int, channels: int, activation: str, y: str) -> None:
    """Adds an activation of a map."""
    if activation != "none":
        calls.add(f"clamp_map({pixels * round8(channels)} * n, {cpp(RANGE_OF[activation])}, {y});")


def place(
    source: Source, calls: Calls, pixels: int, made: int, placement: Sequence[int] | None, bias: np.ndarray,
    activation: str, x: str, y: str,
) -> None:  # fmt: skip
    """Adds what follows a product: channels in their places, bias and activation."""
    indices = list(range(made)) if placement is None else list(placement)
    pitch, from_pitch = round8(len(indices)), round8(made)
    table = source.table([*indices, *[-1] * (pitch - len(indices))])
    step = pitch if bias.ndim > 1 else 0
    calls.each(
        f"placed({pixels}, {from_pitch}, {pitch}, {table.text}, {{w}} + {source.weight(padded(bias))}, {step}, "
        f"{cpp(RANGE_OF[activation])}, {x} + i * {pixels * from_pitch}, {y} + i * {pixels * pitch});"
    )


# Convolutions


def emit_conv(source: Source, calls: Calls, layer: Conv, arrays: Arrays, images: str | None) -> None:
    """A convolution; `images` are the raw images where it reads those."""
    kernel, bias = arrays[f"{layer.name}/kernel"], bias_of(layer, arrays)
    at_once = bias.ndim == 1
    # What is added pixel by pixel comes before the activation.
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
    """Adds a product of one bundle of groups, whose outputs lie among those of the others."""
    writer = parts.with_weights(source, writer)
    part, pitch, width = source.constant(writer, layer.name), round8(layer.outputs), writer.width
    at = f"{y} + i * {writer.height * width * pitch} + {column}"
    for panel in range(-(-writer.outputs // writer.panel)):
        to = f"{{{at} + {panel * writer.panel}, {width}, {width * pitch}, {pitch}}}"
        x_of, weights = f"{x} + i * {writer.image}", f"{part}.weights_of({panel}, {{w}})"
        calls.each(f"write({part}, {panel}, 0, {writer.height}, {x_of}, {weights}, nullptr, {to}, ahead);")


def _bundles(layer: Conv, kernel: np.ndarray, index: Sequence[int]) -> list[tuple[slice, Sequence[int], np.ndarray]]:
    """Groups of a convolution that are multiplied together, so that their outputs are a multiple of 8.

    For each bundle: its outputs, the offsets of what it reads, and its kernel, with zeros between groups.
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
    """The map that a convolution reads, with zeros around it: what `bordered` needs for it (a map that needs none is
    read as it is: ""), how to read it, and its rows."""
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
    """Brings zeros around the map that a convolution reads; returns the map and how to read it."""
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
    """A depthwise layer that is no part of a chain."""
    writer = parts.copying(layer.window.in_size, layer.inputs)
    reader = parts.as_is(layer.outputs, math.prod(layer.window.out_size) * round8(layer.outputs))
    chain = parts.chain_of(source, writer, layer.window, taps, bias, activation, reader)
    part, x = source.constant(chain, layer.name), calls.value(layer.x)
    calls.add(f"chain({part}, {x}, {{w}}, scratch, {calls.result(layer.y)}, n, ahead);")


# Pointwise layers


def emit_pointwise(source: Source, calls: Calls, layer: Pointwise, arrays: Arrays, channels: int) -> None:
    """A pointwise layer on a map, on tokens or on vectors, of so many channels."""
    plan, kernel, bias = layer.product, parts.kernel_of(arrays, layer.name, layer.product), bias_of(layer, arrays)
    size = (layer.size[0], layer.size[1]) if len(layer.size) == 2 else (1, (*layer.size, 1)[0])
    x, y, pixels = calls.value(layer.x), calls.result(layer.y), math.prod(size)
    placement = layer.placement
    if not plan.transforms:
        kernel, placement = parts.columns_at(kernel, placement), None
    # A bias for each channel, and an activation, come with the product; then what is not made is a constant.
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


# A depthwise layer, the pointwise layer after it, and the convolution before


def emit_separable(
    source: Source, calls: Calls, stem: Conv | None, middle: Conv, last: Pointwise, arrays: Arrays, images: str | None
) -> None:
    """Layers that follow each other, as one chain; `images` are the raw ones where the first layer reads those."""
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


class Results:
    """Where the readers of a layer or a run add: to its map, or to coefficients that are brought to it at the end."""

    def __init__(
        self, source: Source, calls: Calls, operation: Pointwise | Run, size: Size, block: int, plans: list[ProductPlan]
    ):
        """`plans` are those of the readers."""
        self.source, self.calls, self.operation, self.size, self.block = source, calls, operation, size, block
        self.pixels, self.made = math.prod(size), plans[0].outputs if plans else 0
        widths = [parts.band_widths(plan, block**2)[1] for plan in plans if plan.transforms]
        self.widths = [max([width[n] for width in widths], default=0) for n in range(block**2)]
        # Kept counts of the map's channels where their coefficients lie in the map's order: for few channels it costs
        # less to make all of every band than to put them in their places.
        self.counts: list[int] | None = None
        if operation.placement is not None and operation.outputs <= _PLACED:
            kept = [sum(width > made for width in self.widths) for made in range(self.made)]
            self.counts = [kept[made] if made >= 0 else 0 for made in operation.placement]
            self.made, self.widths = operation.outputs, [operation.outputs if width else 0 for width in self.widths]
        self.pitch, self.coefs_pitch = round8(operation.outputs), round8(self.made)
        self.blocks = math.prod(parts.blocks_of(size, block))
        self.image = sum(1 for width in self.widths if width) * self.blocks * self.coefs_pitch
        self.coefs = calls.temporary(self.image) if self.image else ""
        if self.image:
            calls.add(f"std::memset({self.coefs}, 0, sizeof(float) * n * {self.image});")

    def begin(self, bias: np.ndarray, added: str | None, *, fused: bool) -> Raw | int:
        """Adds what readers add to: a bias, and for each image the map `added`. `fused`: the first reader makes the
        map; then what it is to begin with is returned, if it can.
        """
        if fused and added is None and bias.ndim == 1:
            return self.source.weight(padded(bias))
        add_bias(self.source, self.calls, self.pixels, bias, added, self.calls.result(self.operation.y))
        return parts.NOTHING

    def columns(self, kernel: np.ndarray) -> np.ndarray:
        """The columns of a kernel as the coefficients lie."""
        return kernel if self.counts is None else parts.columns_at(kernel, self.operation.placement)

    def reader(
        self, plan: ProductPlan, kernel: np.ndarray, channels: int, panel: int, y: str, *, only: bool
    ) -> tuple[Reader, str]:
        """The reader of a chain of so many channels, and what it adds to; `only`: no other chain adds anything."""
        if plan.transforms:
            args = self.source, channels, plan, self.columns(kernel), panel, self.block, self.size, self.image
            return parts.to_coefs(*args, placed=self.counts is not None), self.coefs
        rows = np.zeros((channels, kernel.shape[1]), np.float32)
        rows[parts.order_of(plan)] = kernel
        rows = parts.columns_at(rows, self.operation.placement)
        activation = self.operation.activation if only else "none"
        return parts.to_map(self.source, rows, panel, self.pixels * self.pitch, activation), y

    def finish(self, y: str) -> None:
        """Brings coefficients to the map, and the activation."""
        if self.image:
            placement = self.operation.placement
            self.source.block(self.block)
            widths, image = self.source.table(self.widths), self.pixels * self.pitch
            place_of, counts, outputs = "nullptr", "nullptr", 0
            if self.counts is not None:
                counts = self.source.table(np.pad(self.counts, (0, self.pitch - self.made)), "std::int32_t").text
            elif placement is not None and list(placement) != list(range(self.made)):
                places = [made if made >= 0 else self.coefs_pitch for made in placement]
                place_of, outputs = self.source.table(places).text, len(places)
                self.source.needs(self.block**2 * (self.coefs_pitch + 1))
            at = f"{{{y} + i * {image}, {self.size[1]}, {self.size[1] * self.pitch}, {self.pitch}}}"
            self.calls.each(
                f"compose<{self.block}>({self.coefs} + i * {self.image}, {self.blocks * self.coefs_pitch}, "
                f"{self.coefs_pitch}, {widths.text}, {counts}, {place_of}, {outputs}, scratch, {at}, {self.size[0]}, "
                f"{self.size[1]});"
            )
            clamp(self.calls, self.pixels, self.operation.outputs, self.operation.activation, y)
