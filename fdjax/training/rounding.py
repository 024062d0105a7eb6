"""Rounds a run's learned masks: by MACs, by the gate's times, or until the measured time meets its target."""

from __future__ import annotations

import dataclasses
from typing import Any

from fdjax import runtime
from fdjax.config import LearnConfig
from fdjax.frozen import freeze
from fdjax.frozen.bench import dense_network, seeded_variables
from fdjax.frozen.choice import Stopwatch
from fdjax.frozen.speed import NEARLY, images_words, speed_on
from fdjax.graph.counting import network_macs
from fdjax.graph.masks import MaskedGraph
from fdjax.pruning import HardMasks
from fdjax.pruning.timed import TimeTable
from fdjax.training.build import hard_masks, hard_masks_by_time
from fdjax.training.time_table import measured_ratio, stopwatch_of, where

# The most roundings, and the relative distance from the target that is near enough, because times vary as much.
_TURNS, _NEAR = 6, 0.01
# From this relative distance on, the run says that the target was missed.
_MISSED = 0.1


def gated_masks(
    learn: LearnConfig, graph: MaskedGraph, fcmask: Any, table: TimeTable | None = None, *, learned: bool
) -> HardMasks:
    """Rounds the masks that a hard phase begins with; prints which layers are released for their time, or the time.

    Args:
      learn: levels, gate and target.
      graph: channel graph of the network.
      fcmask: the collection, values in [0, 1].
      table: measured times, if the target is a time.
      learned: whether masks have been learned; if not, they are all 1, so there is no target and nothing to time.

    Returns:
      The hard masks.
    """
    if table is not None and learned:
        return _to_measured_time(learn, graph, fcmask, table)
    by_macs = hard_masks(learn, graph, fcmask, to_target=learned)
    if learn.gate != "time" or not learned:
        return by_macs
    # Times are cached on disk, so that a run that resumes from before this point gets the same masks.
    stopwatch = Stopwatch(learn.engine_batch, runtime.times_cache_dir(), learn.engine)
    hard = _no_slower(learn, graph, fcmask, hard_masks_by_time(learn, graph, fcmask, stopwatch), stopwatch)
    slower = ", ".join(name for name in hard.released if name not in by_macs.released) or "nothing"
    if slower != "nothing" and {*hard.released} == {*graph.wrapped_layers}:
        slower = "every layer"
        if hard.macs.ratio < 1:
            slower = "every layer, but for the channels that are removed whole,"
    print(f"gate: {slower} released for being slower pruned; {hard.macs.ratio:.3f}x MACs", flush=True)
    return hard


def _no_slower(learn: LearnConfig, graph: MaskedGraph, fcmask: Any, hard: HardMasks, stopwatch: Stopwatch) -> HardMasks:
    """Returns the masks; if the network is slower than the dense one, whole channels; if these are too, no masks.

    Layers that are faster one by one need not be faster together.
    """
    weights, dense = seeded_variables(graph), dense_network(graph)

    def ratio(masks: HardMasks) -> float | None:
        frozen = freeze(graph, weights, masks.counts, stopwatch.choose)
        return speed_on(learn.engine, frozen, dense, learn.engine_batch, patient=True)["ratio"]

    before = ratio(hard)
    if before is None or before <= NEARLY:
        return hard
    whole = hard_masks(learn, graph, fcmask, to_target=True, released=(*graph.wrapped_layers,))
    after = ratio(whole)
    said = f"gate: together they take {before:.2f}x of the dense network's time"
    if after is not None:
        said += f", whole channels {after:.2f}x"
    if after is not None and after <= NEARLY:
        print(f"{said}, and these are kept", flush=True)
        return whole
    print(f"{said}: {_nothing_pruned(learn)}", flush=True)
    return _without_masks(graph)


def _nothing_pruned(learn: LearnConfig) -> str:
    where_it_runs = f"{learn.engine} at {images_words(learn.engine_batch)}"
    return f"on {where_it_runs} no pruning saves time, so nothing is pruned; larger batches may change that"


def _without_masks(graph: MaskedGraph) -> HardMasks:
    """Returns masks that prune nothing: every layer is released, every channel is kept."""
    counts, released = graph.full_counts(), (*graph.wrapped_layers,)
    return HardMasks(counts, released, 0.0, network_macs(graph, counts, released))


def _to_measured_time(learn: LearnConfig, graph: MaskedGraph, fcmask: Any, table: TimeTable) -> HardMasks:
    """Rounds by the table, measures the whole network, and corrects the table's target until the measurement agrees."""
    target, weights, stopwatch = learn.target_time, seeded_variables(graph), stopwatch_of(learn)
    assert target is not None
    asked, tried = target, list[tuple[float, float, HardMasks]]()
    for _ in range(_TURNS):
        hard = hard_masks(dataclasses.replace(learn, target_time=asked), graph, fcmask, table=table, to_target=True)
        measured, _ = measured_ratio(graph, weights, hard.counts, stopwatch)
        tried.append((asked, measured, hard))
        if abs(measured / target - 1) <= _NEAR:
            break
        asked = _next_target(target, [(a, m) for a, m, _ in tried])
    _, measured, hard = min(tried, key=lambda found: abs(found[1] - target))
    if measured > NEARLY:
        print(f"time: {measured:.3f}x of the dense network's: {_nothing_pruned(learn)}", flush=True)
        return _without_masks(graph)
    missed = ""
    if abs(measured / target - 1) > _MISSED:
        missed = "; the target was missed: no rounding of these masks came nearer; give more learn.epochs"
    print(
        f"time: {measured:.3f}x of the dense network's, asked for {target:g} ({where(learn)}; {len(tried)} measured); "
        f"{hard.macs.ratio:.3f}x MACs{missed}",
        flush=True,
    )
    return hard


def _next_target(target: float, tried: list[tuple[float, float]]) -> float:
    """Returns the table's next target: between one that came out too slow and one too fast, or in proportion.

    Args:
      target: the ratio that should be measured.
      tried: pairs of the table's target and the measured ratio.
    """
    low = max((pair for pair in tried if pair[1] <= target), default=None)
    high = min((pair for pair in tried if pair[1] > target and (low is None or pair[0] > low[0])), default=None)
    if low and high:
        # Keeps a distance from both, because the measurements are not exact.
        share = (target - low[1]) / (high[1] - low[1])
        asked = low[0] + min(max(share, 0.15), 0.85) * (high[0] - low[0])
    else:
        nearest = min(tried, key=lambda pair: abs(pair[1] - target))
        asked = nearest[0] * target / nearest[1]
    return min(1.0, max(asked, 1e-3))
