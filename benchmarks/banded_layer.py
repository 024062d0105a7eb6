"""Times one pruned pointwise layer in its banded form beside the dense one (docs/benchmarks.md).

python benchmarks/banded_layer.py --threads 1 --json FILE
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import _contest as contest

from fdjax.errors import UserError, reports_user_errors

if TYPE_CHECKING:
    import numpy as np

COUNTS = ("levels", "all")
COLUMNS = ("size", "inputs", "outputs", "block", "counts", "keep", "batch", "dense_ms", "banded_ms", "time_ratio",
           "mac_ratio", "paper_ratio")  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the flags; every combination of their values is measured."""
    parser = contest.Parser("Time of one pointwise layer, banded beside dense, over a grid.")

    def several(flag: str, help_text: str, default: Sequence, **accepted) -> None:
        parser.add_argument(flag, nargs="+", default=list(default), help=help_text, **accepted)

    several("--size", "sides of the map in pixels", [48, 24, 12, 6], type=contest.integer(1))
    several("--channels", "numbers of narrow channels; the layer makes six times as many", [32, 96, 160],
            type=contest.integer(1))  # fmt: skip
    several("--block", "block sizes K in pixels", [2, 3], type=contest.integer(1, 16))
    several("--keep", "shares of the kept coefficients on either side", [0.75, 0.5, 0.25], type=contest.share)
    several("--counts", "kept counts: 1 and N only, or all from 1 to N", COUNTS, choices=COUNTS)
    several("--batch", "batch sizes in images", [1], type=contest.integer(1))
    contest.add_shared_flags(parser)
    return parser.parse_args(arguments)


def seeded_counts(rng: np.random.Generator, channels: int, num_coefs: int, keep: float, counts: str) -> np.ndarray:
    """Returns kept counts [channels], descending, 1..N, with a mean near `keep` * N."""
    import numpy as np

    if counts == "levels":
        whole = round(channels * max(0.0, keep - 1 / num_coefs) / (1 - 1 / num_coefs)) if num_coefs > 1 else channels
        return np.repeat([num_coefs, 1], [whole, channels - whole])
    spread = min(keep, 1 - keep)
    drawn = np.round(num_coefs * rng.uniform(keep - spread, keep + spread, channels))
    return -np.sort(-np.clip(drawn, 1, num_coefs).astype(np.int64))


def measure(point: tuple, seed: int, rounds: int) -> contest.Row:
    """Measures the row of (size, channels, block, keep, counts, batch)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fdjax.frozen.clock import interleaved
    from fdjax.frozen.products import pack, plan_product
    from fdjax.frozen.program import Pointwise
    from fdjax.frozen.xla import compiler_options
    from fdjax.frozen.xla_run import pointwise
    from fdjax.ops.macs import pointwise_macs

    size, channels, block, keep, counts, batch = point
    rng = np.random.default_rng(seed)
    sides = [seeded_counts(rng, width, block**2, keep, counts) for width in (channels, 6 * channels)]
    plan = plan_product(sides[0], sides[1], block)
    layer = Pointwise("layer", 0, 1, "bands", plan, (size, size), block, None, "none", "none")
    kernel = rng.normal(size=(channels, 6 * channels)).astype(np.float32)
    arrays = {name: jnp.asarray(array) for name, array in pack("layer", kernel, plan).items()}
    x = jnp.asarray(rng.normal(size=(batch, size, size, channels)).astype(np.float32))
    options: Any = compiler_options()

    def ready(function: Callable, *given: Any) -> Callable[[], Any]:
        compiled = jax.jit(function, compiler_options=options).lower(x, *given).compile()
        return lambda: compiled(x, *given)

    times = interleaved(
        {
            "dense": ready(jnp.matmul, jnp.asarray(kernel)),
            "banded": ready(lambda x, arrays: pointwise(x, arrays, layer), arrays),
        },
        rounds,
    )
    dense, banded = (float(np.median(times[name].own)) for name in ("dense", "banded"))
    macs = pointwise_macs((size, size), block, sides[0], sides[1])
    return {
        **{"size": size, "inputs": channels, "outputs": 6 * channels, "block": block, "counts": counts, "keep": keep},
        **{"batch": batch, "dense_ms": dense, "banded_ms": banded, "time_ratio": banded / dense},
        **{"mac_ratio": layer.macs() / macs.dense, "paper_ratio": macs.paper_total / macs.dense},
    }


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every point; prints each row and rewrites the JSON file after it."""
    flags = parse(arguments)
    if max(flags.block) > min(flags.size):
        raise UserError(f"--block {max(flags.block)} is larger than the map, --size {min(flags.size)}")
    grid = (flags.size, flags.channels, flags.block, flags.keep, flags.counts, flags.batch)
    contest.measure_rows(flags, COLUMNS, itertools.product(*grid), lambda at: measure(at, flags.seed, flags.rounds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
