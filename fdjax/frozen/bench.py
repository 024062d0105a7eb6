"""Measures time and memory of a frozen network beside the dense network, in alternation."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdjax.errors import UserError, first_line
from fdjax.frozen.artifact import GRAPH, FrozenNetwork
from fdjax.frozen.assemble import Frozen, freeze
from fdjax.frozen.choice import layers_of, time_programs
from fdjax.frozen.clock import clock, cores, interleaved, quartiles
from fdjax.frozen.engines import find_engine, is_there, random_inputs, runner
from fdjax.frozen.xla import apply, compiler_options
from fdjax.graph.masks import IMAGE_SCALING, MaskedGraph

# Compiles a network with another library for a batch size, and returns a function that executes it once.
Peer = Callable[[Frozen, int], Callable[[], object]]


def seeded_variables(network: MaskedGraph, seed: int = 0) -> list[np.ndarray]:
    """Makes random variables of a graph, for networks of which only the time matters.

    Kernels are scaled by the number of their inputs. Vectors are random biases, unless their name is that of a scale, a
    variance or a mean.

    Args:
      network: the channel graph.
      seed: the seed.

    Returns:
      An array for each variable, in the graph's order, float64.
    """
    rng, made = np.random.default_rng(seed), []
    operations = network.operations
    for value, path in operations.variables.items():
        shape, name = operations.shapes[value], path.rpartition("/")[2]
        if path == f"{IMAGE_SCALING}/mean" and network.input_mean:
            # A mean of 0 would be left out, but to subtract one takes time if the image is padded afterwards.
            made.append(np.array(network.input_mean))
        elif len(shape) > 1:
            inputs = np.prod(shape[:-1]) if len(shape) != 3 else np.prod(shape[:2])
            made.append(rng.normal(0, np.sqrt(2 / inputs), shape))
        elif name in ("scale", "var", "std", "gamma", "variance", "moving_variance"):
            made.append(np.ones(shape))
        elif name in ("mean", "moving_mean"):
            made.append(np.zeros(shape))
        else:
            made.append(rng.normal(0, 0.3, shape))
    return made


def dense_network(network: MaskedGraph, seed: int = 0) -> Frozen:
    """Freezes the unpruned network with random weights."""
    return freeze(network, seeded_variables(network, seed), network.full_counts())


def dense_of(artifact: FrozenNetwork) -> Frozen:
    """Freezes the dense network of a saved frozen one, with random weights.

    Raises:
      UserError: if the graph that was saved with it cannot be frozen.
    """
    try:
        return dense_network(artifact.network)
    except Exception as error:  # A damaged graph can raise any exception.
        raise UserError(
            f"{GRAPH} of the frozen network describes no network that can be made: {first_line(error)}; freeze the "
            "checkpoint again"
        ) from error


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A network that is compiled for one batch size.

    Attributes:
      run: executes it once and returns its result, or a tuple of several.
      compile_s: time of the compilation, in seconds.
      memory_mb: memory of arrays, images, logits and temporary buffers, in 10^6 bytes; None if XLA does not report it.
    """

    run: Callable[[], Any]
    compile_s: float
    memory_mb: float | None


def compile_network(frozen: Frozen, batch: int, dtype: str = "float32") -> Compiled:
    """Compiles a frozen network, and gives it random images.

    Args:
      frozen: the network.
      batch: the batch size, in images.
      dtype: type of weights and activations, "float32" or "bfloat16".

    Returns:
      The compiled network.
    """
    arrays = {
        name: jnp.asarray(array, dtype if np.issubdtype(array.dtype, np.floating) else array.dtype)
        for name, array in frozen.arrays.items()
    }
    images = [jnp.asarray(image) for image in random_inputs(frozen.program, batch)]
    function = functools.partial(apply, frozen.program, in_chunks=jax.default_backend() == "cpu")
    start = time.perf_counter()
    compiled = jax.jit(function, compiler_options=compiler_options()).lower(arrays, *images).compile()
    seconds = time.perf_counter() - start
    usage = compiled.memory_analysis()
    memory = None
    if usage is not None:
        sizes = (usage.argument_size_in_bytes, usage.output_size_in_bytes, usage.temp_size_in_bytes)
        memory = sum(sizes) / 1e6

    def run() -> Any:
        outputs = compiled(arrays, *images)
        return outputs[0] if len(outputs) == 1 else outputs

    return Compiled(run, seconds, memory)


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
    """Times a frozen network, the dense network, and another library's dense network, in alternation.

    Args:
      frozen: the pruned network.
      dense: the same network, unpruned.
      facts: other entries of the row, such as `network` and `mac_ratio`; JSON types.
      batch: the batch size, in images.
      dtype: type of weights and activations, "float32" or "bfloat16".
      rounds: timed executions of each after the warm-up; None: as many as fit into a fraction of a second, 7 to 200.
      peer: compiles the dense network with another library.

    Returns:
      A row, JSON types: `facts`; `batch`, `dtype`; the medians `dense_ms`, `frozen_ms` and `onnxruntime_dense_ms` in
      milliseconds of `clock` ("processor" if the process has one core, else "wall"), their quartiles, and medians of
      the wall clock; `time_ratio`, frozen over dense; seconds of compilation, and memory in MB.
    """
    compiled = {"dense": compile_network(dense, batch, dtype), "frozen": compile_network(frozen, batch, dtype)}
    functions: dict[str, Callable[[], object]] = {name: network.run for name, network in compiled.items()}
    if peer is not None:
        functions["onnxruntime_dense"] = peer(dense, batch)
    times = interleaved(functions, rounds)
    row: dict[str, Any] = {**facts, "batch": batch, "dtype": dtype, "clock": clock(), "onnxruntime_dense_ms": None}
    for name, found in times.items():
        row |= {f"{name}_ms": float(np.median(found.own)), f"{name}_ms_quartiles": quartiles(found.own)}
        row[f"{name}_wall_ms"] = float(np.median(found.wall))
    for name, network in compiled.items():
        row |= {f"{name}_compile_s": network.compile_s, f"{name}_memory_mb": network.memory_mb}
    return {**row, "rounds": len(times["dense"].wall), "time_ratio": row["frozen_ms"] / row["dense_ms"]}


def onnxruntime_peer(threads: int | None = None) -> Peer | None:
    """Returns ONNX Runtime as a peer of `bench`; None if onnx or onnxruntime is not installed.

    Args:
      threads: number of threads; None: the number of cores of this process.
    """
    if not is_there("onnxruntime"):
        return None
    engine = find_engine("onnxruntime")
    return lambda dense, batch: runner(engine, dense.program, dense.arrays, batch, threads or cores())


def bench_layers(frozen: Frozen, dense: Frozen, *, batch: int = 1) -> list[dict[str, Any]]:
    """Times each run, and each pointwise layer outside of runs, alone: frozen and dense in alternation.

    Returns:
      For each its name, form, `frozen_ms`, `dense_ms` (medians), `time_ratio`, `macs` and `dense_macs`.
    """
    rows, other = [], layers_of(dense)
    for name, (program, arrays) in layers_of(frozen).items():
        dense_program, dense_arrays = other[name]
        times = time_programs({"frozen": (program, arrays), "dense": (dense_program, dense_arrays)}, batch)
        if program == dense_program:  # It is one program, so its two times differ by chance only.
            times["frozen"] = times["dense"]
        (operation,) = program.operations
        rows.append(
            {
                "name": name,
                "form": getattr(operation, "form", "dense"),
                "frozen_ms": times["frozen"],
                "dense_ms": times["dense"],
                "time_ratio": times["frozen"] / times["dense"],
                "macs": program.macs(),
                "dense_macs": dense_program.macs(),
            }
        )
    return rows


def describe_masks(network: MaskedGraph, counts: Sequence[Mapping[str, Any]]) -> str:
    """Describes a network's masks in a word or two: "tied" or "untied", and the levels if they are few.

    Args:
      network: the channel graph, with its masks.
      counts: the `layers` of its manifest.
    """
    between = set()
    for layer in counts:
        for histogram in (layer["kept_counts"]["input"], layer["kept_counts"]["output"]):
            between |= {n for n, channels in enumerate((histogram or [])[1:-1], 1) if channels}
    levels = "" if len(between) > 3 else f" {{{', '.join(['0', *map(str, sorted(between)), 'N'])}}}"
    return ("tied" if any(mask.tied for mask in network.masks.values()) else "untied") + levels
