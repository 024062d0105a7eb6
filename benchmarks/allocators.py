"""Times a training step with one allocator: glibc's, glibc's with fdjax's settings, or one that is preloaded.

    python benchmarks/allocators.py default
    python benchmarks/allocators.py tuned
    LD_PRELOAD=.../libjemalloc.so.2 python benchmarks/allocators.py jemalloc

It prints the allocator's name and the milliseconds of a step (weights, width 0.35, batch 64, one core). An allocator
is chosen before a process starts, so each needs its own process; run them in alternation, several times.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

_WARM_UP, _STEPS = 4, 12


def main(name: str) -> None:
    """Times the step; "tuned" sets the allocator as fdjax's commands do, any other name changes nothing."""
    from fdjax import runtime

    if name == "tuned":
        runtime.setup()
    runtime.limit_threads(1)
    import jax
    from _fdjax_step import make_our_step, random_data
    from _worker import Case

    from fdjax.training.compilation import tidy_after_compilations

    if name == "tuned":
        tidy_after_compilations()
    case = Case(
        engine="fdjax", network="mobilenetv2_cifar10", width=0.35, batch=64, resolution=32, block=4, threads=1,
        dtype="float32", allocator="default", step="weights", seed=0,
    )  # fmt: skip
    step, state = make_our_step(case)
    images, labels = random_data(case)
    began = 0.0
    for number in range(_WARM_UP + _STEPS):
        if number == _WARM_UP:
            began = time.process_time()
        state = jax.block_until_ready(step(state, images, labels))[0]
    print(f"{name} {1000 * (time.process_time() - began) / _STEPS:.1f} ms, {os.cpu_count()} cores", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "default")
