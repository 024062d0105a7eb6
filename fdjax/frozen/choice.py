"""Choosing forms by measured time on the machine at hand: among exact ones, and between pruned and released layers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fdjax.errors import UserError, first_line
from fdjax.frozen.assemble import Frozen, fewest_macs, freeze
from fdjax.frozen.clock import cores, interleaved
from fdjax.frozen.engines import find_engine, runner, what_times_depend_on
from fdjax.frozen.layers import HostArrays
from fdjax.frozen.program import Pointwise, Program, Run
from fdjax.frozen.runs import Candidates
from fdjax.graph.masks import SIDES, Counts, MaskedGraph

# Times of a layer alone, a few percent apart, do not say which is faster in the network.
_CLEARLY_FASTER = 0.95


def alone(operation: Run | Pointwise, inputs: int) -> Program:
    """A program of one operation, which reads a map of `inputs` channels."""
    run = isinstance(operation, Run)
    read, made = (operation.in_size, operation.out_size) if run else (operation.size, operation.size)
    if not run and operation.pooled:
        made = ()
    shapes = ((*read, inputs), (*made, operation.outputs))
    return Program(shapes, (0,), (1,), (dataclasses.replace(operation, x=0, y=1),))


def time_programs(
    candidates: Mapping[str, tuple[Program, HostArrays]], batch: int, engine: str = "xla"
) -> dict[str, float]:
    """Median milliseconds of programs, run in turn on random maps of `batch` images.

    Args:
      candidates: parts of networks, by name.
      batch: images at once.
      engine: one of `fdjax.frozen.engines.ENGINES`.

    Returns:
      By name; those that the engine refuses are left out.

    Raises:
      UserError: the engine is not there, or refuses all of them.
    """
    found, functions, refusals = find_engine(engine), {}, []
    for name, (program, arrays) in candidates.items():
        try:
            functions[name] = runner(found, program, arrays, batch, cores(), part=True)
            functions[name]()
        except Exception as error:  # Of whatever kind an engine's binding raises.
            functions.pop(name, None)
            refusals.append(first_line(error))
    if not functions:
        raise UserError(f"the engine {engine} refuses {', '.join(candidates)}: {refusals[0]}")
    return {name: float(np.median(times.own)) for name, times in interleaved(functions).items()}


@dataclasses.dataclass
class Stopwatch:
    """Measures layers for one batch size; what it has measured it remembers.

    Attributes:
      batch: images at once.
      cache: a folder that keeps measurements from one command to the next, or None.
      engine: that the network is to run on.
      times: what has been measured in this process: layer -> form -> milliseconds (median).
    """

    batch: int = 1
    cache: Path | None = None
    engine: str = "xla"
    times: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def measure(self, layer: str, candidates: Mapping[str, tuple[Program, HostArrays]]) -> dict[str, float]:
        """Milliseconds of the schedules of a run, or of the forms of a layer."""
        file = self._file({name: program.to_dict() for name, (program, _) in candidates.items()})
        found = _read(file)
        if found is None:
            found = time_programs(candidates, self.batch, self.engine)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(found))
        self.times.setdefault(layer, {}).update(found)
        return found

    def choose(self, candidates: Candidates) -> str:
        """The fastest schedule of a run (`fdjax.frozen.freeze` takes it as `choose`).

        That with the fewest MACs, unless another is faster by more than 5%.
        """
        name = next(iter(candidates.values()))[0].name
        if len(candidates) == 1:
            return next(iter(candidates))
        times, usual = self.measure(name, programs(candidates)), fewest_macs(candidates)
        fastest = min(times, key=times.__getitem__)
        return fastest if times[fastest] < _CLEARLY_FASTER * times[usual] else usual

    def _file(self, plans: Mapping[str, object]) -> Path | None:
        if self.cache is None:
            return None
        key = json.dumps([plans, self.batch, cores(), what_times_depend_on(self.engine)], sort_keys=True)
        return self.cache / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _read(file: Path | None) -> dict[str, float] | None:
    try:
        return json.loads(file.read_text()) if file is not None else None
    except (OSError, ValueError):
        return None


def programs(candidates: Candidates) -> dict[str, tuple[Program, HostArrays]]:
    """The schedules of a run, each alone."""
    return {name: (alone(run, run.inputs), arrays) for name, (run, arrays) in candidates.items()}


def release_slower(
    network: MaskedGraph, variables: Any, counts: Counts, stopwatch: Stopwatch
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Releases the layers that take longer pruned than released, which changes the function.

    Partial counts of a run, or of a layer outside of any, rise to N; removed channels stay removed.

    Args:
      network: with its masks.
      variables: as `fdjax.frozen.freeze` takes them.
      counts: path of every FCMask -> kept counts.
      stopwatch: measures.

    Returns:
      The counts after release, and the names of the layers that were released.
    """
    raised = {path: np.where(np.asarray(counts[path]) > 0, n, 0) for path, (_, n) in network.mask_sizes.items()}
    pruned, released = (_forms(network, variables, c) for c in (counts, raised))
    after, names = {path: np.asarray(count) for path, count in counts.items()}, []
    for name, (layers, forms) in pruned.items():
        paths = [path for layer in layers for side in SIDES for path in network.paths_of(layer, side)]
        if all(np.array_equal(raised[path], counts[path]) for path in paths) or name not in released:
            continue
        whole = {f"released {form}": candidate for form, candidate in released[name][1].items()}
        times = stopwatch.measure(name, {**forms, **whole})
        if min(times, key=times.__getitem__) in whole:
            after |= {path: raised[path] for path in paths}
            names += [layer for layer in layers if layer in network.blocks]
    return after, names


def _forms(
    network: MaskedGraph, variables: Any, counts: Counts
) -> dict[str, tuple[tuple[str, ...], dict[str, tuple[Program, HostArrays]]]]:
    """Of every run, and of every wrapped layer outside of any: its layers, and its exact forms by name."""
    found: dict[str, tuple[tuple[str, ...], dict[str, tuple[Program, HostArrays]]]] = {}

    def keep(candidates: Candidates) -> str:
        run = next(iter(candidates.values()))[0]
        found[run.name] = run.layers, programs(candidates)
        return fewest_macs(candidates)

    frozen = freeze(network, variables, counts, keep)
    for name, (program, arrays) in layers_of(frozen).items():
        (operation,) = program.operations
        if isinstance(operation, Pointwise) and name in network.blocks:
            found[name] = (name,), {operation.form: (program, arrays)}
    return found


def layers_of(frozen: Frozen) -> dict[str, tuple[Program, HostArrays]]:
    """The runs and the pointwise layers of a frozen network, each a program with its own arrays, by name."""
    found = {}
    for operation in frozen.program.operations:
        if isinstance(operation, (Run, Pointwise)):
            arrays = {key: a for key, a in frozen.arrays.items() if key.startswith(f"{operation.name}/")}
            found[operation.name] = alone(operation, frozen.program.shapes[operation.x][-1]), arrays
    return found
