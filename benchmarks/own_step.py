"""Times mask steps of a plain network under `fdjax.masked` beside those of the zoo's own frequency layers.

    python benchmarks/own_step.py --threads 1 --rounds 9 --json FILE

Both are the same network with the same masks, which learn by the same step: gradient of the cross entropy, Adam,
clipping. The steps are timed in alternation in one process, and the medians are compared. `trace_s` is the time that
the start of a run takes for tracing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import _contest as contest

from fdjax import runtime
from fdjax.commands.output_files import write_report
from fdjax.errors import reports_user_errors

MASKS = {"untied": {"tied": False, "levels": None}, "tied": {"tied": True, "levels": (0, 1)}}
COLUMNS = ("masks", "batch", "zoo_ms", "masked_ms", "ratio", "zoo_compile_s", "masked_compile_s", "trace_s")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the flags."""
    parser = contest.Parser("Times a masked step beside the zoo's own.")
    parser.add_argument("--network", default="mobilenetv2_cifar10", help="MobileNetV2 of the zoo")
    parser.add_argument("--width", type=contest.width_multiplier, default=0.5, help="width multiplier")
    parser.add_argument("--resolution", type=contest.integer(8), default=32, help="side of the images in pixels")
    parser.add_argument("--batch", type=contest.integer(1), default=16, help="images in a step")
    parser.add_argument("--block", type=contest.integer(1, 4), default=2, help="block size K in pixels")
    parser.add_argument("--masks", nargs="+", choices=list(MASKS), default=list(MASKS), help="kinds of masks")
    contest.add_shared_flags(parser)
    return parser.parse_args(arguments)


def step_of(apply: Any, masks: Any, variables: Any, images: Any, labels: Any) -> tuple[Any, float]:
    """Returns a jitted mask step as a function without arguments, and the processor time of its compilation."""
    import jax
    import jax.numpy as jnp
    import optax

    optimizer = optax.adam(1e-2)

    def loss(masks: Any, variables: Any) -> Any:
        logits = apply(masks, variables, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()

    @jax.jit
    def step(masks: Any, state: Any, variables: Any) -> Any:
        updates, state = optimizer.update(jax.grad(loss)(masks, variables), state)
        return jax.tree.map(lambda mask: mask.clip(0, 1), optax.apply_updates(masks, updates)), state

    state, start = optimizer.init(masks), time.process_time()
    compiled = step.lower(masks, state, variables).compile()
    return lambda: compiled(masks, state, variables), time.process_time() - start


def measure(kind: str, flags: argparse.Namespace) -> dict[str, Any]:
    """Measures the row of one kind of masks."""
    import jax
    import numpy as np
    from flax.traverse_util import flatten_dict, unflatten_dict

    import fdjax
    from fdjax.config import LearnConfig
    from fdjax.frozen.clock import interleaved
    from fdjax.training.network import trace_network
    from fdjax.zoo import FCMASK, MobileNet

    settings, shape = MASKS[kind], (flags.resolution, flags.resolution, 3)
    module: Any = MobileNet(flags.network, 10, width=flags.width, block=flags.block, **settings)
    levels = "all" if settings["levels"] is None else "0,1,N"
    learn = LearnConfig(block=flags.block, tied=settings["tied"], levels=levels)
    start = time.process_time()
    graph = trace_network(module, shape, learn)
    row: dict[str, Any] = {"masks": kind, "batch": flags.batch, "trace_s": time.process_time() - start}
    rng = np.random.default_rng(flags.seed)
    images, labels = rng.normal(size=(flags.batch, *shape)).astype(np.float32), rng.integers(0, 10, flags.batch)
    variables: Any = dict(jax.jit(module.init)(jax.random.key(flags.seed), images))
    flat: Any = flatten_dict(variables.pop(FCMASK), sep="/")
    masks = {path: rng.uniform(0.3, 1, mask.shape).astype(np.float32) for path, mask in flat.items()}
    masked = fdjax.masked(module.without_masks().apply, graph)

    def own(masks: Any, variables: Any, images: Any) -> Any:
        return module.apply({**variables, FCMASK: unflatten_dict(masks, sep="/")}, images)

    steps = {}
    for name, apply in (("zoo", own), ("masked", masked)):
        steps[name], row[f"{name}_compile_s"] = step_of(apply, masks, variables, images, labels)
    found = [jax.tree.leaves(step()[0]) for step in steps.values()]
    row["difference"] = max(float(np.abs(one - other).max()) for one, other in zip(*found, strict=True))
    times = interleaved(steps, flags.rounds)
    row |= {f"{name}_ms": float(np.median(of.own)) for name, of in times.items()}
    return {**row, "ratio": statistics.median((times["masked"].own / times["zoo"].own).tolist())}


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Measures each kind of masks; prints its row and rewrites the JSON file after it."""
    flags = parse(arguments)
    runtime.limit_threads(flags.threads)
    runtime.setup()
    report = contest.new_report(flags)
    print("  ".join(f"{column:>16}" for column in COLUMNS))
    for kind in flags.masks:
        row = measure(kind, flags)
        cells = [f"{row[key]:.3f}" if isinstance(row[key], float) else str(row[key]) for key in COLUMNS]
        print("  ".join(f"{cell:>16}" for cell in cells), flush=True)
        report["rows"].append(row)
        write_report(flags.json, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
