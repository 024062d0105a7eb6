"""`fdjax bench`: the time of a frozen network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fdjax import runtime
from fdjax.commands.arguments import parse_arguments
from fdjax.commands.output_files import check_file_target, check_json_target, write_report
from fdjax.errors import UserError


@dataclasses.dataclass(kw_only=True)
class BenchArguments:
    """Times a frozen network beside the dense one in its best form, and beside ONNX Runtime's where it is installed."""

    frozen: str
    """A frozen network, as fdjax freeze writes it."""
    batch: tuple[int, ...] = (1, 8)
    """Images at once, one or several."""
    threads: int | None = None
    """How many processor cores to use (default: all that this process may use)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and maps."""
    rounds: int | None = None
    """How often each network runs after its warm-up (default: 7 to 200, by how long it takes)."""
    layers: bool = False
    """Time each block alone, too."""
    json: str | None = None
    """Write the rows to this file too."""
    picture: str | None = None
    """Draw time beside MACs into this file."""


def bench_command(arguments: Sequence[str]) -> int:
    """`fdjax bench`."""
    parsed = parse_arguments(BenchArguments, "fdjax bench", arguments)
    check_json_target(parsed.json)
    check_file_target("--picture", parsed.picture, (".png", ".pdf", ".svg"))
    for flag, numbers in (("batch", parsed.batch), ("threads", [parsed.threads]), ("rounds", [parsed.rounds])):
        if any(number is not None and number < 1 for number in numbers):
            raise UserError(f"--{flag} must be at least 1, got {' '.join(map(str, numbers))}")
    threads = runtime.limit_threads(parsed.threads)
    from fdjax.experiments.bench import bench_artifact
    from fdjax.reports import bench_table, plot_bench

    found = bench_artifact(
        Path(parsed.frozen), parsed.batch, threads, parsed.dtype, rounds=parsed.rounds, layers=parsed.layers
    )
    print(bench_table(found))
    write_report(parsed.json, found)
    if parsed.picture is not None:
        plot_bench(found["rows"], Path(parsed.picture))
    return 0
