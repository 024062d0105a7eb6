"""Times the block transforms of frozen networks alone, beside a copy of the same bytes (docs/benchmarks.md).

python benchmarks/transforms.py --threads 1 --json FILE
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import _contest as contest

from fdjax.errors import UserError, reports_user_errors

COLUMNS = ("size", "channels", "block", "coefs", "batch", "copy_ms", "forward_ms", "inverse_ms", "forward_ratio",
           "inverse_ratio", "forward_gb_s")  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the flags; every combination of their values is measured."""
    parser = contest.Parser("Time of the block transforms beside a copy of the same bytes.")

    def several(flag: str, help_text: str, default: Sequence, **accepted) -> None:
        parser.add_argument(flag, nargs="+", default=list(default), help=help_text, **accepted)

    several("--size", "sides of the map in pixels", [48, 24, 12], type=contest.integer(1))
    several("--channels", "numbers of channels of the map", [32, 192, 576], type=contest.integer(1))
    several("--block", "block sizes K in pixels", [2, 3, 4], type=contest.integer(1, 16))
    several("--keep", "shares of the coefficients that are computed", [1.0, 0.25], type=contest.share)
    several("--batch", "batch sizes in images", [1], type=contest.integer(1))
    contest.add_shared_flags(parser)
    return parser.parse_args(arguments)


def measure(point: tuple, rounds: int) -> contest.Row:
    """Measures the row of (size, channels, block, keep, batch), beside a copy that reads and writes the map."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fdjax.frozen.clock import interleaved
    from fdjax.frozen.xla import compiler_options
    from fdjax.frozen.xla_products import block_coefs, blocks_from_coefs

    size, channels, block, keep, batch = point
    coefs = max(1, round(keep * block**2))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, size, size, channels)).astype(np.float32))
    y = block_coefs(x, block, coefs)
    options: Any = compiler_options()

    def ready(function: Callable, given: jax.Array) -> Callable[[], Any]:
        compiled = jax.jit(function, compiler_options=options).lower(given).compile()
        return lambda: compiled(given)

    times = interleaved(
        {
            "copy": ready(jnp.copy, x),
            "forward": ready(lambda x: block_coefs(x, block, coefs), x),
            "inverse": ready(lambda y: blocks_from_coefs(y, block, (size, size)), y),
        },
        rounds,
    )
    copy, forward, inverse = (float(np.median(times[name].own)) for name in ("copy", "forward", "inverse"))
    return {
        **{"size": size, "channels": channels, "block": block, "coefs": coefs, "batch": batch},
        **{"copy_ms": copy, "forward_ms": forward, "inverse_ms": inverse},
        **{"forward_ratio": forward / copy, "inverse_ratio": inverse / copy},
        "forward_gb_s": (x.nbytes + y.nbytes) / forward / 1e6,
    }


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every point; prints each row and rewrites the JSON file after it."""
    flags = parse(arguments)
    if max(flags.block) > min(flags.size):
        raise UserError(f"--block {max(flags.block)} is larger than the map, --size {min(flags.size)}")
    grid = (flags.size, flags.channels, flags.block, flags.keep, flags.batch)
    contest.measure_rows(flags, COLUMNS, itertools.product(*grid), lambda at: measure(at, flags.rounds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
