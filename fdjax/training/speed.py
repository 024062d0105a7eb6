"""Times a run's pruned network, frozen, beside the dense one on this machine."""

from __future__ import annotations

from typing import Any

import jax

from fdjax import runtime
from fdjax.config import LearnConfig
from fdjax.frozen import Stopwatch, fewest_macs, freeze
from fdjax.frozen.bench import dense_network
from fdjax.frozen.speed import images_words, is_slower, speed_on
from fdjax.graph.masks import Counts, MaskedGraph
from fdjax.training.network import graph_variables
from fdjax.training.state import TrainState
from fdjax.training.time_table import measured_ratio, stopwatch_of


def frozen_speed(learn: LearnConfig, graph: MaskedGraph, state: TrainState, counts: Counts) -> dict[str, Any] | None:
    """Freezes the pruned and the dense network, and times them in alternation.

    Forms are chosen by the criterion of the gate: by time with `gate="time"`, otherwise by MACs.

    Args:
      learn: the gate, the engine and its batch size.
      graph: channel graph of the network.
      state: the state, with the weights.
      counts: the kept counts of each FCMask by its path, int [C].

    Returns:
      What `fdjax.frozen.speed.speed_on` returns, with `advice`: what to do if the pruned network is slower, or has so
      many different kept counts that XLA would take minutes to compile it; otherwise None. None if nothing is pruned.
    """
    if all((counts[path] == num_coefs).all() for path, (_, num_coefs) in graph.mask_sizes.items()):
        return None
    variables = graph_variables(graph, state.params, state.batch_stats)
    if learn.target_time is not None:
        return _beside_target(learn, graph, variables, counts)
    by_time = learn.gate == "time"
    stopwatch = Stopwatch(learn.engine_batch, runtime.times_cache_dir(), learn.engine) if by_time else None
    frozen = freeze(graph, variables, counts, stopwatch.choose if stopwatch else fewest_macs)
    speed = speed_on(learn.engine, frozen, dense_network(graph), learn.engine_batch)
    needs_advice = speed["problem"] == "compilation" or is_slower(speed)
    return {**speed, "advice": _advice(learn) if needs_advice else None}


def _beside_target(learn: LearnConfig, graph: MaskedGraph, variables: Any, counts: Counts) -> dict[str, Any]:
    """Measures the time under the conditions of the target, on one thread."""
    ratio, times = measured_ratio(graph, variables, counts, stopwatch_of(learn))
    on_device = learn.engine == "xla" and jax.default_backend() != "cpu"
    return {
        "engine": learn.engine,
        "device": jax.devices()[0].device_kind if on_device else "cpu",
        "threads": None if on_device else 1,
        "batch": learn.engine_batch,
        "clock": "wall" if on_device else "processor",
        "dense_ms": times["dense"],
        "pruned_ms": times["pruned"],
        "ratio": ratio,
        "target": learn.target_time,
        "problem": None,
        "advice": None,
    }


def _advice(learn: LearnConfig) -> str:
    """Returns the settings to try if the pruned network is slower than the dense one."""
    ways = []
    if learn.gate != "time":
        ways.append(f"--learn.gate time {_engine(learn)} (releases layers that are slower pruned)")
    if learn.counts_below_whole != (0,):
        ways.append("--learn.levels 0,N (whole channels)")
    if learn.group_multiple == 1:
        ways.append("--learn.group-multiple 8 (widths that fill vector units)")
    return " or ".join(ways) or "a wider network, a larger batch, or the dense network"


def _engine(learn: LearnConfig) -> str:
    return f"--learn.engine {learn.engine} --learn.engine-batch {learn.engine_batch}"


def speed_words(speed: dict[str, Any]) -> str:
    """Says in one line what `frozen_speed` found."""
    if speed["problem"] == "compilation":
        return (
            "not measured: a network with so many different kept counts takes minutes to compile (fdjax freeze and "
            f"fdjax bench do it), and on a CPU such networks have been slower than dense ones; try {speed['advice']}"
        )
    if speed["problem"] is not None:
        return f"not measured: {speed['engine']} refuses the network: {speed['problem']}"
    where = speed["device"]
    if speed["threads"] is not None:
        where += f", {speed['threads']} thread{'s' if speed['threads'] > 1 else ''}"
    text = (
        f"{speed['pruned_ms']:.3g} ms for {images_words(speed['batch'])}, frozen, by {speed['engine']} on {where}; "
        f"dense {speed['dense_ms']:.3g} ms: {speed['ratio']:.2f}x the time"
    )
    if speed.get("target") is not None:
        text += f", asked for {speed['target']:g}"
    return f"{text}, slower than the dense network; try {speed['advice']}" if speed["advice"] else text
