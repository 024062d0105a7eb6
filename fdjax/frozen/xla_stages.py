"""Divides a program into stages that process a few images at a time, so that large maps stay in the CPU's cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fdjax.frozen.program import Apply, Conv, Operation, Pointwise, Program, Run, makes

# Larger maps do not fit into the cache.
_CHUNK_BYTES = 4_000_000


class Stage(NamedTuple):
    """Successive operations, the number of images that they process at a time, and their input and output values."""

    images: int
    operations: tuple[Operation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def widest_map(operation: Operation, program: Program) -> int:
    """Returns the elements of the largest map that an operation reads or makes for one image."""
    if isinstance(operation, Run):
        pixels = operation.in_size[0] * operation.in_size[1]
        return pixels * max([operation.outputs, *(c.channels for c in operation.chains if not c.means)])
    if isinstance(operation, Conv):
        sizes = (operation.window.in_size, operation.inputs), (operation.window.out_size, operation.outputs)
        return max(size[0] * size[1] * channels for size, channels in sizes)
    if isinstance(operation, Pointwise):
        # A pooled layer stores only its mean, which is small.
        channels = max(operation.product.inputs, operation.outputs)
        return 0 if operation.pooled else math.prod(operation.size) * channels
    return max(math.prod(program.shapes[value]) for value in makes(operation))


def images_at_once(elements: int, batch: int) -> int:
    """Returns how many images, with maps of `elements`, are processed at a time on the CPU: a divisor of `batch`."""
    images = max(1, min(batch, _CHUNK_BYTES // max(1, 4 * elements)))
    while batch % images:
        images -= 1
    return images


def reads(operation: Operation) -> tuple[int, ...]:
    """Returns the values that an operation reads."""
    return tuple(v for v in operation.inputs if v >= 0) if isinstance(operation, Apply) else (operation.x,)


def stages(program: Program, batch: int) -> list[Stage]:
    """Divides a program at points where exactly one value is live; later stages have smaller maps, and more images."""
    parts: list[list[Operation]] = [[]]
    crossing: list[tuple[int, ...]] = [program.inputs]
    for index, operation in enumerate(program.operations):
        parts[-1].append(operation)
        live = _live(program, index + 1)
        if len(live) == 1 and index + 1 < len(program.operations):
            crossing.append(live)
            parts.append([])
    crossing.append(program.outputs)
    images = [images_at_once(max((widest_map(o, program) for o in part), default=0), batch) for part in parts]
    for index in range(len(images) - 2, -1, -1):
        images[index] = min(images[index], images[index + 1])
    found: list[Stage] = []
    for index, (count, part) in enumerate(zip(images, parts, strict=True)):
        if found and found[-1].images == count:
            last = found.pop()
            found.append(Stage(count, (*last.operations, *part), last.inputs, crossing[index + 1]))
        else:
            found.append(Stage(count, tuple(part), crossing[index], crossing[index + 1]))
    return found


def _live(program: Program, index: int) -> tuple[int, ...]:
    """Returns the values that are made before operation `index` and read from there on."""
    made = {*program.inputs, *(value for o in program.operations[:index] for value in makes(o))}
    needed: Sequence[int] = [*(value for o in program.operations[index:] for value in reads(o)), *program.outputs]
    return tuple(sorted(made.intersection(needed)))
