"""Chooses by measured time on this machine: among exact forms, and between pruned and released layers."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from fdjax.errors import UserError, first_line
from fdjax.frozen.assemble import Frozen, fewest_macs, freeze
from fdjax.frozen.clock import cores, interleaved
from fdjax.frozen.engines import find_engine, runner, what_times_depend_on
from fdjax.frozen.layers import HostArrays
from fdjax.frozen.one_core import times_on_one_core
from fdjax.frozen.program import Pointwise, Program, Run
from fdjax.frozen.runs import DENSE, Candidates
from fdjax.graph.masks import SIDES, Counts, MaskedGraph

# A form has to be faster than this share of the usual form's time: smaller differences may not hold in the network.
_CLEARLY_FASTER = 0.95
# About how long parts and whole networks are timed, in seconds.
_SECONDS_OF_PARTS, _SECONDS_OF_NETWORKS = 0.4, 2.0
# How often the latter is done, because on a busy machine the ratio of two networks varies by 2% from one to the next.
_REPEATS_OF_NETWORKS = 3
# A schedule with transforms is not timed if it has this many times the MACs of the cheapest: transforms take more time
# than their MACs suggest.
_MANY_MORE = 1.2


def alone(operation: Run | Pointwise, inputs: int) -> Program:
    """Returns a program of one operation, which reads a map of `inputs` channels."""
    if isinstance(operation, Run):
        read, made = operation.in_size, operation.out_size
    else:
        read, made = operation.size, () if operation.pooled else operation.size
    shapes = ((*read, inputs), (*made, operation.outputs))
    return Program(shapes, (0,), (1,), (dataclasses.replace(operation, x=0, y=1),))


def time_programs(
    candidates: Mapping[str, tuple[Program, HostArrays]], batch: int, engine: str = "xla", *, part: bool = True
) -> dict[str, float]:
    """Times programs in alternation on random maps or images.

    Args:
      candidates: programs and their arrays, by name.
      batch: the batch size, in images.
      engine: one of `fdjax.frozen.engines.ENGINES`.
      part: whether the programs are parts of networks, which read maps instead of images.

    Returns:
      The median of each in milliseconds, by name; programs that the engine refuses are left out.

    Raises:
      UserError: if the engine is not installed, or refuses all programs.
    """
    found, functions, refusals = find_engine(engine), {}, []
    for name, (program, arrays) in candidates.items():
        try:
            functions[name] = runner(found, program, arrays, batch, cores(), part=part)
            functions[name]()
        except Exception as error:  # An engine's binding can raise any exception.
            functions.pop(name, None)
            refusals.append(first_line(error))
    if not functions:
        raise UserError(f"the engine {engine} refuses {', '.join(candidates)}: {refusals[0]}")
    repeats, seconds = (1, _SECONDS_OF_PARTS) if part else (_REPEATS_OF_NETWORKS, _SECONDS_OF_NETWORKS)
    turns = [interleaved(functions, seconds=seconds) for _ in range(repeats)]
    return {name: float(np.median([np.median(times[name].own) for times in turns])) for name in functions}


@dataclasses.dataclass
class Stopwatch:
    """Times layers for one engine and batch size, and caches the times.

    Attributes:
      batch: the batch size, in images.
      cache: a folder that keeps times from one command to the next; None: times are not kept.
      engine: the engine that the network will run on.
      one_core: whether to measure on one core; otherwise on all cores of this process.
      times: the times that were used in this process: layer -> form -> median in milliseconds.
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
        """Returns times from the cache, or measures them.

        Args:
          layer: name of the run or layer, under which the times are recorded.
          candidates: programs and their arrays, by name: the schedules of a run, or the forms of a layer.
          part: whether the programs are parts of networks; otherwise they are whole networks.

        Returns:
          The median of each in milliseconds, by name; programs that the engine refuses are left out.
        """
        key = self._key({name: nameless(program) for name, (program, _) in candidates.items()})
        found = self._known.get(key) or self._read(key)
        if found is None:
            found = self.now(candidates, part=part)
            if self.cache is not None:
                with contextlib.suppress(OSError):  # A cache that cannot be written is done without.
                    self.cache.mkdir(parents=True, exist_ok=True)
                    (self.cache / f"{key}.json").write_text(json.dumps(found))
        self._known[key] = found
        self.times.setdefault(layer, {}).update(found)
        return found

    def now(self, candidates: Mapping[str, tuple[Program, HostArrays]], *, part: bool) -> dict[str, float]:
        """Measures times without the cache.

        Args:
          candidates: programs and their arrays, by name.
          part: whether the programs are parts of networks.

        Returns:
          The median of each in milliseconds, by name; programs that the engine refuses are left out.
        """
        if self.one_core and self._in_another_process:
            return times_on_one_core(candidates, self.batch, self.engine, part=part)
        return time_programs(candidates, self.batch, self.engine, part=part)

    @property
    def _in_another_process(self) -> bool:
        """Whether one core is measured in another process; with an accelerator or a single core it is not needed."""
        return cores() > 1 and (self.engine != "xla" or jax.default_backend() == "cpu")

    def worth(self, candidates: Candidates) -> Candidates:
        """Leaves out the schedules of a run that are not timed, as `worth_timing` does.

        Args:
          candidates: the schedules of a run, by name.

        Returns:
          The remaining schedules.
        """
        return worth_timing(candidates)

    def choose(self, candidates: Candidates) -> str:
        """Chooses the fastest schedule of a run; `fdjax.frozen.freeze` takes this method as `choose`.

        The schedule with the fewest MACs is chosen unless another is faster by more than 5%.

        Args:
          candidates: the schedules of the run, by name.

        Returns:
          The name of the schedule.
        """
        name, usual, candidates = (
            next(iter(candidates.values()))[0].name,
            fewest_macs(candidates),
            self.worth(candidates),
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


def nameless(program: Program) -> dict[str, Any]:
    """Returns a program as data without names, so that equal layers are measured only once."""
    fields = program.to_dict()
    for operation in fields["operations"]:
        operation |= {name: None for name in ("name", "layers") if name in operation}
    return fields


def worth_timing(candidates: Candidates) -> Candidates:
    """Leaves out the dense schedule, and schedules with transforms that have many more MACs than the cheapest.

    Args:
      candidates: the schedules of a run, by name.

    Returns:
      The remaining schedules.
    """
    least = candidates[fewest_macs(candidates)][0].macs()
    transforms = {
        name: any(product.transforms for chain in run.chains for product in (chain.writer, chain.reader))
        for name, (run, _) in candidates.items()
    }
    return {
        name: candidate
        for name, candidate in candidates.items()
        if name != DENSE and (not transforms[name] or candidate[0].macs() <= _MANY_MORE * least)
    }


def programs(candidates: Candidates) -> dict[str, tuple[Program, HostArrays]]:
    """Makes a program of each schedule of a run.

    Args:
      candidates: the schedules of the run, by name.

    Returns:
      The programs and their arrays, by the schedule's name.
    """
    return {name: (alone(run, run.inputs), arrays) for name, (run, arrays) in candidates.items()}


class Clock(Protocol):
    """Finds which forms of a part of a network are slower: a stopwatch, or an estimate."""

    def worth(self, candidates: Candidates) -> Candidates:
        """Leaves out the schedules of a run that cannot be the fastest.

        Args:
          candidates: the schedules of a run, by name.

        Returns:
          The remaining schedules.
        """
        ...

    def measure(self, layer: str, candidates: Mapping[str, tuple[Program, HostArrays]]) -> Mapping[str, float]:
        """Measures or estimates the schedules of a run, or the forms of a layer.

        Args:
          layer: name of the run or layer, under which the times are recorded.
          candidates: programs and their arrays, by name.

        Returns:
          Milliseconds or cycles of each, by name.
        """
        ...


def release_slower(
    network: MaskedGraph, variables: Any, counts: Counts, clock: Clock
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Releases the layers that take longer pruned than released; this changes what the network computes.

    When a run, or a layer outside of runs, is released, its kept counts between 0 and N rise to N; removed channels
    stay removed.

    Args:
      network: the channel graph, with its masks.
      variables: the variables, as `fdjax.frozen.freeze` takes them.
      counts: path of each FCMask -> kept counts, int [C], 0..N.
      clock: measures or estimates the times.

    Returns:
      The counts after the release, and the names of the released layers.
    """
    raised = {path: np.where(np.asarray(counts[path]) > 0, n, 0) for path, (_, n) in network.mask_sizes.items()}
    pruned, released = (_forms(network, variables, c, clock) for c in (counts, raised))
    after, names = {path: np.asarray(count) for path, count in counts.items()}, []
    for name, (layers, forms) in pruned.items():
        paths = [path for layer in layers for side in SIDES for path in network.paths_of(layer, side)]
        if all(np.array_equal(raised[path], counts[path]) for path in paths) or name not in released:
            continue
        whole = {f"released {form}": candidate for form, candidate in released[name][1].items()}
        times = clock.measure(name, {**forms, **whole})
        if min(times, key=times.__getitem__) in whole:
            after |= {path: raised[path] for path in paths}
            names += [layer for layer in layers if layer in network.blocks]
    return after, names


def _forms(
    network: MaskedGraph, variables: Any, counts: Counts, clock: Clock
) -> dict[str, tuple[tuple[str, ...], dict[str, tuple[Program, HostArrays]]]]:
    """Returns for each run, and each wrapped layer outside of runs, its layers and its exact forms by name."""
    found: dict[str, tuple[tuple[str, ...], dict[str, tuple[Program, HostArrays]]]] = {}

    def keep(candidates: Candidates) -> str:
        run = next(iter(candidates.values()))[0]
        found[run.name] = run.layers, programs(clock.worth(candidates))
        return fewest_macs(candidates)

    frozen = freeze(network, variables, counts, keep)
    for name, (program, arrays) in layers_of(frozen).items():
        (operation,) = program.operations
        if isinstance(operation, Pointwise) and name in network.blocks:
            found[name] = (name,), {operation.form: (program, arrays)}
    return found


def layers_of(frozen: Frozen) -> dict[str, tuple[Program, HostArrays]]:
    """Takes the runs and the pointwise layers out of a frozen network.

    Args:
      frozen: the network.

    Returns:
      A program with its arrays for each, by name.
    """
    found = {}
    for operation in frozen.program.operations:
        if isinstance(operation, (Run, Pointwise)):
            arrays = {key: a for key, a in frozen.arrays.items() if key.startswith(f"{operation.name}/")}
            found[operation.name] = alone(operation, frozen.program.shapes[operation.x][-1]), arrays
    return found
