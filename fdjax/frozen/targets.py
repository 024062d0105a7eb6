"""Compiles ahead of time for accelerators that this machine does not have, and reads their compilers' estimates.

The compiler for TPUs (libtpu) estimates the cycles of each of its fusions; the one for GPUs gives no estimate.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fdjax.errors import UserError, first_line
from fdjax.frozen.assemble import Frozen, fewest_macs
from fdjax.frozen.choice import nameless, programs, worth_timing
from fdjax.frozen.program import Apply, Program
from fdjax.frozen.runs import DENSE, Candidates
from fdjax.frozen.xla import RUN_SCOPE, apply, scope_of
from fdjax.ops.platform import tracing_for

# NVIDIA's figures of an H100 SXM with 80 GB, as XLA's GpuTargetConfig names them.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 }
device_description_str: "NVIDIA H100"
"""
# Without these variables libtpu would look for the metadata of a machine with TPUs.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@dataclasses.dataclass(frozen=True)
class _Target:
    """How jax describes and compiles for a target; one of `packages` has to be installed."""

    platform: str
    topology: str
    packages: tuple[str, ...]
    install: str
    config: str | None = None
    options: dict[str, str | bool] = dataclasses.field(default_factory=dict)


_TARGETS: Mapping[str, _Target] = {
    "tpu:v5e": _Target("tpu", "v5e:2x2", ("libtpu",), "jax[tpu]"),
    "tpu:v6e": _Target("tpu", "v6e:2x2", ("libtpu",), "jax[tpu]"),
    # Triton's matrix products would be tuned on the GPU, which is not there.
    "cuda:h100": _Target(
        "cuda",
        "h100",
        ("jax_cuda13_plugin", "jax_cuda12_plugin"),
        "jax[cuda13]",
        _H100,
        {"xla_gpu_enable_triton_gemm": False},
    ),
}
TARGETS = tuple(_TARGETS)


@dataclasses.dataclass(frozen=True)
class AheadOfTime:
    """The result of a compilation.

    Attributes:
      seconds: time of tracing and compilation.
      memory_mb: memory of the program on the device in 10^6 bytes: arguments, results and temporaries.
      cycles: the compiler's estimate of cycles; None if it gives none.
      cycles_by_run: estimated cycles of each operation of a frozen network, by name; a fusion counts for the operation
        of its last instruction.
    """

    seconds: float
    memory_mb: float
    cycles: int | None
    cycles_by_run: Mapping[str, int]


def compute_on_the_cpu() -> None:
    """Makes jax use the CPU alone, so that it does not look for other devices; call it before jax computes."""
    jax.config.update("jax_platforms", "cpu")


def find_target(name: str) -> jax.sharding.Sharding:
    """Returns the sharding of programs for a target.

    Args:
      name: one of `TARGETS`.

    Returns:
      The sharding on the first device of such a machine.

    Raises:
      UserError: if there is no such target, or its compiler is not installed or does not work.
    """
    if name not in _TARGETS:
        raise UserError(f"there is no target {name!r}; give one of {', '.join(TARGETS)}")
    target = _TARGETS[name]
    if all(importlib.util.find_spec(package) is None for package in target.packages):
        raise UserError(f"the target {name} needs what is not installed: pip install '{target.install}'")
    return _placement(name)


@functools.cache
def _placement(name: str) -> jax.sharding.Sharding:
    from jax.experimental import topologies

    target = _TARGETS[name]
    if target.platform == "tpu":
        for variable, value in _TPU_ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
    options = {} if target.config is None else {"target_config": target.config, "topology": "1x1x1"}
    try:
        described = topologies.get_topology_desc(target.topology, target.platform, **options)
    except Exception as error:  # A plugin can raise any exception.
        raise UserError(f"nothing here compiles for {name}: {first_line(error)}") from error
    return jax.sharding.SingleDeviceSharding(described.devices[0])


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Switches off the persistent cache, which cannot hold programs for devices that are not there."""
    from jax.experimental.compilation_cache import compilation_cache

    before = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009 (its type is not declared)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A function that is lowered for a target.

    Attributes:
      target: one of `TARGETS`.
      lowered: jax's lowered function.
      seconds: time of tracing and lowering.
    """

    target: str
    lowered: Any
    seconds: float

    @property
    def digest(self) -> str:
        """A hash of the lowered function; functions with the same hash compile to the same program."""
        return hashlib.sha256(self.lowered.as_text().encode()).hexdigest()

    def compile(self) -> AheadOfTime:
        """Compiles the function.

        Raises:
          UserError: if the compiler refuses it.
        """
        start = time.perf_counter()
        with _without_cache():
            try:
                compiled = self.lowered.compile(compiler_options=_TARGETS[self.target].options)
            except Exception as error:  # A compiler can raise any exception.
                raise UserError(f"the compiler for {self.target} refuses it: {first_line(error)}") from error
        seconds, usage = self.seconds + time.perf_counter() - start, compiled.memory_analysis()
        sizes = (usage.argument_size_in_bytes, usage.output_size_in_bytes, usage.temp_size_in_bytes) if usage else ()
        cycles, by_run = _expected_cycles(compiled.as_text() or "")
        return AheadOfTime(seconds, sum(sizes) / 1e6, cycles, by_run)


def lower_ahead(target: str, function: Callable[..., Any], *arguments: Any) -> Lowered:
    """Traces and lowers a function for a target.

    Args:
      target: one of `TARGETS`.
      function: a JAX function.
      *arguments: pytrees of arrays, or of objects with a shape and a dtype.

    Returns:
      The lowered function.

    Raises:
      UserError: as in `find_target`, or if the function cannot be lowered for the target.
    """
    where = find_target(target)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), arguments)
    start = time.perf_counter()
    with tracing_for(_TARGETS[target].platform):
        try:
            lowered = jax.jit(function).lower(*shapes)
        except Exception as error:  # A lowering rule can raise any exception.
            raise UserError(f"the compiler for {target} refuses it: {first_line(error)}") from error
    return Lowered(target, lowered, time.perf_counter() - start)


def compile_ahead(target: str, function: Callable[..., Any], *arguments: Any) -> AheadOfTime:
    """Lowers a function for a target by `lower_ahead`, and compiles it."""
    return lower_ahead(target, function, *arguments).compile()


def _expected_cycles(text: str) -> tuple[int | None, dict[str, int]]:
    """Reads the estimated cycles from a compiled program's text: their sum, and by operation of a frozen network."""
    total, by_run = None, dict[str, int]()
    for line in text.splitlines():
        found = re.search(r'"estimated_cycles":\s*"?(\d+)', line)
        if not found:
            continue
        total = (total or 0) + int(found[1])
        scope = re.search(rf'op_name="[^"]*/({RUN_SCOPE}[^/"]+)/', line)
        if scope:
            by_run[scope[1]] = by_run.get(scope[1], 0) + int(found[1])
    return total, by_run


def lower_frozen(
    target: str, program: Program, arrays: Mapping[str, Any], batch: int, dtype: str = "bfloat16", *, part: bool = False
) -> Lowered:
    """Traces and lowers a frozen network, or a part of one, for a target.

    Args:
      target: one of `TARGETS`.
      program: the program.
      arrays: its arrays, by name.
      batch: the batch size, in images.
      dtype: type of weights and activations, "bfloat16" or "float32".
      part: whether the inputs are maps instead of images.

    Returns:
      The lowered function.

    Raises:
      UserError: as in `lower_ahead`.
    """
    # Indices and conditions keep their types.
    types = {
        name: jnp.dtype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array.dtype
        for name, array in arrays.items()
    }
    given = {name: jax.ShapeDtypeStruct(array.shape, types[name]) for name, array in arrays.items()}
    kind = jnp.dtype(dtype) if part else jnp.dtype("uint8")
    images = [jax.ShapeDtypeStruct((batch, *program.shapes[value]), kind) for value in program.inputs]
    return lower_ahead(target, functools.partial(apply, program), given, *images)


def compile_frozen(
    target: str, program: Program, arrays: Mapping[str, Any], batch: int, dtype: str = "bfloat16", *, part: bool = False
) -> AheadOfTime:
    """Lowers a frozen network, or a part of one, by `lower_frozen`, and compiles it; cycles are by operation name."""
    made = lower_frozen(target, program, arrays, batch, dtype, part=part).compile()
    names = {
        scope_of(operation): operation.name for operation in program.operations if not isinstance(operation, Apply)
    }
    by_run = {names.get(scope, scope): cycles for scope, cycles in made.cycles_by_run.items()}
    return dataclasses.replace(made, cycles_by_run=by_run)


@dataclasses.dataclass
class Estimate:
    """Chooses schedules by the cycles that a target's compiler estimates for each of them alone.

    Attributes:
      target: one of `TARGETS`.
      batch: the batch size, in images.
      dtype: type of weights and activations.
      cycles: the estimates so far: run -> schedule -> cycles.
    """

    target: str
    batch: int = 1
    dtype: str = "bfloat16"
    cycles: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    _known: dict[str, int] = dataclasses.field(default_factory=dict)

    def worth(self, candidates: Candidates) -> Candidates:
        """Leaves out the schedules of a run that a clock would not time, but for the dense one.

        Args:
          candidates: the schedules of a run, by name.

        Returns:
          The remaining schedules.
        """
        timed = worth_timing(candidates)
        return {name: candidate for name, candidate in candidates.items() if name in timed or name == DENSE}

    def measure(self, layer: str, candidates: Mapping[str, tuple[Program, Any]]) -> dict[str, int]:
        """Estimates the schedules of a run, or the forms of a layer.

        Args:
          layer: name of the run or layer, under which the cycles are recorded.
          candidates: programs and their arrays, by name; each is a part of a network.

        Returns:
          The estimated cycles of each, by name.

        Raises:
          UserError: if the target's compiler gives no estimates, or refuses a program.
        """
        found = {form: self._expected(program, arrays) for form, (program, arrays) in candidates.items()}
        self.cycles.setdefault(layer, {}).update(found)
        return found

    def choose(self, candidates: Candidates) -> str:
        """Chooses the schedule with the fewest estimated cycles; `fdjax.frozen.freeze` takes this method as `choose`.

        Args:
          candidates: the schedules of a run, by name.

        Returns:
          The name of the schedule.

        Raises:
          UserError: as `measure`.
        """
        name, usual = next(iter(candidates.values()))[0].name, fewest_macs(candidates)
        found = self.measure(name, programs(self.worth(candidates)))
        return min(found, key=lambda form: (found[form], form != usual))

    def _expected(self, program: Program, arrays: Mapping[str, Any]) -> int:
        # Equal layers are compiled only once.
        key = json.dumps(nameless(program), sort_keys=True)
        if key not in self._known:
            made = compile_frozen(self.target, program, arrays, self.batch, self.dtype, part=True)
            if made.cycles is None:
                raise UserError(
                    f"the compiler for {self.target} gives no estimates: give --choose macs, or --choose time on a "
                    "machine that has it"
                )
            self._known[key] = made.cycles
        return self._known[key]


def compare_ahead(
    target: str, networks: Mapping[str, Frozen], batch: int, dtype: str = "bfloat16"
) -> list[dict[str, Any]]:
    """Compiles networks for a target; the first is the dense one.

    Returns:
      A row for each, JSON types: `form` (its name), `target`, `batch`, `dtype`, `compile_seconds`, `memory_mb`, `macs`,
      `mac_ratio`, `cycles`, `cycle_ratio` (over the dense network's) and `cycles_by_run`; cycles are None if the
      compiler gives no estimate.

    Raises:
      UserError: as in `compile_ahead`.
    """
    rows: list[dict[str, Any]] = []
    for name, frozen in networks.items():
        made = compile_frozen(target, frozen.program, frozen.arrays, batch, dtype)
        row: dict[str, Any] = {"form": name, "target": target, "batch": batch, "dtype": dtype}
        row |= {"compile_seconds": made.seconds, "memory_mb": made.memory_mb, "macs": frozen.program.macs()}
        dense = rows[0] if rows else row | {"cycles": made.cycles}
        row["mac_ratio"] = row["macs"] / dense["macs"]
        row["cycles"] = made.cycles
        row["cycle_ratio"] = made.cycles / dense["cycles"] if made.cycles and dense["cycles"] else None
        rows.append({**row, "cycles_by_run": dict(made.cycles_by_run)})
    return rows
