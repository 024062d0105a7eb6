"""`fdjax results`: records finished runs in one folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fdjax.commands.arguments import parse_arguments


@dataclasses.dataclass(kw_only=True)
class ResultsArguments:
    """Records finished runs in one folder, with a table and a plot of all the runs that are recorded there."""

    workdir: tuple[str, ...]
    """Workdirs of finished runs; each is recorded under the name of its folder."""
    out: str
    """Directory to record them in: runs/NAME/ for each, table.md, table.csv, table.json, tradeoff.png, and
    tradeoff_time.png where times can be compared."""


def results_command(arguments: Sequence[str]) -> int:
    """Runs `fdjax results` and returns its exit status."""
    parsed = parse_arguments(ResultsArguments, "fdjax results", arguments)
    from fdjax.experiments.collect import collect

    done = collect(parsed.workdir, parsed.out)
    for word, names in (("new", done.added), ("replaced", done.replaced)):
        if names:
            print(f"{word}: {', '.join(names)}")
    print(f"{len(done.results)} runs in {', '.join(str(path) for path in done.written)}")
    return 0
