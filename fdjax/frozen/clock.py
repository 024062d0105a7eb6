"""Times functions in alternation, by processor time if this process has one core, else by the wall clock."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

_WARM_UP, _FEWEST_ROUNDS, _MOST_ROUNDS, _SECONDS = 3, 7, 1000, 0.4


class Times(NamedTuple):
    """Milliseconds of every round, [rounds].

    Attributes:
      wall: time from start to end.
      processor: processor time of all threads of this process.
    """

    wall: np.ndarray
    processor: np.ndarray

    @property
    def own(self) -> np.ndarray:
        """The time of the function itself: `processor` if one core does everything, else `wall`."""
        return self.processor if has_one_core() else self.wall


def cores() -> int:
    """Returns the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_one_core() -> bool:
    """Whether this process computes on one processor core; its processor time then leaves out other programs' time."""
    return cores() == 1 and jax.default_backend() == "cpu"


def clock() -> str:
    """Returns which clock `Times.own` is of: "processor" or "wall"."""
    return "processor" if has_one_core() else "wall"


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int | None = None, seconds: float = _SECONDS
) -> dict[str, Times]:
    """Times functions in alternation, so that a machine that slows down slows all of them.

    Args:
      functions: the functions, by name; the arrays that one returns are waited for.
      rounds: executions of each after the warm-up; None: as many as fit into `seconds`, 7 to 1000.
      seconds: about how long all of them take together.

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
        once = sum(wall for found in times.values() for wall, _ in found) / 1e3
        rounds = int(np.clip(seconds / max(once, 1e-6), _FEWEST_ROUNDS, _MOST_ROUNDS))
    for _ in range(rounds - 1):
        one_round()
    return {name: Times(*np.asarray(found).T) for name, found in times.items()}


def quartiles(times: np.ndarray) -> list[float]:
    """Computes the first and the third quartile.

    Args:
      times: [rounds].

    Returns:
      The two quartiles.
    """
    return [float(value) for value in np.percentile(times, [25, 75])]
