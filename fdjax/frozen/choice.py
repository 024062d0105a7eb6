"""Choosing forms by measured time on the machine at hand: among exact ones, and between pruned and released layers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdjax import provenance
from fdjax.frozen import kernels
from fdjax.frozen.fold import Candidates, Frozen, HostArrays, Variables, fewest_macs, freeze
from fdjax.frozen.network import compiler_options
from fdjax.frozen.octave import OctavePlan
from fdjax.frozen.plan import BlockPlan, HeadPlan
from fdjax.spec import Counts, NetworkSpec, blocks

_WARM_UP, _FEWEST_ROUNDS, _MOST_ROUNDS, _SECONDS = 3, 7, 200, 0.4
# Times of a layer alone, a few percent apart, do not say which is faster in the network.
_CLEARLY_FASTER = 0.95


class Times(NamedTuple):
    """Milliseconds of every round, [rounds].

    Attributes:
      wall: from start to end.
      processor: that this process had, of all its threads.
    """

    wall: np.ndarray
    processor: np.ndarray

    @property
    def own(self) -> np.ndarray:
        """What the function itself took: `processor` where one core does everything, else `wall`."""
        return self.processor if has_one_core() else self.wall


def has_one_core() -> bool:
    """Whether this process computes on one processor core: its time there is then free of what other programs took."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores == 1 and jax.default_backend() == "cpu"


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int | None = None) -> dict[str, Times]:
    """Times functions turn by turn, so that a machine that slows down does so for all of them.

    Args:
      functions: each returns arrays, which are waited for.
      rounds: how often each is run after its warm-up; None: as often as fits into a fraction of a second, 7 to 200.

    Returns:
      The times of every round, by name.
    """
    for _ in range(_WARM_UP):
        for function in functions.values():
            jax.block_until_ready(function())
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}

    def one_round() -> None:
        for name, function in functions.items():
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(function())
            stop = time.perf_counter(), time.process_time()
            times[name].append((1e3 * (stop[0] - start[0]), 1e3 * (stop[1] - start[1])))

    one_round()
    if rounds is None:
        seconds = sum(wall for found in times.values() for wall, _ in found) / 1e3
        rounds = int(np.clip(_SECONDS / max(seconds, 1e-6), _FEWEST_ROUNDS, _MOST_ROUNDS))
    for _ in range(rounds - 1):
        one_round()
    return {name: Times(*np.asarray(found).T) for name, found in times.items()}


def _layer_function(plan: BlockPlan | HeadPlan, arrays: HostArrays, batch: int) -> Callable[[], Any]:
    evaluate, key = kernels.head if isinstance(plan, HeadPlan) else kernels.block, jax.random.key(0)
    if isinstance(plan, OctavePlan):
        x = plan.random_maps(key, batch)
    else:
        size = plan.size if isinstance(plan, HeadPlan) else plan.in_size
        x = jax.random.uniform(key, (batch, *size, plan.inputs), jnp.float32, 0, 6)
    on_device = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    function = jax.jit(functools.partial(evaluate, plan=plan), compiler_options=compiler_options())
    return functools.partial(function, x, on_device)


def time_layer(candidates: Mapping[str, tuple[BlockPlan | HeadPlan, HostArrays]], batch: int) -> dict[str, float]:
    """Median milliseconds of a layer's forms, run in turn on random maps of `batch` images."""
    functions = {name: _layer_function(plan, arrays, batch) for name, (plan, arrays) in candidates.items()}
    return {name: float(np.median(times.own)) for name, times in interleaved(functions).items()}


@dataclasses.dataclass
class Stopwatch:
    """Measures layers for one batch size; what it has measured it remembers.

    Attributes:
      batch: images at once.
      cache: a folder that keeps measurements from one command to the next, or None.
      times: what has been measured in this process: layer -> form -> milliseconds (median).
    """

    batch: int = 1
    cache: Path | None = None
    times: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def measure(
        self, layer: str, candidates: Mapping[str, tuple[BlockPlan | HeadPlan, HostArrays]]
    ) -> dict[str, float]:
        """Milliseconds of a layer's forms."""
        file = self._file({name: dataclasses.asdict(plan) for name, (plan, _) in candidates.items()})
        found = _read(file)
        if found is None:
            found = time_layer(candidates, self.batch)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(found))
        self.times.setdefault(layer, {}).update(found)
        return found

    def choose(self, candidates: Candidates) -> str:
        """The fastest form of an inverted residual block (`fdjax.frozen.freeze` takes it as `choose`).

        That with the fewest MACs, unless another is faster by more than 5%.
        """
        name = next(iter(candidates.values()))[0].name
        if len(candidates) == 1:
            return next(iter(candidates))
        times, usual = self.measure(name, candidates), fewest_macs(candidates)
        fastest = min(times, key=times.__getitem__)
        return fastest if times[fastest] < _CLEARLY_FASTER * times[usual] else usual

    def _file(self, plans: Mapping[str, object]) -> Path | None:
        if self.cache is None:
            return None
        machine = [jax.__version__, jax.devices()[0].device_kind, provenance.processor(), compiler_options()]
        key = json.dumps([plans, self.batch, *machine], sort_keys=True)
        return self.cache / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _read(file: Path | None) -> dict[str, float] | None:
    try:
        return json.loads(file.read_text()) if file is not None else None
    except (OSError, ValueError):
        return None


def release_slower(
    spec: NetworkSpec, variables: Variables, counts: Counts, stopwatch: Stopwatch
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Releases the layers that take longer pruned than released, which changes the function.

    Partial counts of an inverted residual block, or of the head, rise to N; removed channels stay removed.

    Returns:
      The counts after release, and the names of the layers that were released.
    """
    raised = {path: np.where(np.asarray(counts[path]) > 0, n, 0) for path, (_, n) in spec.mask_sizes.items()}
    pruned, released = (_forms(spec, variables, c) for c in (counts, raised))
    members = {name: list(roles.values()) for name, roles in blocks(spec).items()}
    members |= {layer.name: [layer] for layer in spec.layers if layer.name == "head"}
    after, names = {path: np.asarray(count) for path, count in counts.items()}, []
    for name, layers in members.items():
        paths = [path for layer in layers for path in (layer.input_mask, layer.output_mask) if path]
        if all(np.array_equal(raised[path], counts[path]) for path in paths):
            continue
        forms = {f"released {form}": candidate for form, candidate in released[name].items()}
        times = stopwatch.measure(name, {**pruned[name], **forms})
        if min(times, key=times.__getitem__) in forms:
            after |= {path: raised[path] for path in paths}
            names += [layer.name for layer in layers if layer.block]
    return after, names


def _forms(
    spec: NetworkSpec, variables: Variables, counts: Counts
) -> dict[str, dict[str, tuple[BlockPlan | HeadPlan, HostArrays]]]:
    """The exact forms of every block, and the head's only one, by name."""
    found: dict[str, dict[str, tuple[BlockPlan | HeadPlan, HostArrays]]] = {}

    def keep(candidates: Candidates) -> str:
        found[next(iter(candidates.values()))[0].name] = dict(candidates)
        return fewest_macs(candidates)

    head = layers_of(freeze(spec, variables, counts, keep)).get("head")
    return {**found, "head": {head[0].form: head}} if head else found


def layers_of(frozen: Frozen) -> dict[str, tuple[BlockPlan | HeadPlan, HostArrays]]:
    """The blocks and the head of a frozen network with their own arrays, by name."""
    plans: dict[str, BlockPlan | HeadPlan] = {unit.name: unit for unit in frozen.plan.units}
    if frozen.plan.head is not None:
        plans["head"] = frozen.plan.head
    return {
        name: (plan, {key: array for key, array in frozen.arrays.items() if key.startswith(f"{name}/")})
        for name, plan in plans.items()
    }
