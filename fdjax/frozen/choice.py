"""Choosing forms by measured time on the machine at hand: among exact ones, and between pruned and released layers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fdjax.errors import UserError, first_line
from fdjax.frozen.assemble import Frozen, fewest_macs, freeze
from fdjax.frozen.clock import cores, interleaved
from fdjax.frozen.engines import find_engine, runner, what_times_depend_on
from fdjax.frozen.layers import HostArrays
from fdjax.frozen.one_core import times_on_one_core
from fdjax.frozen.program import Pointwise, Program, Run
from fdjax.frozen.runs import Candidates
from fdjax.graph.masks import SIDES, Counts, MaskedGraph

# Times of a layer alone, a few percent apart, do not say which is faster in the network.
_CLEARLY_FASTER = 0.95
# About how long parts, and whole networks, are timed.
_SECONDS_OF_PARTS, _SECONDS_OF_NETWORKS = 0.4, 2.0
# Transforms take more time than their MACs say: with so many times the MACs of another schedule one is not timed.
_MANY_MORE = 1.2


def alone(operation: Run | Pointwise, inputs: int) -> Program:
    """A program of one operation, which reads a map of `inputs` channels."""
    if isinstance(operation, Run):
        read, made = operation.in_size, operation.out_size
    else:
        read, made = operation.size, () if operation.pooled else operation.size
    shapes = ((*read, inputs), (*made, operation.outputs))
    return Program(shapes, (0,), (1,), (dataclasses.replace(operation, x=0, y=1),))


def time_programs(
    candidates: Mapping[str, tuple[Program, HostArrays]], batch: int, engine: str = "xla", *, part: bool = True
) -> dict[str, float]:
    """Median milliseconds of programs, run in turn on random maps or images.

    Args:
      candidates: by name.
      batch: images at once.
      engine: one of `fdjax.frozen.engines.ENGINES`.
      part: they are parts of networks, and read maps.

    Returns:
      By name; those that the engine refuses are left out.

    Raises:
      UserError: the engine is not there, or refuses all of them.
    """
    found, functions, refusals = find_engine(engine), {}, []
    for name, (program, arrays) in candidates.items():
        try:
            functions[name] = runner(found, program, arrays, batch, cores(), part=part)
            functions[name]()
        except Exception as error:  # Of whatever kind an engine's binding raises.
            functions.pop(name, None)
            refusals.append(first_line(error))
    if not functions:
        raise UserError(f"the engine {engine} refuses {', '.join(candidates)}: {refusals[0]}")
    found = interleaved(functions, seconds=_SECONDS_OF_PARTS if part else _SECONDS_OF_NETWORKS)
    return {name: float(np.median(times.own)) for name, times in found.items()}


@dataclasses.dataclass
class Stopwatch:
    """Measures layers for one batch size; what it has measured it remembers.

    Attributes:
      batch: images at once.
      cache: a folder that keeps measurements from one command to the next, or None.
      engine: that the network is to run on.
      one_core: measure on one core, whatever this process has; else on its own.
      times: what has been measured in this process: layer -> form -> milliseconds (median).
    """

    batch: int = 1
    cache: Path | None = None
    engine: str = "xla"
    one_core: bool = False
    times: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    _known: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def measure(
        self, layer: str, candidates: Mapping[str, tuple[Program, HostArrays]], *, part: bool = True
    ) -> dict[str, float]:
        """Milliseconds of the schedules of a run, or of the forms of a layer; of whole networks where they are no part.

        What the engine refuses is left out.
        """
        key = self._key({name: _nameless(program) for name, (program, _) in candidates.items()})
        found = self._known.get(key) or self._read(key)
        if found is None:
            found = self.now(candidates, part=part)
            if self.cache is not None:
                self.cache.mkdir(parents=True, exist_ok=True)
                (self.cache / f"{key}.json").write_text(json.dumps(found))
        self._known[key] = found
        self.times.setdefault(layer, {}).update(found)
        return found

    def now(self, candidates: Mapping[str, tuple[Program, HostArrays]], *, part: bool) -> dict[str, float]:
        """As `measure`, whatever has been measured before."""
        if self.one_core and self._in_another_process:
            return times_on_one_core(candidates, self.batch, self.engine, part=part)
        return time_programs(candidates, self.batch, self.engine, part=part)

    @property
    def _in_another_process(self) -> bool:
        """An accelerator is this process's own, and nothing else runs on a core that is alone."""
        return cores() > 1 and (self.engine != "xla" or jax.default_backend() == "cpu")

    def choose(self, candidates: Candidates) -> str:
        """The fastest schedule of a run (`fdjax.frozen.freeze` takes it as `choose`).

        That with the fewest MACs, unless another is faster by more than 5%.
        """
        name, usual, candidates = (
            next(iter(candidates.values()))[0].name,
            fewest_macs(candidates),
            worth_timing(candidates),
        )
        if len(candidates) == 1:
            return usual
        times = self.measure(name, programs(candidates))
        fastest = min(times, key=times.__getitem__)
        return usual if usual in times and times[fastest] > _CLEARLY_FASTER * times[usual] else fastest

    def _key(self, plans: Mapping[str, object]) -> str:
        machine = [1 if self.one_core else cores(), what_times_depend_on(self.engine)]
        return hashlib.sha256(json.dumps([plans, self.batch, *machine], sort_keys=True).encode()).hexdigest()

    def _read(self, key: str) -> dict[str, float] | None:
        try:
            return json.loads((self.cache / f"{key}.json").read_text()) if self.cache is not None else None
        except (OSError, ValueError):
            return None


def _nameless(program: Program) -> dict[str, Any]:
    """A program as data, without names: layers that are alike are measured once."""
    fields = program.to_dict()
    for operation in fields["operations"]:
        operation |= {name: None for name in ("name", "layers") if name in operation}
    return fields


def worth_timing(candidates: Candidates) -> Candidates:
    """The schedules of a run but for those that have many more MACs than the least, for transforms."""
    least = candidates[fewest_macs(candidates)][0].macs()
    transforms = {
        name: any(product.transforms for chain in run.chains for product in (chain.writer, chain.reader))
        for name, (run, _) in candidates.items()
    }
    return {
        name: candidate
        for name, candidate in candidates.items()
        if not transforms[name] or candidate[0].macs() <= _MANY_MORE * least
    }


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
