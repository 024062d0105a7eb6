"""Data of the kernels in Python: the C++ structs of `runs.h` and `chains.h`, field by field."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from fdjax.frozen.native.source import NOT_IN_CPP, Raw

NULL = Raw("nullptr")
# The bias of a reader that adds to what is already in its target.
NOTHING = Raw("NOTHING")


@dataclasses.dataclass(frozen=True)
class Writer:
    """The struct of the same name; `columns` are its weights, [..., outputs], until `with_weights` stores them."""

    source: Raw
    height: int
    width: int
    outputs: int
    panel: int
    range: Raw
    weights: int = 0
    unit: int = 0
    inputs: int = 0
    index: Raw = NULL
    image: int = 0
    row: int = 0
    pixel: int = 0
    block: int = 1
    band: int = 0
    widths_in: Raw = NULL
    widths_out: Raw = NULL
    to_pixels: Raw = NULL
    border: Raw = NULL
    rows: int = 1
    stride: int = 1
    columns: tuple[np.ndarray, ...] = dataclasses.field(default=(), metadata=NOT_IN_CPP)


@dataclasses.dataclass(frozen=True)
class Reader:
    """The struct of the same name; `rows` are its weights, [E, outputs]."""

    target: Raw
    outputs: int
    panel: int
    range: Raw
    image: int
    index: Raw
    block: int = 1
    band: int = 0
    widths_in: Raw = NULL
    widths_out: Raw = NULL
    counts: Raw = NULL
    to_bands: Raw = NULL
    bias: Raw | int = NOTHING
    rows: np.ndarray | None = dataclasses.field(default=None, metadata=NOT_IN_CPP)


@dataclasses.dataclass(frozen=True)
class Chain:
    """The struct of the same name."""

    writer: Writer
    reader: Reader
    height: int
    width: int
    window: int
    stride: int
    top: int
    left: int
    pitch: int
    range: Raw
    taps: int
    depthwise: Raw
    rows: int
    step: int


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The offsets, in floats, at which a product on pixels reads: x[image, row, pixel][index[k]]."""

    image: int
    row: int
    pixel: int
    index: Sequence[int]
