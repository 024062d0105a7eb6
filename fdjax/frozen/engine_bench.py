"""Times networks on engines, all of them in alternation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fdjax.errors import first_line
from fdjax.frozen.assemble import Frozen
from fdjax.frozen.clock import clock, interleaved, quartiles
from fdjax.frozen.engines import find_engine, runner


def bench_engines(
    networks: Mapping[str, Frozen], engines: Sequence[str], *, batch: int, threads: int, rounds: int | None = None
) -> list[dict[str, Any]]:
    """Times networks on engines, all of them in alternation.

    Args:
      networks: the networks by name; the first is the dense one.
      engines: some of `fdjax.frozen.engines.ENGINES`.
      batch: the batch size, in images.
      threads: threads of ONNX Runtime and OpenVINO; XLA uses the process's, native code one.
      rounds: timed executions of each after the warm-up; None: as `interleaved` chooses.

    Returns:
      A row for each network and engine, JSON types: `form` (the network's name), `engine`, `batch`, `clock`, `ms`
      (median), `ms_quartiles`, `wall_ms`; `time_ratio`, over the dense network's time on the same engine;
      `ratio_to_best_dense`, over the dense network's time on the engine where that is fastest; `macs`, `mac_ratio`,
      `gflops` (two for each MAC). If an engine refuses a network, the row has `error` in place of times.

    Raises:
      UserError: if an engine is not installed.
    """
    runs: dict[str, Callable[[], Any]] = {}
    errors: dict[str, str] = {}
    for engine in map(find_engine, engines):
        for name, frozen in networks.items():
            key = f"{name} {engine.name}"
            try:
                runs[key] = runner(engine, frozen.program, frozen.arrays, batch, threads)
                runs[key]()
            except Exception as error:  # An engine's binding can raise any exception.
                runs.pop(key, None)
                errors[key] = first_line(error)
    times = interleaved(runs, rounds)
    dense = next(iter(networks))
    medians = {key: float(np.median(found.own)) for key, found in times.items()}
    best = min((medians[f"{dense} {engine}"] for engine in engines if f"{dense} {engine}" in medians), default=None)
    rows, whole = [], networks[dense].program.macs()
    for name, frozen in networks.items():
        for engine in engines:
            key, macs = f"{name} {engine}", frozen.program.macs()
            row: dict[str, Any] = {"form": name, "engine": engine, "batch": batch, "macs": macs}
            row["mac_ratio"] = macs / whole
            if key in errors:
                rows.append({**row, "error": errors[key]})
                continue
            own = medians.get(f"{dense} {engine}")
            row |= {"clock": clock(), "ms": medians[key], "ms_quartiles": quartiles(times[key].own)}
            row["wall_ms"] = float(np.median(times[key].wall))
            row["time_ratio"] = None if own is None else medians[key] / own
            row["ratio_to_best_dense"] = None if best is None else medians[key] / best
            row["gflops"] = 2e-6 * macs * batch / medians[key]
            rows.append(row)
    return rows
