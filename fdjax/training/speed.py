"""The time of a run's pruned network on this machine, frozen, beside the dense one: what MACs have become."""

from __future__ import annotations

from typing import Any

import jax

from fdjax import runtime
from fdjax.config import LearnConfig
from fdjax.frozen import Stopwatch, fewest_macs, freeze
from fdjax.frozen.bench import bench, dense_network
from fdjax.graph.masks import Counts, MaskedGraph
from fdjax.training.network import graph_variables
from fdjax.training.state import TrainState

# Kept counts between 0 and N, summed over masks, above which compiling the frozen network takes more than some 15 s.
_MOST_PARTIAL_COUNTS = 150


def frozen_speed(learn: LearnConfig, graph: MaskedGraph, state: TrainState, counts: Counts) -> dict[str, Any] | None:
    """Freezes the network as it stands and the dense one, and times them in turn.

    Forms are chosen as the masks were gated: by time with `gate="time"`, else by MACs.

    Args:
      learn: the gate, and how many images at once.
      graph: channel graph of the network.
      state: the weights.
      counts: kept counts of every FCMask.

    Returns:
      JSON types: `engine`, `device`, `threads` (None where the device is no CPU), `batch`, `clock` (as
      `fdjax.frozen.bench.bench` has it), milliseconds `dense_ms` and `pruned_ms` (medians), `ratio` (pruned over
      dense), and `advice`, which is None unless the pruned network is slower. Masks with so many different counts that
      they would take minutes to compile are not timed: `clock`, milliseconds and `ratio` are then None, and there is
      advice. None where nothing is pruned.
    """
    sizes = graph.mask_sizes
    if all((counts[path] == num_coefs).all() for path, (_, num_coefs) in sizes.items()):
        return None
    facts = {
        "engine": "xla",
        "device": jax.devices()[0].device_kind,
        "threads": runtime.limit_threads(None) if jax.default_backend() == "cpu" else None,
        "batch": learn.gate_batch,
    }
    if sum(len({*counts[path]} - {0, n}) for path, (_, n) in sizes.items()) > _MOST_PARTIAL_COUNTS:
        return {**facts, **dict.fromkeys(("clock", "dense_ms", "pruned_ms", "ratio")), "advice": _advice(learn)}
    stopwatch = Stopwatch(learn.gate_batch, runtime.times_cache_dir()) if learn.gate == "time" else None
    variables = graph_variables(graph, state.params, state.batch_stats)
    frozen = freeze(graph, variables, counts, stopwatch.choose if stopwatch else fewest_macs)
    row = bench(frozen, dense_network(graph), {}, batch=learn.gate_batch)
    return {
        **facts,
        "clock": row["clock"],
        "dense_ms": row["dense_ms"],
        "pruned_ms": row["frozen_ms"],
        "ratio": row["time_ratio"],
        "advice": _advice(learn) if row["time_ratio"] > 1 else None,
    }


def _advice(learn: LearnConfig) -> str:
    """What else a run whose pruned network is slower than the dense one could ask for."""
    ways = []
    if learn.gate != "time":
        ways.append(f"--learn.gate time --learn.gate-batch {learn.gate_batch} (releases what is slower pruned)")
    if learn.counts_below_whole != (0,):
        ways.append("--learn.levels 0,N (whole channels)")
    if learn.tied and learn.group_multiple == 1:
        ways.append("--learn.group-multiple 8 (widths that vector units like)")
    return " or ".join(ways) or "a wider network, more images at once, or the dense network"


def speed_words(speed: dict[str, Any]) -> str:
    """What `frozen_speed` found, in one line."""
    if speed["ratio"] is None:
        return (
            "not measured: so many kept counts take minutes to compile (fdjax freeze and fdjax bench do it); "
            f"on a CPU such networks have been slower than dense ones; try {speed['advice']}"
        )
    images = "1 image" if speed["batch"] == 1 else f"{speed['batch']:,} images"
    where = speed["device"]
    if speed["threads"] is not None:
        where += f", {speed['threads']} thread{'s' if speed['threads'] > 1 else ''}"
    text = (
        f"{speed['pruned_ms']:.3g} ms for {images}, frozen, by {speed['engine']} on {where}; dense "
        f"{speed['dense_ms']:.3g} ms: {speed['ratio']:.2f}x the time"
    )
    return f"{text}, slower than the dense network; try {speed['advice']}" if speed["advice"] else text
