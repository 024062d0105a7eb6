"""Times a step of refinement of networks of ONNX files, with hard masks and without their removed channels.

    python benchmarks/refine_step.py FILE.onnx [...] --size 224 --batch 32 --json FILE.json

Masks are of whole channels in multiples of 8 and drawn by a seed: times do not depend on which channels are left. A
step is that of momentum SGD with batch norm in training mode. Three are timed in alternation: `dense` without masks,
`masked` with hard masks and all channels (`fdjax.masked`), `narrow` without the channels that nothing reads
(`fdjax.masked(narrow=True)`, what `train.py` does with `--model.factory`). `difference` is the norm of the difference
of the last two's gradients, over the norm of the gradients. `memory` is what XLA asks for beside arguments and results.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import _contest as contest

from fdjax import runtime
from fdjax.commands.output_files import write_report
from fdjax.errors import reports_user_errors

Apply = Callable[[Any, Any], Any]


def compiled(apply: Apply, variables: Any, images: Any, labels: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Returns a step as a function without arguments, its gradients, and what its compilation has taken."""
    import jax
    import optax

    from fdjax.graph.fast_convolutions import fast_convolutions

    optimizer = optax.sgd(0.01, 0.9)
    transformed: Any = fast_convolutions(apply)

    def loss(params: Any, statistics: Any) -> Any:
        logits, changed = transformed({"params": params, "batch_stats": statistics}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), changed["batch_stats"]

    def step(params: Any, statistics: Any, state: Any) -> Any:
        gradients, statistics = jax.grad(loss, has_aux=True)(params, statistics)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), statistics, state, gradients

    params, statistics = variables["params"], variables["batch_stats"]
    state, start = optimizer.init(params), time.process_time()
    made = jax.jit(step).lower(params, statistics, state).compile()
    taken = {"compile_s": time.process_time() - start, "memory": made.memory_analysis().temp_size_in_bytes}
    gradients = made(params, statistics, state)[3]
    return lambda: made(params, statistics, state)[0], gradients, taken


def measure(file: str, flags: argparse.Namespace) -> dict[str, Any]:
    """Measures the row of a file."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from onnx_networks import pruned_counts

    import fdjax
    from fdjax.frozen.clock import interleaved, quartiles
    from fdjax.onnx.module import onnx_network

    module = onnx_network(file)
    rng = np.random.default_rng(flags.seed)
    images = jnp.asarray(rng.normal(size=(flags.batch, flags.size, flags.size, 3)), jnp.float32)
    variables = {"batch_stats": {}, **jax.jit(module.init)(jax.random.key(flags.seed), images[:1])}
    classes = int(jax.eval_shape(module.apply, variables, images).shape[-1])
    labels = jnp.asarray(rng.integers(0, classes, flags.batch))
    graph = fdjax.with_masks(fdjax.trace(module.apply, variables, images[:1]))
    counts = pruned_counts(graph, flags.target_macs, flags.seed)

    def dense(variables: Any, images: Any) -> Any:
        return module.apply(variables, images, train=True, mutable=["batch_stats"])

    def hard(narrow: bool) -> Apply:
        return lambda variables, images: fdjax.masked(dense, graph, narrow=narrow)(counts, variables, images)

    row: dict[str, Any] = {"network": Path(file).stem, "macs_ratio": fdjax.count(graph, counts).ratio}
    steps, gradients = {}, {}
    for name, apply in (("dense", dense), ("masked", hard(False)), ("narrow", hard(True))):
        steps[name], gradients[name], taken = compiled(apply, variables, images, labels)
        row |= {f"{name}_{key}": value for key, value in taken.items()}
    apart = jax.tree.map(jnp.subtract, gradients["masked"], gradients["narrow"])
    row["difference"] = float(optax.tree.norm(apart) / optax.tree.norm(gradients["masked"]))
    times = {name: of.own for name, of in interleaved(steps, flags.rounds).items()}
    row["dense_ms"] = float(np.median(times["dense"]))
    for name in ("masked", "narrow"):
        ratios = times[name] / times["dense"]
        row |= {f"{name}_time_ratio": float(np.median(ratios)), f"{name}_time_ratio_quartiles": quartiles(ratios)}
        row[f"{name}_memory_ratio"] = row[f"{name}_memory"] / row["dense_memory"]
    return row


@reports_user_errors
def main() -> int:
    """Prints a row for each file."""
    parser = contest.Parser("Times a step of refinement without removed channels.")
    parser.add_argument("files", nargs="+", help="ONNX files")
    parser.add_argument("--size", type=contest.integer(8), default=224, help="side of images in pixels")
    parser.add_argument("--batch", type=contest.integer(1), default=32, help="images in a step")
    parser.add_argument("--target-macs", type=float, default=0.5, help="share of the MACs that is left")
    contest.add_shared_flags(parser)
    flags = parser.parse_args()
    runtime.limit_threads(flags.threads)
    runtime.setup()
    report = contest.new_report(flags)
    print("| network | MACs | dense step | masked | narrow | memory | compilation, masked and narrow | difference |")
    print("|---|---|---|---|---|---|---|---|")
    for file in flags.files:
        row = measure(file, flags)
        print(
            f"| {row['network']} | {row['macs_ratio']:.2f}x | {row['dense_ms']:.0f} ms | "
            f"{row['masked_time_ratio']:.2f}x | {row['narrow_time_ratio']:.2f}x | "
            f"{row['masked_memory_ratio']:.2f}x, {row['narrow_memory_ratio']:.2f}x | "
            f"{row['masked_compile_s']:.0f} s, {row['narrow_compile_s']:.0f} s | {row['difference']:.0e} |",
            flush=True,
        )
        report["rows"].append(row)
        write_report(flags.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
