"""`fdjax freeze`: compiles a checkpoint into a dense network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fdjax import runtime
from fdjax.commands.arguments import check_at_least_one, parse_arguments, restored_run
from fdjax.commands.output_files import check_json_target, write_report
from fdjax.errors import UserError


@dataclasses.dataclass(kw_only=True)
class FreezeArguments:
    """Compiles a checkpoint's network into a dense network that needs no training code."""

    checkpoint: str
    """Workdir of a run, its checkpoints folder, or the folder of one step."""
    out: str
    """Directory to write: new, empty, or a frozen network to replace."""
    which: str = "latest"
    """Checkpoint step: latest, best (on the validation share) or a number."""
    choose: Literal["macs", "time", "estimate"] = "macs"
    """Criterion that chooses among the exact forms of a layer: MACs, time measured on this machine, or the cycles that
    the compiler for --target estimates. estimate also removes masks that are estimated to cost time, which changes the
    accuracy."""
    target: str | None = None
    """Accelerator for --choose estimate, tpu:v5e or tpu:v6e; its compiler estimates the network in bfloat16."""
    engine: Literal["xla", "native", "onnxruntime", "openvino"] = "xla"
    """Engine that the network is to run on; times are measured on it."""
    engine_batch: int = 1
    """Batch size for measured times and for estimates, in images."""
    release: bool = False
    """Remove the masks of layers that take longer pruned than unmasked (with --choose time). This changes the
    accuracy."""
    time: bool = True
    """Time the network beside its dense network on the engine, and warn if it is slower."""
    data_path: str | None = None
    """Directory of the run's data set, if it has moved."""
    json: str | None = None
    """File to write the manifest to as JSON."""


def freeze_command(arguments: Sequence[str]) -> int:
    """Runs `fdjax freeze` and returns its exit status."""
    parsed = parse_arguments(FreezeArguments, "fdjax freeze", arguments)
    check_json_target(parsed.json)
    check_at_least_one(engine_batch=parsed.engine_batch)
    if parsed.release and parsed.choose != "time":
        raise UserError("--release compares times: give --choose time with it")
    if (parsed.choose == "estimate") != (parsed.target is not None):
        raise UserError("--choose estimate and --target TARGET need each other: give both, or neither")
    from fdjax.checkpoints.freeze import freeze_checkpoint
    from fdjax.frozen import Stopwatch
    from fdjax.frozen.engines import check_engines
    from fdjax.frozen.speed import slower_words
    from fdjax.frozen.targets import Estimate, compute_on_the_cpu, find_target
    from fdjax.reports import frozen_table

    check_engines([parsed.engine])
    if parsed.target is not None:
        compute_on_the_cpu()
        find_target(parsed.target)
    by_time, engine, batch = parsed.choose == "time", parsed.engine, parsed.engine_batch
    manifest = freeze_checkpoint(
        restored_run(parsed.checkpoint, parsed.which),
        Path(parsed.out),
        stopwatch=Stopwatch(batch, runtime.times_cache_dir(), engine) if by_time else None,
        estimate=Estimate(parsed.target, batch) if parsed.target is not None else None,
        release=parsed.release,
        data_path=parsed.data_path,
        compare_on=(engine, batch) if parsed.time and parsed.target is None else None,
    )
    print(frozen_table(manifest))
    slower = slower_words(manifest["time"]) if manifest["time"] else None
    if slower:
        print(slower)
    write_report(parsed.json, manifest)
    return 0
