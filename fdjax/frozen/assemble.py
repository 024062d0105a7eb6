"""Compiles a network with hard masks: folds it, finds the runs, and chooses a schedule for each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from fdjax.frozen.folding import Folding
from fdjax.frozen.layers import HostArrays, OpenLayer, finish
from fdjax.frozen.program import Apply, Operation, Program, Take, makes
from fdjax.frozen.runs import Candidates, RunParts, find_run, schedules
from fdjax.frozen.views import without_views
from fdjax.graph.masks import Counts, MaskedGraph

Choose = Callable[[Candidates], str]


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A frozen network: its program, and its float32 arrays by name; `fdjax.frozen.program` lists the names."""

    program: Program
    arrays: HostArrays


def fewest_macs(candidates: Candidates) -> str:
    """Chooses the schedule with the fewest MACs.

    Args:
      candidates: the schedules of a run, by name.

    Returns:
      The name of the schedule; the first of several that are equal.
    """
    return min(candidates, key=lambda name: candidates[name][0].macs())


def freeze(network: MaskedGraph, variables: Any, counts: Counts, choose: Choose = fewest_macs) -> Frozen:
    """Compiles a network with hard masks into a dense network.

    Args:
      network: the channel graph, with its masks.
      variables: the variables, a tree of arrays with the structure and shapes that were traced.
      counts: path of each FCMask -> kept counts after the gate, int [C], 0..N.
      choose: chooses among the exact schedules of each run; returns the name of one.

    Returns:
      The frozen network; it equals the masked one up to rounding.

    Raises:
      ValueError: if variables or counts do not fit the network, or a frozen network has no form for an operation.
    """
    folding = Folding(network, variables, counts)
    runs = _runs(folding)
    inside = {id(layer) for run in runs.values() for layer in (run.writer, run.depthwise)}
    arrays, operations = dict(folding.builder.arrays), list[Operation]()
    for record in folding.builder.records:
        if isinstance(record, (Apply, Take)):
            operations.append(record)
        elif id(record) in runs:
            candidates = schedules(runs[id(record)])
            operation, own = candidates[choose(candidates)]
            operations.append(operation)
            arrays |= own
        elif id(record) not in inside:
            operations.append(finish(record, arrays))
    program = Program(tuple(folding.builder.shapes), folding.inputs, folding.outputs, tuple(operations))
    return Frozen(_renumbered(without_views(program)), {name: _stored(array) for name, array in arrays.items()})


def _stored(array: np.ndarray) -> np.ndarray:
    floats = np.issubdtype(array.dtype, np.floating)
    return np.array(array, np.float32 if floats else array.dtype, order="C")


def _runs(folding: Folding) -> dict[int, RunParts]:
    """Finds the runs, by the `id` of the layer in which each ends; a layer is in at most one run."""
    found: dict[int, RunParts] = {}
    taken: set[int] = set()
    for record in folding.builder.records:
        run = find_run(record) if isinstance(record, OpenLayer) else None
        members = {id(layer) for layer in (run.writer, run.depthwise, run.reader)} if run else set()
        if run and not members & taken:
            taken_names = {other.name for other in found.values()}
            if run.name in taken_names:
                run = dataclasses.replace(run, name=f"{run.writer.name}..{run.reader.name}")
            found[id(record)] = run
            taken |= members
    return found


def _inputs(operation: Operation) -> tuple[int, ...]:
    return operation.inputs if isinstance(operation, Apply) else (operation.x,)


def _renumbered(program: Program) -> Program:
    """Removes operations whose results nothing reads, and numbers the remaining values anew."""
    needed, kept = set(program.outputs), []
    for operation in reversed(program.operations):
        if needed.intersection(makes(operation)):
            kept.append(operation)
            needed.update(value for value in _inputs(operation) if value >= 0)
    kept.reverse()
    old = [*program.inputs, *(value for operation in kept for value in makes(operation))]
    new = {value: number for number, value in enumerate(old)}

    def moved(operation: Operation) -> Operation:
        if isinstance(operation, Apply):
            inputs = tuple(new.get(value, value) if value >= 0 else value for value in operation.inputs)
            return dataclasses.replace(operation, inputs=inputs, outputs=tuple(new[v] for v in operation.outputs))
        return dataclasses.replace(operation, x=new[operation.x], y=new[operation.y])

    return Program(
        tuple(program.shapes[value] for value in old),
        tuple(new[value] for value in program.inputs),
        tuple(new[value] for value in program.outputs),
        tuple(map(moved, kept)),
    )
