"""Tables of compilations for other machines, and of their compilers' estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fdjax.reports.tables import aligned

Row = Mapping[str, Any]


def rows_table(rows: Sequence[Row]) -> str:
    """Returns a table of rows of `fdjax.frozen.targets.compare_ahead` or `fdjax.experiments.ahead.compile_steps`."""
    table = [["target", "batch", "type", "what", "compiled in s", "memory MB", "cycles (est.)", "over dense", "MACs"]]
    for row in rows:
        cycles, ratio, macs = row["cycles"], row.get("cycle_ratio"), row.get("mac_ratio")
        table.append(
            [
                row["target"],
                str(row["batch"]),
                row["dtype"],
                row["form"],
                f"{row['compile_seconds']:.1f}",
                f"{row['memory_mb']:.1f}",
                "-" if cycles is None else f"{cycles:,}",
                "-" if ratio is None else f"{ratio:.2f}x",
                "-" if macs is None else f"{macs:.2f}x",
            ]
        )
    unknown = {row["target"] for row in rows if row["cycles"] is None}
    return "\n".join([aligned(table), *(f"the compiler for {target} gives no estimates" for target in sorted(unknown))])


def cycles_table(rows: Sequence[Row]) -> str:
    """Returns tables of the estimated cycles of each layer or run, dense and pruned, for each batch size.

    Args:
      rows: the rows of `fdjax.frozen.targets.compare_ahead`.

    Returns:
      The tables; empty if the compiler gives no estimates.
    """
    by_batch: dict[int, dict[str, Mapping[str, int]]] = {}
    for row in rows:
        by_batch.setdefault(row["batch"], {})[row["form"]] = row["cycles_by_run"]
    tables = []
    for batch, found in by_batch.items():
        dense, pruned = found["dense"], found["pruned"]
        names = [*dense, *(name for name in pruned if name not in dense)]
        table = [[f"batch {batch}", "dense", "pruned", "ratio"]]
        for name in names:
            before, after = dense.get(name), pruned.get(name)
            ratio = f"{after / before:.2f}x" if before and after is not None else "-"
            table.append([name, *("-" if cycles is None else f"{cycles:,}" for cycles in (before, after)), ratio])
        if names:
            tables.append(aligned(table))
    return "\n\n".join(tables)
