"""Writes a frozen network as one C++17 source and its weights.

Operations become calls of the kernels in this folder (`*.h`), which the source includes. Shapes are data in tables, so
that a kernel is compiled once for all layers that use it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from fdjax.errors import UserError
from fdjax.frozen.native.calls import Calls
from fdjax.frozen.native.emit_apply import ApplyEmitter, emit_take
from fdjax.frozen.native.emit_layers import emit_conv, emit_pointwise, emit_separable, is_depthwise
from fdjax.frozen.native.emit_runs import emit_run
from fdjax.frozen.native.layout import Layout, floats_of
from fdjax.frozen.native.source import Source, round8
from fdjax.frozen.program import Apply, Conv, Operation, Pointwise, Program, Run, Take
from fdjax.frozen.xla_stages import reads

HEADERS = ("kernels.h", "runs.h", "chains.h", "layers.h")
_FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class NativeCode:
    """The result of `emit`.

    Attributes:
      source: C++17, without the weights.
      weights: float32, flat.
      input_shape: shape of an image.
      output_shapes: shapes of the outputs for an image, in the order in which they are in the results.
    """

    source: str
    weights: np.ndarray
    input_shape: tuple[int, ...]
    output_shapes: tuple[tuple[int, ...], ...]


def emit(
    program: Program, arrays: Mapping[str, np.ndarray], name: str = "network", *, interface: bool = True
) -> NativeCode:
    """Writes a frozen network in C++.

    Args:
      program: the program; it has one input.
      arrays: its arrays, by name (`fdjax.frozen.program`).
      name: prefix of its functions in C.
      interface: whether to add the functions that take the weights.

    Returns:
      The source and the weights.

    Raises:
      UserError: if there is no kernel for an operation, or the program has several inputs.
    """
    if len(program.inputs) != 1:
        raise UserError(f"native code takes networks of one input; this one has {len(program.inputs)}")
    emitter = _Emitter(*_without_dilation(program, arrays))
    emitter.emit()
    source, shape = emitter.source, program.shapes[program.inputs[0]]
    layout = Layout(program.shapes, program.outputs, emitter.statements)
    headers = [(_FOLDER / header).read_text() for header in HEADERS]
    sizes = {"IMAGE": int(np.prod(shape)), "WEIGHTS": source.blob().size, "SCRATCH": -(-source.scratch // 16) * 16}
    sizes |= {"ONE": layout.floats(shared=True), "BATCH": layout.floats(shared=False)}
    constants = "\n".join(f"constexpr std::size_t {key} = {value};" for key, value in sizes.items())
    parts = [*headers, *source.text, f"namespace {{\n{constants}\n}}  // namespace", layout.text()]
    outputs = tuple(program.shapes[value] for value in program.outputs)
    text = "\n\n".join([*parts, *([_INTERFACE.replace("NAME", name)] if interface else [])]) + "\n"
    return NativeCode(text, source.blob(), tuple(shape), outputs)


_INTERFACE = """extern "C" {
// Bytes of the workspace for n images; it has to be aligned to 64 bytes.
std::size_t NAME_workspace(int n) { return sizeof(float) * (SCRATCH + ONE + BATCH * static_cast<std::size_t>(n)); }
void NAME_of_bytes(const std::uint8_t* images, int n, const float* weights, float* results, void* workspace) {
  forward(images, n, weights, results, static_cast<float*>(workspace));
}
void NAME_of_floats(const float* images, int n, const float* weights, float* results, void* workspace) {
  forward(images, n, weights, results, static_cast<float*>(workspace));
}
}"""


def _without_dilation(program: Program, arrays: Mapping[str, np.ndarray]) -> tuple[Program, Mapping[str, np.ndarray]]:
    """Puts zeros between the taps of dilated kernels, for which there is no code."""
    operations, filled = [], dict(arrays)
    for operation in program.operations:
        if isinstance(operation, Conv) and operation.window.dilation != (1, 1):
            kernel, (down, right) = arrays[f"{operation.name}/kernel"], operation.window.dilation
            sides = (kernel.shape[0] - 1) * down + 1, (kernel.shape[1] - 1) * right + 1
            wide = np.zeros((*sides, *kernel.shape[2:]), np.float32)
            wide[::down, ::right] = kernel
            filled[f"{operation.name}/kernel"] = wide
            window = dataclasses.replace(operation.window, window=sides, dilation=(1, 1))
            operation = dataclasses.replace(operation, window=window)
        operations.append(operation)
    return dataclasses.replace(program, operations=tuple(operations)), filled


class _Emitter:
    """The statements of a program."""

    def __init__(self, program: Program, arrays: Mapping[str, np.ndarray]):
        self.program, self.arrays = program, arrays
        self.source, self.statements = Source(), list[Calls]()
        self.image = program.inputs[0]
        self._readers: dict[int, list[Operation]] = {}
        for operation in program.operations:
            for value in set(reads(operation)):
                self._readers.setdefault(value, []).append(operation)
        self._made = {self.image}

    def emit(self) -> None:
        """Fills `source` and `statements`; several operations can share one statement."""
        readers = self._readers.get(self.image, [])
        if self.image in self.program.outputs or any(self._of_images(o) is None for o in readers):
            self._map_of_images()
        done = set[int]()
        for operation in self.program.operations:
            if id(operation) in done:
                continue
            calls = Calls()
            done.update(map(id, self._emit(calls, operation)))
            self._made.update(calls.makes)
            self.statements.append(calls)

    def _of_images(self, operation: Operation) -> str | None:
        """Returns "images" if an operation reads the raw images, else None."""
        plain = isinstance(operation, Conv) and not is_depthwise(operation) and operation.x == self.image
        return "images" if plain else None

    def _map_of_images(self) -> None:
        calls, shape = Calls(), self.program.shapes[self.image]
        channels = shape[-1] if shape else 1
        pixels = int(np.prod(shape)) // channels
        part = f"{{1, {pixels}, {channels}, {channels}, 0, 0, 0, 0, {round8(channels)}}}"
        y = calls.result(self.image)
        calls.each(f"bordered({part}, 0, 1, images + i * {pixels * channels}, {y} + i * {floats_of(shape)});")
        self.statements.append(calls)

    def _only_reader(self, value: int) -> Operation | None:
        readers = self._readers.get(value, ())
        return readers[0] if len(readers) == 1 and value not in self.program.outputs else None

    def _emit(self, calls: Calls, operation: Operation) -> list[Operation]:
        """Adds the statements of an operation and of those that are computed with it; returns these operations."""
        source, arrays, shapes = self.source, self.arrays, self.program.shapes
        separable = _separable(operation, self._only_reader)
        if separable is not None:
            stem, middle, last = separable
            emit_separable(source, calls, stem, middle, last, arrays, self._of_images(stem) if stem else None)
            return [layer for layer in separable if layer is not None]
        if isinstance(operation, Conv):
            emit_conv(source, calls, operation, arrays, self._of_images(operation))
        elif isinstance(operation, Pointwise):
            emit_pointwise(source, calls, operation, arrays, shapes[operation.x][-1])
        elif isinstance(operation, Run):
            return self._run(calls, operation)
        elif isinstance(operation, Take):
            emit_take(source, calls, operation, shapes)
        else:
            ApplyEmitter(source, calls, operation, shapes, arrays).emit()
        return [operation]

    def _run(self, calls: Calls, run: Run) -> list[Operation]:
        addition = self._addition(run)
        if addition is None:
            emit_run(self.source, calls, run, self.arrays, None)
            return [run]
        added = next(value for value in addition.inputs if value != run.y)
        onto = dataclasses.replace(run, y=addition.outputs[0])
        emit_run(self.source, calls, onto, self.arrays, added)
        return [run, addition]

    def _addition(self, run: Run) -> Apply | None:
        """Returns the addition of an earlier map to the output of a run, if nothing else reads that output."""
        reader, shapes = self._only_reader(run.y), self.program.shapes
        if not isinstance(reader, Apply) or reader.kind != "add" or run.activation != "none":
            return None
        others = [value for value in reader.inputs if value != run.y]
        if len(others) != 1 or others[0] not in self._made or others[0] == self.image:
            return None
        return reader if shapes[others[0]] == shapes[run.y] else None


def _separable(
    operation: Operation, only_reader: Callable[[int], Operation | None]
) -> tuple[Conv | None, Conv, Pointwise] | None:
    """Returns (convolution or None, depthwise, pointwise) from an operation on, if nothing else reads between them."""
    chain: list[Conv] = []
    current: Operation | None = operation
    while isinstance(current, Conv) and len(chain) < 2:
        chain.append(current)
        current = only_reader(current.y)
    if not chain or not isinstance(current, Pointwise) or current.pooled or len(current.size) != 2:
        return None
    stem, middle = chain if len(chain) == 2 else (None, chain[0])
    if not is_depthwise(middle) or any(layer.bias == "map" for layer in chain):
        return None
    if stem is not None and (stem.groups > 1 or is_depthwise(stem)):
        return None
    return stem, middle, current
