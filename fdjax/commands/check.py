"""`fdjax check`: looks for damage in the files of a run or of a frozen network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fdjax.commands.arguments import parse_arguments
from fdjax.commands.output_files import check_json_target, write_report
from fdjax.errors import UserError


@dataclasses.dataclass(kw_only=True)
class CheckArguments:
    """Reads every file of a run, or of a frozen network, and reports which are sound. It changes nothing.

    The exit status is 1 if a file is damaged.
    """

    workdir: str | None = None
    """Directory of a run."""
    frozen: str | None = None
    """Directory of a frozen network, as fdjax freeze writes it, in place of a run."""
    json: str | None = None
    """File to write the findings to as JSON."""


def check_command(arguments: Sequence[str]) -> int:
    """Runs `fdjax check` and returns its exit status."""
    parsed = parse_arguments(CheckArguments, "fdjax check", arguments)
    check_json_target(parsed.json)
    if (parsed.workdir is None) == (parsed.frozen is None):
        raise UserError("give either --workdir DIR or --frozen DIR")
    from fdjax.checkpoints.check import check_frozen, check_run

    folder = Path(parsed.workdir or str(parsed.frozen))
    health = check_frozen(folder) if parsed.workdir is None else check_run(folder)
    for finding in health.findings:
        print(f"{'sound' if finding.sound else 'DAMAGED':8} {finding.name}: {finding.words}")
    print(health.next)
    write_report(parsed.json, {**dataclasses.asdict(health), "sound": health.sound})
    return 0 if health.sound else 1
