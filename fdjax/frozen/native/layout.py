"""Lays out the memory of values, and writes the function that executes all statements."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from fdjax.frozen.native.calls import Calls
from fdjax.frozen.native.source import round8

# Operations up to the last one that reads or makes a larger map (in floats) process one image at a time.
LARGE = 24_000
_LINE = 16


def floats_of(shape: Sequence[int]) -> int:
    """Returns the floats that a value takes; channels are rounded up to a multiple of 8."""
    return math.prod(shape[:-1]) * round8((*shape, 1)[len(shape) - 1]) if shape else 8


@dataclasses.dataclass(frozen=True)
class _Place:
    """Floats `at` to `at` + `size` of a region, in use from statement `first` to `last`."""

    shared: bool
    first: int
    last: int
    at: int
    size: int


class Layout:
    """The memory of a network's values.

    The first statements process one image at a time and share the memory for one image. Values that later statements
    read or make are in memory for all images. Memory is used again when nothing reads its value any more.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], outputs: Sequence[int], statements: Sequence[Calls]):
        self.shapes, self.outputs, self.statements = shapes, outputs, statements
        large = [
            index
            for index, calls in enumerate(statements)
            if max([0, *(floats_of(shapes[v]) for v in calls.reads | calls.makes)]) > LARGE
            or any("images" in line for line in calls.lines)
        ]
        self.cut = large[-1] + 1 if large else 0
        self._last = {value: index for index, calls in enumerate(statements) for value in calls.reads | calls.makes}
        self._last |= {value: len(statements) for value in outputs}
        self._places: dict[tuple[int, str], _Place] = {}
        self._values: dict[int, tuple[int, str]] = {}
        for index, calls in enumerate(statements):
            for value in sorted(calls.makes):
                crosses = index >= self.cut or self._last[value] >= self.cut
                first = index if index >= self.cut or not crosses else 0
                self._values[value] = index, f"v{value}"
                self._place(self._values[value], not crosses, first, self._last[value], floats_of(shapes[value]))
            for number, floats in enumerate(calls.temporaries):
                self._place((index, f"t{number}"), index < self.cut, index, index, floats)

    def _place(self, key: tuple[int, str], shared: bool, first: int, last: int, floats: int) -> None:
        size = -(-floats // _LINE) * _LINE + _LINE
        taken = sorted(
            (place.at, place.at + place.size)
            for place in self._places.values()
            if place.shared == shared and place.first <= last and place.last >= first
        )
        at = 0
        for start, end in taken:
            if at + size <= start:
                break
            at = max(at, end)
        self._places[key] = _Place(shared, first, last, at, size)

    def floats(self, *, shared: bool) -> int:
        """Returns the floats of a region for one image."""
        return max([0, *(p.at + p.size for p in self._places.values() if p.shared == shared)]) + 4 * _LINE

    def _pointer(self, key: tuple[int, str], floats: int, one: bool) -> str:
        place = self._places[key]
        if place.shared:
            return f"(shared + {place.at})"
        return f"(batch + {place.at} * all{f' + b * {floats}' if one else ''})"

    def pointers(self, index: int, one: bool) -> dict[str, str]:
        """Returns the addresses of values and temporary memory in a statement; with `one`, of one image at a time."""
        found = {"w": "weights"}
        for value, key in self._values.items():
            found[f"v{value}"] = self._pointer(key, floats_of(self.shapes[value]), one)
        for at, name in self._places:
            if at == index and name.startswith("t"):
                found[name] = self._pointer((at, name), 0, one)
        return found

    def text(self) -> str:
        """Returns the source of the function."""
        lines = [
            "namespace {",
            "template <class T>",
            "void forward(const T* images, int count, const float* weights, float* results, float* workspace) {",
            "  float *scratch = workspace, *shared = scratch + SCRATCH, *batch = shared + ONE;",
            "  const std::ptrdiff_t all = count;",
            "  Ahead ahead = {weights, weights + WEIGHTS, NEAR};",
            "  (void)scratch, (void)shared, (void)batch, (void)weights, (void)ahead;",
        ]
        if self.cut:
            lines += ["  for (std::ptrdiff_t b = 0; b < all; b++, images += IMAGE) {", "    const int n = 1;"]
            lines += ["  " + line for line in self._lines(range(self.cut), one=True)]
            lines.append("  }")
        lines += ["  const int n = count;", "  ahead.reach = FAR;"]
        lines += self._lines(range(self.cut, len(self.statements)), one=False)
        pointers = self.pointers(len(self.statements), False)
        for value in self.outputs:
            shape, pitch = self.shapes[value], floats_of(self.shapes[value])
            channels = shape[-1] if shape else 1
            total, at = math.prod(shape), pointers[f"v{value}"]
            lines += [
                f"  for (int i = 0; i < n * {total // channels}; i++)",
                f"    std::memcpy(results + i * {channels}, {at} + i * {pitch * channels // total}, {4 * channels});",
                f"  results += all * {total};",
            ]
        return "\n".join([*lines, "}", "}  // namespace"])

    def _lines(self, indices: range, *, one: bool) -> list[str]:
        return [
            "  " + _filled(line, pointers)
            for index in indices
            for pointers in [self.pointers(index, one)]
            for line in self.statements[index].lines
        ]


def _filled(line: str, pointers: Mapping[str, str]) -> str:
    for name, pointer in pointers.items():
        line = line.replace(f"{{{name}}}", pointer)
    return line
