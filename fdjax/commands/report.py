"""`fdjax report`: writes one HTML page about finished runs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from fdjax.commands.arguments import parse_arguments
from fdjax.commands.output_files import check_file_target
from fdjax.errors import UserError


@dataclasses.dataclass(kw_only=True)
class ReportArguments:
    """Writes one HTML page about a finished run, or about several side by side; the page works without an internet
    connection."""

    workdir: tuple[str, ...]
    """Workdirs of runs; the page lists those that have no result."""
    out: str
    """HTML file to write; an existing file is replaced."""
    bench: tuple[str, ...] = ()
    """Files that fdjax bench --json wrote; each is shown with the run whose frozen network it timed."""


def report_command(arguments: Sequence[str]) -> int:
    """Runs `fdjax report` and returns its exit status."""
    parsed = parse_arguments(ReportArguments, "fdjax report", arguments)
    check_file_target("--out", parsed.out, (".html",))
    if not parsed.workdir:
        raise UserError("--workdir is empty; give the workdirs of one or more finished runs")
    from fdjax.experiments.report import write_report_page

    out = Path(parsed.out)
    done = write_report_page(parsed.workdir, out, parsed.bench)
    for name, why in done.left_out.items():
        print(f"left out: {name}: {why}", file=sys.stderr)
    print(f"{out}: {', '.join(done.names)}; {out.stat().st_size / 1e6:.1f} MB")
    return 0
