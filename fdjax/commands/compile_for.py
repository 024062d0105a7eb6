"""`fdjax compile`: compiles a frozen network, or a config's training steps, for an accelerator that is not there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fdjax.commands.arguments import parse_with_config
from fdjax.commands.output_files import check_json_target, write_report
from fdjax.config import Config
from fdjax.errors import UserError


@dataclasses.dataclass(kw_only=True)
class CompileArguments:
    """Compiles for an accelerator that this machine does not have, and reports the compiler's estimates."""

    target: str
    """Accelerator: tpu:v5e, tpu:v6e or cuda:h100."""
    frozen: str | None = None
    """Directory of a frozen network, as fdjax freeze writes it; its dense network is compiled beside it."""
    config: str | None = None
    """Config file whose training steps are compiled, in place of a frozen network; flags can set every field."""
    batch: tuple[int, ...] = (1, 64)
    """Batch sizes for a frozen network, in images; a config's training steps have data.batch_size."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of a frozen network's weights and activations; a config's training steps have model.precision."""
    json: str | None = None
    """File to write the results to as JSON."""
    settings: Annotated[Config, tyro.conf.arg(name="")]


def compile_command(arguments: Sequence[str]) -> int:
    """Runs `fdjax compile` and returns its exit status."""
    parsed = parse_with_config(CompileArguments, "fdjax compile", arguments)
    check_json_target(parsed.json)
    if (parsed.config is None) == (parsed.frozen is None):
        raise UserError("give either --frozen DIR or --config FILE")
    if parsed.frozen is not None and parsed.settings != Config():
        raise UserError("a frozen network has no settings: give none beside --frozen")
    if any(batch < 1 for batch in parsed.batch):
        raise UserError(f"--batch must be at least 1, got {' '.join(map(str, parsed.batch))}")
    from fdjax.experiments.ahead import compile_artifact, compile_steps
    from fdjax.frozen.targets import compute_on_the_cpu, find_target
    from fdjax.reports.ahead_tables import cycles_table, rows_table

    compute_on_the_cpu()
    find_target(parsed.target)
    if parsed.frozen is not None:
        rows = compile_artifact(Path(parsed.frozen), parsed.target, parsed.batch, parsed.dtype)
        print(rows_table(rows))
        print(cycles_table(rows))
    else:
        rows = compile_steps(parsed.settings, parsed.target)
        print(rows_table(rows))
    write_report(parsed.json, {"rows": rows})
    return 0
