"""Builds the C++ source of a frozen network: weights in one array, tables of numbers, constants."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fdjax.ops.dct import dct_basis, zigzag_order

# The range of each activation's results.
RANGES = {"none": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}
# The most channels of a panel, a multiple of 8; the same as PANEL in kernels.h.
PANEL = 48
_ALIGNED = 16


# Metadata of a dataclass's field that is not in the struct.
NOT_IN_CPP = {"cpp": False}


@dataclasses.dataclass(frozen=True)
class Raw:
    """A piece of C++."""

    text: str


# The names of the ranges in kernels.h.
RANGE_OF = {"none": Raw("ALL"), "relu": Raw("RELU"), "relu6": Raw("RELU6")}


def cpp(value: Any) -> str:
    """Writes a value in C++: a number, or a sequence or dataclass in braces."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    if isinstance(value, (float, np.floating)):
        if math.isinf(value):
            return "INFINITY" if value > 0 else "-INFINITY"
        return f"{float(value)!r}f"
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value) if field.metadata != NOT_IN_CPP]
    return "{" + ", ".join(map(cpp, value)) + "}"


def round8(channels: int) -> int:
    """Returns the floats that a pixel takes: its channels rounded up to a multiple of 8."""
    return -(-channels // 8) * 8


def panel_width(channels: int) -> int:
    """Returns the number of channels of a panel, so that all panels have about the same size."""
    groups = max(1, -(-channels // 8))
    width = -(-groups // -(-groups * 8 // PANEL))
    return 8 * min(groups, width + width % 2)


def padded(array: np.ndarray) -> np.ndarray:
    """Pads channels with zeros to a multiple of 8.

    Args:
      array: [..., C].

    Returns:
      [..., round8(C)].
    """
    missing = round8(array.shape[-1]) - array.shape[-1]
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)])


def in_panels(matrix: np.ndarray, panel: int) -> np.ndarray:
    """Lays out a matrix panel by panel of its columns.

    Args:
      matrix: [rows, columns]; columns are padded to a multiple of 8.
      panel: number of columns of a panel.

    Returns:
      The panels one after the other, flat.
    """
    matrix = padded(matrix)
    parts = [matrix[:, at : at + panel].ravel() for at in range(0, matrix.shape[1], panel)]
    return np.concatenate(parts) if parts else matrix.ravel()


def largest_of_8(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Computes the largest of every 8 counts.

    Args:
      counts: int [C].

    Returns:
      int [round8(C) / 8].
    """
    return padded(np.asarray(counts, np.int64)).reshape(-1, 8).max(axis=1)


class Source:
    """Collects the declarations and weights of a source.

    Attributes:
      text: declarations, in order.
      weights: the parts of the weights, each padded to the alignment.
      scratch: floats of the scratch memory that all operations share.
    """

    def __init__(self) -> None:
        self.text: list[str] = []
        self.weights: list[np.ndarray] = []
        self.scratch = _ALIGNED
        self._size = 0
        self._names: dict[tuple[str, str], str] = {}
        self._blocks: set[int] = set()

    def weight(self, array: np.ndarray) -> int:
        """Adds weights.

        Args:
          array: any shape.

        Returns:
          Their place, in floats.
        """
        flat = np.ascontiguousarray(array, np.float32).ravel()
        at, self._size = self._size, self._size + -(-flat.size // _ALIGNED) * _ALIGNED
        self.weights.append(np.pad(flat, (0, self._size - at - flat.size)))
        return at

    def blob(self) -> np.ndarray:
        """Joins all weights.

        Returns:
          float32, flat; zeros follow the last weight, because vectors may be read beyond it.
        """
        return np.concatenate([*self.weights, np.zeros(4 * _ALIGNED, np.float32)])

    def needs(self, floats: int) -> None:
        """Makes the scratch memory at least this large."""
        self.scratch = max(self.scratch, floats + 8 * _ALIGNED)

    def _declare(self, prefix: str, kind: str, text: str, comment: str = "") -> str:
        """Declares a constant, unless there is an equal one; returns its name."""
        if (kind, text) not in self._names:
            name = self._names[kind, text] = f"{prefix}{len(self._names)}"
            note = f"  // {comment}" if comment else ""
            self.text.append(f"static const {kind} {name}{'[]' if prefix == 'table' else ''} = {text};{note}")
        return self._names[kind, text]

    def table(self, values: Iterable[Any], kind: str = "int") -> Raw:
        """Declares a table of numbers, unless there is an equal one."""
        numbers = [float(v) if kind == "float" else int(v) for v in values] or [0]
        return Raw(self._declare("table", kind, cpp(numbers)))

    def constant(self, value: Any, comment: str = "", kind: str | None = None) -> str:
        """Declares a struct of the type that the dataclass is named after; returns its name."""
        return self._declare("part", kind or type(value).__name__, cpp(value), comment)

    def struct(self, fields: str) -> str:
        """Declares a struct of constants; returns its name."""
        key = ("struct", fields)
        if key not in self._names:
            self._names[key] = f"Constants{len(self._names)}"
            self.text.append(f"namespace {{\nstruct {self._names[key]} {{\n{fields}}};\n}}  // namespace")
        return self._names[key]

    def block(self, block: int) -> None:
        """Declares the transform of blocks of K x K, once."""
        if block in self._blocks:
            return
        self._blocks.add(block)
        order = zigzag_order(block)
        basis = np.asarray(dct_basis(block, np.float64))
        lines = np.stack([basis[order.index((u, 0))][:, 0] for u in range(block)]) * math.sqrt(block)
        lines = np.where(np.abs(lines) < 1e-12, 0, lines)
        side, rows = f"[{block}][{block}]", (lines / math.sqrt(block), lines * math.sqrt(block))
        self.text.append(
            f"namespace {{\ntemplate <>\nstruct Dct<{block}> {{\n"
            f"  static constexpr float forward{side} = {cpp(rows[0].tolist())};\n"
            f"  static constexpr float inverse{side} = {cpp(rows[1].tolist())};\n"
            f"  static constexpr int zigzag[{block * block}][2] = {cpp(order)};\n}};\n}}  // namespace"
        )
