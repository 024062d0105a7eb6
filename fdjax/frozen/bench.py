"""Time and memory of a frozen network beside the dense one, both in their best form, in the same run."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdjax.frozen.choice import has_one_core, interleaved, layers_of, time_layer
from fdjax.frozen.fold import Frozen, freeze
from fdjax.frozen.network import apply, compiler_options
from fdjax.spec import NetworkSpec

# Builds another library's network for a batch size, and returns a function that runs it once.
Peer = Callable[[Frozen, int], Callable[[], object]]


def seeded_variables(spec: NetworkSpec, seed: int = 0) -> dict[str, Any]:
    """`params` and `batch_stats` with random kernels and biases, for networks of which only the time matters."""
    rng = np.random.default_rng(seed)
    params: dict[str, Any] = {}
    stats: dict[str, Any] = {}

    def norm(tree: dict[str, Any], averages: dict[str, Any], name: str, channels: int) -> None:
        tree[name] = {"scale": np.ones(channels), "bias": rng.normal(0, 0.3, channels)}
        averages[name] = {"mean": np.zeros(channels), "var": np.ones(channels)}

    for layer in spec.layers:
        window = (layer.window, layer.window)
        *path, role = layer.name.split("/")
        tree, averages = params, stats
        for name in path:
            tree, averages = tree.setdefault(name, {}), averages.setdefault(name, {})
        shape = {
            "conv": (*window, layer.in_channels // layer.groups, layer.out_channels),
            "depthwise": (*window, layer.in_channels),
        }.get(layer.kind, (layer.in_channels, layer.out_channels))
        kernel = rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape)
        if layer.kind == "dense":
            tree[role] = {"kernel": kernel, "bias": np.zeros(layer.out_channels)}
            continue
        tree[role] = kernel if layer.kind == "depthwise" else {"kernel": kernel}
        # Those of octave products lie beside them, too, one for all that make a map.
        norm(tree, averages, layer.norm.split("/")[-1], layer.out_channels)
    return {"params": params, "batch_stats": stats}


def dense_network(spec: NetworkSpec, seed: int = 0) -> Frozen:
    """The unpruned network in its best form, with random weights."""
    return freeze(spec, seeded_variables(spec, seed), spec.full_counts())


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A network compiled for one batch size.

    Attributes:
      run: runs it once; returns logits.
      compile_s: seconds it took to compile.
      memory_mb: arrays, images, logits and temporary buffers, in 10^6 bytes; None where XLA does not tell.
    """

    run: Callable[[], jax.Array]
    compile_s: float
    memory_mb: float | None


def compile_network(frozen: Frozen, batch: int, dtype: str = "float32") -> Compiled:
    """Compiles a frozen network and gives it random images.

    Args:
      frozen: the network.
      batch: images at once.
      dtype: of arrays and maps, "float32" or "bfloat16".
    """
    arrays = {name: jnp.asarray(array, dtype) for name, array in frozen.arrays.items()}
    shape = (batch, *frozen.plan.input_shape)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8))
    function = functools.partial(apply, frozen.plan, in_chunks=jax.default_backend() == "cpu")
    start = time.perf_counter()
    compiled = jax.jit(function, compiler_options=compiler_options()).lower(arrays, images).compile()
    seconds = time.perf_counter() - start
    usage = compiled.memory_analysis()
    memory = None
    if usage is not None:
        sizes = (usage.argument_size_in_bytes, usage.output_size_in_bytes, usage.temp_size_in_bytes)
        memory = sum(sizes) / 1e6
    return Compiled(lambda: compiled(arrays, images), seconds, memory)


def _quartiles(times: np.ndarray) -> list[float]:
    return [float(value) for value in np.percentile(times, [25, 75])]


def bench(
    frozen: Frozen,
    dense: Frozen,
    facts: Mapping[str, Any],
    *,
    batch: int = 1,
    dtype: str = "float32",
    rounds: int | None = None,
    peer: Peer | None = None,
) -> dict[str, Any]:
    """Times a frozen network, the dense one, and a peer's dense one, turn by turn.

    Args:
      frozen: the pruned network.
      dense: the same network, unpruned.
      facts: what else a row is to say, such as `network` and `mac_ratio`; JSON types.
      batch: images at once.
      dtype: "float32" or "bfloat16".
      rounds: how often each runs after its warm-up; None: as often as fits into a fraction of a second, 7 to 200.
      peer: makes another library's dense network.

    Returns:
      A row, JSON types: `facts`; `batch`, `dtype`; milliseconds `dense_ms`, `frozen_ms`, `onnxruntime_dense_ms`
      (medians, of `clock`: "processor" where the process has one core, else "wall") and their quartiles, and medians by
      the wall clock; `time_ratio`, frozen over dense; seconds to compile and memory in MB.
    """
    compiled = {"dense": compile_network(dense, batch, dtype), "frozen": compile_network(frozen, batch, dtype)}
    functions: dict[str, Callable[[], object]] = {name: network.run for name, network in compiled.items()}
    if peer is not None:
        functions["onnxruntime_dense"] = peer(dense, batch)
    times = interleaved(functions, rounds)
    clock = "processor" if has_one_core() else "wall"
    row: dict[str, Any] = {**facts, "batch": batch, "dtype": dtype, "clock": clock, "onnxruntime_dense_ms": None}
    for name, found in times.items():
        row |= {f"{name}_ms": float(np.median(found.own)), f"{name}_ms_quartiles": _quartiles(found.own)}
        row[f"{name}_wall_ms"] = float(np.median(found.wall))
    for name, network in compiled.items():
        row |= {f"{name}_compile_s": network.compile_s, f"{name}_memory_mb": network.memory_mb}
    return {**row, "rounds": len(times["dense"].wall), "time_ratio": row["frozen_ms"] / row["dense_ms"]}


def bench_layers(frozen: Frozen, dense: Frozen, *, batch: int = 1) -> list[dict[str, Any]]:
    """Times each block, and the head, alone: frozen beside dense, turn by turn.

    Returns:
      For each: name, form, `frozen_ms`, `dense_ms` (medians), `time_ratio`, `macs` and `dense_macs`.
    """
    rows, other = [], layers_of(dense)
    for name, (plan, arrays) in layers_of(frozen).items():
        dense_plan, dense_arrays = other[name]
        times = time_layer({"frozen": (plan, arrays), "dense": (dense_plan, dense_arrays)}, batch)
        if plan == dense_plan:  # One program; two times of it would differ by chance.
            times["frozen"] = times["dense"]
        rows.append(
            {
                "name": name,
                "form": plan.form,
                "frozen_ms": times["frozen"],
                "dense_ms": times["dense"],
                "time_ratio": times["frozen"] / times["dense"],
                "macs": plan.macs(),
                "dense_macs": dense_plan.macs(),
            }
        )
    return rows


def describe_masks(spec: NetworkSpec, counts: Sequence[Mapping[str, Any]]) -> str:
    """Which masks a network has, in a word or two: "tied" or "paper", and the kept counts between 0 and N if few.

    Args:
      spec: the network.
      counts: the `layers` of its manifest.
    """
    between = set()
    for layer in counts:
        for histogram in (layer["kept_counts"]["input"], layer["kept_counts"]["output"]):
            between |= {n for n, channels in enumerate((histogram or [])[1:-1], 1) if channels}
    levels = "" if len(between) > 3 else f" {{{', '.join(['0', *map(str, sorted(between)), 'N'])}}}"
    return ("tied" if spec.tied else "untied") + levels
