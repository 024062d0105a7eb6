"""Tables of what compilers for other machines made and expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fdjax.reports.tables import aligned

Row = Mapping[str, Any]


def rows_table(rows: Sequence[Row]) -> str:
    """A line a row of `fdjax.frozen.targets.compare_ahead` or `fdjax.experiments.ahead.compile_steps`."""
    table = [["target", "batch", "type", "what", "compiled in s", "memory MB", "expected cycles", "over dense", "MACs"]]
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
    return "\n".join([aligned(table), *(f"the compiler for {target} expects no times" for target in sorted(unknown))])


def cycles_table(rows: Sequence[Row]) -> str:
    """A line a layer or run: the cycles expected of it in the dense and in the pruned network, by batch size.

    Args:
      rows: of `fdjax.frozen.targets.compare_ahead`; empty text where no cycles are expected.
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
