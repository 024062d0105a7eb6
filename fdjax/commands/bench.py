"""`fdjax bench`: times a frozen network."""

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
    """Times a frozen network beside its dense network, on XLA or on the engines that --engine names.

    Without --engine the dense network is also timed on ONNX Runtime, where that is installed.
    """

    frozen: str
    """Directory of a frozen network, as fdjax freeze writes it."""
    batch: tuple[int, ...] = (1, 8)
    """Batch sizes to time, in images."""
    threads: int | None = None
    """Number of processor cores to use (None: all that this process may use)."""
    engine: tuple[Literal["xla", "native", "onnxruntime", "openvino"], ...] = ()
    """Engines to time the dense and the pruned network on, in alternation (none: XLA, and ONNX Runtime for the dense
    network)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations; --engine takes float32 only."""
    rounds: int | None = None
    """Timed executions of each network after its warm-up (None: 7 to 200, fewer for slow networks)."""
    layers: bool = False
    """Also time each run, and each pointwise layer outside of runs, alone."""
    any_engine: bool = False
    """Also time a network that was made for another engine or batch size (freeze --choose time)."""
    json: str | None = None
    """File to write the results to as JSON."""
    picture: str | None = None
    """File to draw a plot of time against MACs into (.png, .pdf or .svg)."""


def bench_command(arguments: Sequence[str]) -> int:
    """Runs `fdjax bench` and returns its exit status."""
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
            raise UserError("--engine takes neither --layers nor --picture, and float32 is its only --dtype")
        found = bench_artifact_on(
            Path(parsed.frozen),
            parsed.engine,
            parsed.batch,
            threads,
            rounds=parsed.rounds,
            any_engine=parsed.any_engine,
        )
        print("\n".join([engines_table(found["rows"]), *found["remarks"]]))
        write_report(parsed.json, found)
        return 0
    found = bench_artifact(
        Path(parsed.frozen),
        parsed.batch,
        threads,
        parsed.dtype,
        rounds=parsed.rounds,
        layers=parsed.layers,
        any_engine=parsed.any_engine,
    )
    print("\n".join([bench_table(found), *found["remarks"]]))
    write_report(parsed.json, found)
    if parsed.picture is not None:
        plot_bench(found["rows"], Path(parsed.picture))
    return 0
