"""The output of a layer or a run, to which its readers add."""

from __future__ import annotations

import math

import numpy as np

from fdjax.frozen.native import parts
from fdjax.frozen.native.calls import Calls
from fdjax.frozen.native.source import Raw, Source, padded, round8
from fdjax.frozen.native.statements import add_bias, clamp
from fdjax.frozen.native.structs import NOTHING, Reader
from fdjax.frozen.products import ProductPlan, Size
from fdjax.frozen.program import Pointwise, Run

# With at most this many channels, coefficients are in the map's order.
_PLACED = 16


class Results:
    """The output to which the readers of a layer or run add: its map, or coefficients that are transformed later."""

    def __init__(
        self, source: Source, calls: Calls, operation: Pointwise | Run, size: Size, block: int, plans: list[ProductPlan]
    ):
        """Prepares the output of `operation`, a map of `size`; `plans` are the products of the readers."""
        self.source, self.calls, self.operation, self.size, self.block = source, calls, operation, size, block
        self.pixels, self.made = math.prod(size), plans[0].outputs if plans else 0
        widths = [parts.band_widths(plan, block**2)[1] for plan in plans if plan.transforms]
        self.widths = [max([width[n] for width in widths], default=0) for n in range(block**2)]
        # With few channels, coefficients are in the map's order, and `counts` are the kept counts of the map's
        # channels: computing all channels of every band then costs less than placing them afterwards.
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
        """Adds the initial values of the output.

        Args:
          bias: [D] or [H, W, D].
          added: the map of each image that is added, or None.
          fused: whether the first reader makes the map, and can start from the bias itself.

        Returns:
          The place of the bias in the weights if the first reader starts from it, else `NOTHING`.
        """
        if fused and added is None and bias.ndim == 1:
            return self.source.weight(padded(bias))
        add_bias(self.source, self.calls, self.pixels, bias, added, self.calls.result(self.operation.y))
        return NOTHING

    def columns(self, kernel: np.ndarray) -> np.ndarray:
        """Brings the columns of a kernel to the order of the coefficients.

        Args:
          kernel: [inputs, outputs].

        Returns:
          [inputs, columns].
        """
        return kernel if self.counts is None else parts.columns_at(kernel, self.operation.placement)

    def reader(
        self, plan: ProductPlan, kernel: np.ndarray, channels: int, panel: int, y: str, *, only: bool
    ) -> tuple[Reader, str]:
        """Makes the reader of a chain.

        Args:
          plan: the products of the reader.
          kernel: [inputs, outputs], in the plan's order.
          channels: number of channels of the chain.
          panel: number of channels of a panel.
          y: the map.
          only: whether no other chain adds to the output.

        Returns:
          The reader, and the memory that it adds to.
        """
        if plan.transforms:
            args = self.source, channels, plan, self.columns(kernel), panel, self.block, self.size, self.image
            return parts.to_coefs(*args, placed=self.counts is not None), self.coefs
        rows = np.zeros((channels, kernel.shape[1]), np.float32)
        rows[parts.order_of(plan)] = kernel
        rows = parts.columns_at(rows, self.operation.placement)
        activation = self.operation.activation if only else "none"
        return parts.to_map(self.source, rows, panel, self.pixels * self.pitch, activation), y

    def finish(self, y: str) -> None:
        """Adds the transform of coefficients to the map, and the activation."""
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
