"""Times 3x3 convolutions with groups as fdjax computes them, beside XLA's own grouped form (docs/benchmarks.md).

python benchmarks/grouped_conv.py --threads 1 --json FILE
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

COLUMNS = ("size", "channels", "groups", "batch", "library_ms", "ours_ms", "ratio", "library_gradient_ms",
           "gradient_ms", "gradient_ratio")  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the flags; every combination of their values is measured."""
    parser = contest.Parser("Times grouped convolutions beside the library's own form.")

    def several(flag: str, help_text: str, default: Sequence, **accepted) -> None:
        parser.add_argument(flag, nargs="+", default=list(default), help=help_text, **accepted)

    several("--size", "sides of the map in pixels", [8], type=contest.integer(1))
    several("--channels", "numbers of channels of the map and the output", [128, 256, 512], type=contest.integer(1))
    several("--groups", "numbers of groups", [32], type=contest.integer(1))
    several("--batch", "batch sizes in images", [8], type=contest.integer(1))
    contest.add_shared_flags(parser)
    return parser.parse_args(arguments)


def measure(point: tuple, rounds: int) -> contest.Row:
    """Measures the row of (size, channels, groups, batch): the convolution, and its gradients."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    from fdjax.frozen.clock import interleaved
    from fdjax.ops.conv import grouped_conv

    size, channels, groups, batch = point
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, size, size, channels)).astype(np.float32))
    kernel = jnp.asarray(rng.normal(size=(3, 3, channels // groups, channels)).astype(np.float32))

    def library(x: jax.Array, kernel: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return grouped_conv(x, kernel, groups=groups)

    def ready(function: Callable) -> Callable[[], Any]:
        compiled = jax.jit(function).lower(x, kernel).compile()
        return lambda: compiled(x, kernel)

    def gradient(function: Callable) -> Callable:
        return jax.grad(lambda x, kernel: jnp.sum(function(x, kernel) ** 2), argnums=(0, 1))

    found = {}
    for kind, forms in (("", (library, ours)), ("_gradient", tuple(map(gradient, (library, ours))))):
        times = interleaved({"library": ready(forms[0]), "ours": ready(forms[1])}, rounds)
        found |= {f"{name}{kind}": float(np.median(taken.own)) for name, taken in times.items()}
    return {
        **{"size": size, "channels": channels, "groups": groups, "batch": batch},
        **{"library_ms": found["library"], "ours_ms": found["ours"], "ratio": found["ours"] / found["library"]},
        **{"library_gradient_ms": found["library_gradient"], "gradient_ms": found["ours_gradient"]},
        "gradient_ratio": found["ours_gradient"] / found["library_gradient"],
    }


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every point, printing each as it comes; the JSON file grows with them."""
    flags = parse(arguments)
    for channels, groups in itertools.product(flags.channels, flags.groups):
        if channels % groups:
            raise UserError(f"--groups {groups} does not divide --channels {channels}")
    grid = (flags.size, flags.channels, flags.groups, flags.batch)
    contest.measure_rows(flags, COLUMNS, itertools.product(*grid), lambda at: measure(at, flags.rounds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
