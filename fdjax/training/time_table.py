"""Measures the times for a target of time: the network's runs and the whole network, on an engine and one thread."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from fdjax import runtime
from fdjax.config import LearnConfig
from fdjax.errors import UserError
from fdjax.frozen import Frozen, Stopwatch, fewest_macs, freeze
from fdjax.frozen.bench import dense_network, seeded_variables
from fdjax.frozen.choice import programs, worth_timing
from fdjax.frozen.program import Program, Take
from fdjax.frozen.runs import Candidates
from fdjax.frozen.speed import images_words
from fdjax.graph.counting import GroupRun
from fdjax.graph.masks import Counts, MaskedGraph
from fdjax.pruning.timed import Point, RunTimes, TimeTable, corners, counts_at, grid, timed_runs

# The settings that measured times depend on.
_TIMED_BY = ("engine", "engine_batch", "levels", "group_multiple", "sides", "tied", "include", "exclude", "block",
             "block_by_map", "block_by_layer")  # fmt: skip


def stopwatch_of(learn: LearnConfig) -> Stopwatch:
    """Makes a stopwatch for the engine and its batch size; with a target of time it uses one thread."""
    one_core = learn.target_time is not None
    return Stopwatch(learn.engine_batch, runtime.times_cache_dir(), learn.engine, one_core)


def where(learn: LearnConfig) -> str:
    """Says where a time was measured, in words."""
    return f"{learn.engine}, {images_words(learn.engine_batch)} at once, one thread"


def check_timed(learn: LearnConfig, graph: MaskedGraph) -> None:
    """Raises `UserError` if the time of such masks cannot be predicted from a table."""
    if not timed_runs(graph, learn.counts_below_whole) and learn.counts_below_whole != (0,):
        raise UserError(
            "learn.target_time needs masks whose time can be predicted: give --learn.tied, with --learn.levels 0,N or "
            "0,1,N"
        )


def same_times(one: LearnConfig, other: LearnConfig) -> bool:
    """Returns whether the times that are measured for one config are those of the other."""
    settings = [dataclasses.asdict(learn) for learn in (one, other)]
    return all(settings[0][name] == settings[1][name] for name in _TIMED_BY)


def table_of(learn: LearnConfig, graph: MaskedGraph, known: TimeTable | None) -> TimeTable | None:
    """Returns the measured times for a target of time: `known`, or measured now; None if there is no such target."""
    if learn.target_time is None or not graph.masks:
        return None
    if known is not None:
        _check_reachable(learn, known.least)
        return known
    print(f"measuring times on {where(learn)}; earlier measurements come from the cache", flush=True)
    return measure_table(learn, graph)


def _check_reachable(learn: LearnConfig, least: float) -> None:
    assert learn.target_time is not None
    if learn.target_time <= least:
        raise UserError(
            f"learn.target_time is {learn.target_time:g}, but with every masked channel removed {least:.3f} of the "
            f"dense network's time remain ({where(learn)}); give a higher target, or mask more"
        )


def measure_table(learn: LearnConfig, graph: MaskedGraph) -> TimeTable:
    """Times the runs of a network at a grid of widths, and the whole network dense and with all masked channels dead.

    Times that have been measured before come from the cache.

    Raises:
      UserError: if the engine is not installed or refuses the network, or the target cannot be reached.
    """
    stopwatch, weights = stopwatch_of(learn), seeded_variables(graph)
    runs = timed_runs(graph, learn.counts_below_whole)
    levels = {path: graph.levels_of(path, learn.counts_below_whole) for path in runs}
    grids = {
        path: grid(run.mask.channels, len(levels[path]) - 1, learn.multiple if run.mask.tied else 1)
        for path, run in runs.items()
    }
    forms = _forms(graph, weights, runs, grids, levels)
    found = {path: _times(runs[path], forms[path], len(grids[path][1]), stopwatch) for path in runs if forms[path]}
    nothing = freeze(graph, weights, {path: np.zeros_like(count) for path, count in graph.full_counts().items()})
    dense = dense_network(graph)
    whole = stopwatch.measure("whole", {"dense": _pair(dense), "nothing": _pair(nothing)}, part=False)
    if "dense" not in whole:
        raise UserError(f"the engine {learn.engine} refuses the network; give another --learn.engine")
    least = whole.get("nothing", 0.0) / whole["dense"]
    _check_reachable(learn, least)
    timed = tuple(
        RunTimes(
            path=path,
            layers=tuple(layer.name for layer in runs[path].layers),
            channels=runs[path].mask.channels,
            levels=levels[path],
            widths=grids[path][0],
            points=grids[path][1],
            milliseconds=times,
        )
        for path, times in found.items()
    )
    table = TimeTable(learn.engine, learn.engine_batch, whole["dense"], least, timed)
    return _calibrated(table, graph, weights, runs, stopwatch)


def _calibrated(
    table: TimeTable, graph: MaskedGraph, weights: Any, runs: dict[str, GroupRun], stopwatch: Stopwatch
) -> TimeTable:
    """Scales the times of the runs so that their sum is the measured time of the whole network.

    A run can take longer alone than between others, because engines keep maps in layouts of their own. The factors are
    measured with all runs at the same point of the grid.
    """
    axes = {len(run.levels) - 1 for run in table.runs}
    if len(axes) != 1:
        return table
    (number,) = axes
    factors = {(0,) * number: 1.0, (2,) * number: 1.0}
    for point in corners(number):
        counts = {r.path: counts_at(runs[r.path], r.levels, r.widths, r.nearest(point)) for r in table.runs}
        every = {**graph.full_counts(), **counts}
        frozen = freeze(graph, weights, every, stopwatch.choose)
        measured = stopwatch.measure("whole", {"network": _pair(frozen)}, part=False).get("network")
        inside, outside = table.parts(graph, every)
        factors[point] = max(0.1, (measured - outside) / inside) if measured is not None and inside else 1.0
    return dataclasses.replace(table, runs=tuple(run.scaled(factors) for run in table.runs))


def _pair(frozen: Frozen) -> tuple[Any, Any]:
    return frozen.program, frozen.arrays


def _forms(
    graph: MaskedGraph,
    weights: Any,
    runs: dict[str, GroupRun],
    grids: dict[str, tuple[tuple[int, ...], tuple[Point, ...]]],
    levels: dict[str, tuple[int, ...]],
) -> dict[str, dict[int, Candidates]]:
    """Returns the schedules worth timing of each run, by its mask's path and by its point of the grid."""
    found: dict[str, dict[int, Candidates]] = {path: {} for path in runs}
    by_layers: dict[tuple[str, ...], str] = {(run.writer.name, run.reader.name): path for path, run in runs.items()}
    at = 0

    def keep(candidates: Candidates) -> str:
        path, usual = by_layers.get(next(iter(candidates.values()))[0].layers), fewest_macs(candidates)
        if path is not None and at < len(grids[path][1]):
            found[path][at] = worth_timing(candidates)
        return usual

    for at in range(max((len(points) for _, points in grids.values()), default=0)):
        counts = {
            path: counts_at(run, levels[path], grids[path][0], grids[path][1][min(at, len(grids[path][1]) - 1)])
            for path, run in runs.items()
        }
        freeze(graph, weights, {**graph.full_counts(), **counts}, keep)
    return found


def _times(run: GroupRun, forms: dict[int, Candidates], points: int, stopwatch: Stopwatch) -> tuple[float, ...]:
    """Returns the milliseconds of the fastest schedule at every point, without the cost of the call itself."""
    every = {f"{at} {name}": pair for at, form in forms.items() for name, pair in programs(form).items()}
    shape = next(iter(every.values()))[0].shapes[0]
    call = Program((shape, (*shape[:2], 1)), (0,), (1,), (Take("call", 0, 1, (0,)),))
    times = stopwatch.measure(run.mask.path, {**every, "call": (call, {})})
    found = []
    for at in range(points):
        measured = [ms for name, ms in times.items() if name.split()[0] == str(at)]
        if at in forms and not measured:
            raise UserError(f"the engine {stopwatch.engine} refuses {run.writer.name} to {run.reader.name}")
        found.append(max(0.0, min(measured) - times.get("call", 0.0)) if measured else 0.0)
    return tuple(found)


def measured_ratio(
    graph: MaskedGraph, weights: Any, counts: Counts, stopwatch: Stopwatch
) -> tuple[float, dict[str, float]]:
    """Measures the time of the whole network with hard masks over the dense network's; schedules are chosen by time.

    Args:
      graph: channel graph of the network.
      weights: the variables, as `fdjax.frozen.freeze` takes them.
      counts: the kept counts of each FCMask by its path, int [C].
      stopwatch: the engine, the batch size and the cache of times.

    Returns:
      The ratio, and the milliseconds of "dense" and "pruned".

    Raises:
      UserError: if the engine refuses the network.
    """
    pair = {"dense": _pair(dense_network(graph)), "pruned": _pair(freeze(graph, weights, counts, stopwatch.choose))}
    times = stopwatch.now(pair, part=False)
    if len(times) < len(pair):
        raise UserError(f"the engine {stopwatch.engine} refuses the network")
    return times["pruned"] / times["dense"], times
