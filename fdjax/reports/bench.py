"""Tables of benchmarks of frozen networks, and a plot of time against MACs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdjax.reports.figures import BLUE, GREEN, ORANGE, PURPLE, VERMILION, new_figure, save_figure
from fdjax.reports.tables import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
_COLORS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, "black")


def bench_table(found: Mapping[str, Any]) -> str:
    """Returns a table of the rows, and tables of the layers for each batch size that has them.

    Args:
      found: `rows`, and `layers` by batch size, as `fdjax bench --json` writes them.
    """
    columns = ("network", "masks", "target", "batch", "threads", "dtype")
    figures = ("dense_ms", "frozen_ms", "onnxruntime_dense_ms", "time_ratio", "mac_ratio", "paper_ratio")
    table = [[*columns, *figures]]
    for row in found["rows"]:
        texts = ["-" if row.get(name) is None else str(row[name]) for name in columns]
        table.append(texts + ["-" if row.get(name) is None else f"{row[name]:.3f}" for name in figures])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in table]
    for batch, layers in found.get("layers", {}).items():
        width = max(len(layer["name"]) for layer in layers)
        lines += ["", f"{f'batch {batch}':{width}}  dense ms  frozen ms  time ratio  MAC ratio  form"]
        for layer in layers:
            macs = layer["macs"] / layer["dense_macs"]
            lines.append(
                f"{layer['name']:{width}}  {layer['dense_ms']:8.3f}  {layer['frozen_ms']:9.3f}  "
                f"{layer['time_ratio']:10.3f}  {macs:9.3f}  {layer['form']}"
            )
    return "\n".join(lines)


def engines_table(rows: Sequence[Row]) -> str:
    """Returns a table of the rows of `fdjax.frozen.engine_bench.bench_engines`."""
    columns = ("batch", "form", "engine")
    figures = {"ms": 3, "mac_ratio": 3, "time_ratio": 3, "ratio_to_best_dense": 3, "gflops": 1}
    table = [[*columns, *figures]]
    for row in rows:
        numbers = ["-" if row.get(name) is None else f"{row[name]:.{digits}f}" for name, digits in figures.items()]
        table.append([*(str(row[name]) for name in columns), *numbers])
    errors = {f"{row['engine']} refuses the {row['form']} network: {row['error']}" for row in rows if "error" in row}
    return "\n".join([aligned(table), *sorted(errors)])


def bench_figure(rows: Sequence[Row]) -> Figure:
    """Draws time against MACs, both over the dense network's: a point for a row, a colour for an engine and batch."""
    figure = new_figure(5.5, 4.5)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, label="time = MACs")
    kinds = sorted({(row["batch"], row.get("engine") or "") for row in rows})
    for color, (batch, engine) in zip(itertools.cycle(_COLORS), kinds, strict=False):
        chosen = [row for row in rows if (row["batch"], row.get("engine") or "") == (batch, engine)]
        points = [row["mac_ratio"] for row in chosen], [row["time_ratio"] for row in chosen]
        axes.scatter(*points, color=color, label=", ".join(filter(None, [engine, f"batch {batch}"])))
        spans = [[value / row["dense_ms"] for value in row["frozen_ms_quartiles"]] for row in chosen]
        axes.vlines(points[0], [low for low, _ in spans], [high for _, high in spans], color=color)
    axes.set_xlabel("MACs / dense, transforms included")
    axes.set_ylabel("time / dense (median, quartiles)")
    axes.set_xlim(0, 1.05)
    axes.set_ylim(0, max(1.05, 1.05 * max(row["frozen_ms_quartiles"][1] / row["dense_ms"] for row in rows)))
    axes.legend(loc="upper left")
    return figure


def plot_bench(rows: Sequence[Row], path: str | Path) -> Path:
    """Writes `bench_figure(rows)` to `path` as a PNG and returns the path."""
    return save_figure(bench_figure(rows), path)
