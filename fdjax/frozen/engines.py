"""The engines that a frozen network runs on, by name: each makes a function that runs it once on random images."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fdjax.errors import UserError, first_line
from fdjax.frozen.assemble import Frozen
from fdjax.frozen.bench import compile_network, quartiles
from fdjax.frozen.choice import has_one_core, interleaved
from fdjax.frozen.native.compile import NativeNetwork, find_compiler
from fdjax.frozen.onnx_model import onnxruntime_session, to_onnx

Run = Callable[[], object]


def _images(frozen: Frozen, batch: int) -> np.ndarray:
    shape = (batch, *frozen.program.shapes[frozen.program.inputs[0]])
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def _native(frozen: Frozen, batch: int, threads: int) -> Run:
    network, images = NativeNetwork(frozen.program, frozen.arrays), _images(frozen, batch)
    return lambda: network(images)


def _xla(frozen: Frozen, batch: int, threads: int) -> Run:
    return compile_network(frozen, batch).run


def _onnxruntime(frozen: Frozen, batch: int, threads: int) -> Run:
    session = onnxruntime_session(to_onnx(frozen.program, frozen.arrays), threads)
    images = _images(frozen, batch).astype(np.float32)
    return lambda: session(images)


def _openvino(frozen: Frozen, batch: int, threads: int) -> Run:
    import openvino

    core = openvino.Core()
    model = core.read_model(to_onnx(frozen.program, frozen.arrays).SerializeToString())
    images = _images(frozen, batch).astype(np.float32)
    model.reshape(list(images.shape))
    hints = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", {**hints, "ENABLE_CPU_PINNING": False}).create_infer_request()
    return lambda: request.infer([images])


_RUNS: Mapping[str, Callable[[Frozen, int, int], Run]] = {
    "native": _native,
    "xla": _xla,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
ENGINES = tuple(_RUNS)
_PACKAGES = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}


def check_engines(engines: Sequence[str]) -> None:
    """Raises `UserError` for an engine that is unknown, or that this machine does not have; it says what to install."""
    for engine in engines:
        if engine not in ENGINES:
            raise UserError(f"there is no engine {engine!r}; give some of {', '.join(ENGINES)}")
        missing = [name for name in _PACKAGES.get(engine, ()) if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"the engine {engine} needs what is not installed: pip install {' '.join(missing)}")
    if "native" in engines:
        find_compiler()


def bench_engines(
    networks: Mapping[str, Frozen], engines: Sequence[str], *, batch: int, threads: int, rounds: int | None = None
) -> list[dict[str, Any]]:
    """Times networks, the first of which is the dense one, on engines, all of them turn by turn.

    Args:
      networks: by name.
      engines: some of `ENGINES`.
      batch: images at once.
      threads: of ONNX Runtime and OpenVINO; XLA has those of the process, native code has one.
      rounds: how often each runs after its warm-up; None: as `interleaved` has it.

    Returns:
      A row for each network and engine, JSON types: `form` (its name), `engine`, `batch`, `clock`, `ms` (median),
      `ms_quartiles`, `wall_ms`; `time_ratio`, over the dense network's on the same engine; `ratio_to_best_dense`, over
      the dense network's on the engine where that is fastest; `macs`, `mac_ratio`, `gflops` (two for each MAC).
      An engine that refuses a network has a row with `error` in place of times.

    Raises:
      UserError: an engine that is not there.
    """
    check_engines(engines)
    runs: dict[str, Run] = {}
    errors: dict[str, str] = {}
    for name, frozen in networks.items():
        for engine in engines:
            try:
                runs[f"{name} {engine}"] = _RUNS[engine](frozen, batch, threads)
                runs[f"{name} {engine}"]()
            except Exception as error:  # Of whatever kind an engine's binding raises.
                runs.pop(f"{name} {engine}", None)
                errors[f"{name} {engine}"] = first_line(error)
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
            row |= {"clock": "processor" if has_one_core() else "wall", "ms": medians[key]}
            row |= {"ms_quartiles": quartiles(times[key].own), "wall_ms": float(np.median(times[key].wall))}
            row["time_ratio"] = None if own is None else medians[key] / own
            row["ratio_to_best_dense"] = None if best is None else medians[key] / best
            row["gflops"] = 2e-6 * macs * batch / medians[key]
            rows.append(row)
    return rows
