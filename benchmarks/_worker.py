"""The process of one contestant: it prepares a training step, then times a turn for every line on stdin.

It answers on stdout: `READY {facts}`, then seconds per step for every line, and the process's peak memory in MB when
stdin ends. jax and torch are imported only after the process has its cores and its allocator.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

WARM_UP_STEPS = 4
# A turn has at least one step, and as many as fill this time.
TURN_S = 0.05

# Does a number of steps, waits for their results, and returns the last loss.
Run = Callable[[int], float]
Facts = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What one worker measures.

    Attributes:
      engine: "fdjax" or "torch".
      network: a variant of `fdjax.zoo`.
      width: width multiplier.
      batch: images in a step.
      resolution: side of an image in pixels.
      block: K of the wrapped layers; maps smaller than K are one block. Weight steps do not depend on it.
      threads: number of processor cores.
      dtype: "float32" or "bfloat16".
      allocator: "default" or "tuned".
      step: "weights", "masks", "masks_tied", "masks_channels" or "masks_one_sided".
      seed: seed of weights, masks and images.
    """

    engine: str
    network: str
    width: float
    batch: int
    resolution: int
    block: int
    threads: int
    dtype: str
    allocator: str
    step: str
    seed: int


def set_process_up(case: Case) -> None:
    """Sets the cores, the allocator and XLA's flags; this has to come before jax or torch is imported."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: case.threads])
    if case.allocator == "tuned":
        from fdjax.runtime import keep_freed_memory, use_threads_for_convolutions

        use_threads_for_convolutions()
        if not keep_freed_memory():
            raise SystemExit("the tuned allocator needs glibc: --allocator default")


def timed(run: Run, steps: int) -> float:
    """Returns the seconds per step over `steps` steps."""
    start = time.perf_counter()
    run(steps)
    return (time.perf_counter() - start) / steps


def serve(run: Run, facts: Facts, channel: TextIO) -> None:
    """Warms up, writes READY, then takes turns until stdin ends."""
    loss = run(WARM_UP_STEPS)
    if not math.isfinite(loss):
        raise SystemExit(f"the loss is {loss} after {WARM_UP_STEPS} steps: this is no training step")
    steps = math.ceil(TURN_S / timed(run, 1))
    print("READY", json.dumps(facts), file=channel, flush=True)
    for _ in sys.stdin:
        print(timed(run, steps), file=channel, flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, file=channel, flush=True)


def main() -> None:
    """Executes the case that is given as JSON in the first argument."""
    case = Case(**json.loads(sys.argv[1]))
    # Output of libraries goes to stderr, so that it does not mix with the answers.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    set_process_up(case)
    run, facts = importlib.import_module(f"_{case.engine}_step").prepare(case)
    serve(run, facts, channel)


if __name__ == "__main__":
    main()
