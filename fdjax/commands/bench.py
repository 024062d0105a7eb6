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
    engine: tuple[Literal["xla", "native", "onnxruntime", "openvino"], ...] = ()
    """Engines, one or several, to time it on, dense and pruned, turn by turn (default: XLA, and ONNX Runtime dense)."""
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
    from fdjax.experiments.bench import bench_artifact, bench_artifact_on
    from fdjax.reports import bench_table, engines_table, plot_bench

    if parsed.engine:
        if parsed.layers or parsed.picture or parsed.dtype != "float32":
            raise UserError("--engine takes neither --layers nor --picture, and float32 only")
        found = bench_artifact_on(Path(parsed.frozen), parsed.engine, parsed.batch, threads, rounds=parsed.rounds)
        print("\n".join([engines_table(found["rows"]), *found["remarks"]]))
        write_report(parsed.json, found)
        return 0
    found = bench_artifact(
        Path(parsed.frozen), parsed.batch, threads, parsed.dtype, rounds=parsed.rounds, layers=parsed.layers
    )
    print("\n".join([bench_table(found), *found["remarks"]]))
    write_report(parsed.json, found)
    if parsed.picture is not None:
        plot_bench(found["rows"], Path(parsed.picture))
    return 0
