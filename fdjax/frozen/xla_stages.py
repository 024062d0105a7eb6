"""On the CPU large maps leave the cache: a program in stages, each of which takes a few images at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fdjax.frozen.program import Apply, Conv, Operation, Pointwise, Program, Run, makes

# Maps beyond this leave the cache.
_CHUNK_BYTES = 4_000_000


class Stage(NamedTuple):
    """Operations in turn, so many images at once, from values to values."""

    images: int
    operations: tuple[Operation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def widest_map(operation: Operation, program: Program) -> int:
    """Elements of the widest map that the operation reads or makes for one image."""
    if isinstance(operation, Run):
        pixels = operation.in_size[0] * operation.in_size[1]
        return pixels * max([operation.outputs, *(c.channels for c in operation.chains if not c.means)])
    if isinstance(operation, Conv):
        sizes = (operation.window.in_size, operation.inputs), (operation.window.out_size, operation.outputs)
        return max(size[0] * size[1] * channels for size, channels in sizes)
    if isinstance(operation, Pointwise):
        # Once the mean over the map is taken, nothing is large; before it nothing is written.
        channels = max(operation.product.inputs, operation.outputs)
        return 0 if operation.pooled else math.prod(operation.size) * channels
    return max(math.prod(program.shapes[value]) for value in makes(operation))


def images_at_once(elements: int, batch: int) -> int:
    """How many images with maps of so many elements are taken at once on the CPU: a divisor of `batch`."""
    images = max(1, min(batch, _CHUNK_BYTES // max(1, 4 * elements)))
    while batch % images:
        images -= 1
    return images


def reads(operation: Operation) -> tuple[int, ...]:
    """The values that an operation reads."""
    return tuple(v for v in operation.inputs if v >= 0) if isinstance(operation, Apply) else (operation.x,)


def stages(program: Program, batch: int) -> list[Stage]:
    """The program cut where exactly one value crosses; maps shrink, and so the number of images grows."""
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
    """The values made before operation `index` that something reads from there on."""
    made = {*program.inputs, *(value for o in program.operations[:index] for value in makes(o))}
    needed: Sequence[int] = [*(value for o in program.operations[index:] for value in reads(o)), *program.outputs]
    return tuple(sorted(made.intersection(needed)))
