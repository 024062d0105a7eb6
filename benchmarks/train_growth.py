"""Measures how time and memory of training steps grow with batch, resolution, width and block (docs/benchmarks.md).

python benchmarks/train_growth.py --json FILE --picture FILE
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import _contest as contest
from _worker import Case

from fdjax.commands.output_files import write_report
from fdjax.errors import reports_user_errors
from fdjax.reports.figures import BLUE, GREEN, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Step -> label, colour, marker, line.
STEPS = {
    "weights": ("weights", BLUE, "o", "-"),
    "masks_tied": ("masks, tied", GREEN, "^", "--"),
    "masks": ("masks, both sides", VERMILION, "s", "-."),
}
UNITS = {"batch": "images a step", "resolution": "pixels a side", "width": "multiplier", "block": "pixels a side"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """The quantity that grows, its values, and the fixed values of the others."""

    name: str
    values: tuple[float, ...]
    batch: int
    resolution: int = 32
    width: float = 0.35
    block: int = 4

    def points(self) -> list[Point]:
        """Returns a point for each value."""
        base = Point(self.batch, self.resolution, self.width, self.block)
        return [dataclasses.replace(base, **{self.name: value}) for value in self.values]

    def title(self) -> str:
        """Returns the name, and the fixed values of the others."""
        rest = {
            "batch": f"batch {self.batch}",
            "resolution": f"{self.resolution} x {self.resolution} pixels",
            "width": f"width {self.width}",
            "block": f"block {self.block}",
        }
        del rest[self.name]
        return f"{self.name.capitalize()}\n{', '.join(rest.values())}"


@dataclasses.dataclass(frozen=True)
class Point:
    """The settings of a measurement of all steps."""

    batch: int
    resolution: int
    width: float
    block: int


AXES = (
    Axis(name="batch", values=(16, 32, 64, 128, 256), batch=64),
    # Four times the pixels need four times the memory, so the batch is smaller than for the other axes.
    Axis(name="resolution", values=(16, 32, 64), batch=32),
    Axis(name="width", values=(0.35, 0.5, 0.75, 1.0), batch=64),
    Axis(name="block", values=(2, 4, 8), batch=64),
)
QUICK_AXES = (
    Axis(name="batch", values=(4, 8), batch=8),
    Axis(name="resolution", values=(16, 32), batch=4),
    Axis(name="width", values=(0.35, 0.5), batch=8),
    Axis(name="block", values=(2, 4), batch=8),
)
QUICK_ROUNDS = 2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the flags."""
    parser = contest.Parser("How a training step's time and memory grow with batch, resolution, width and block.")
    parser.add_argument("--dtype", choices=contest.DTYPES, default="float32", help="type to compute in")
    parser.add_argument(
        "--allocator", choices=contest.ALLOCATORS, default="tuned", help="allocator settings: C library's or fdjax's"
    )
    parser.add_argument("--picture", type=contest.output_file, metavar="FILE", help="PNG file to draw the plot into")
    parser.add_argument("--quick", action="store_true", help=f"two small values per axis, {QUICK_ROUNDS} rounds")
    contest.add_shared_flags(parser)
    flags = parser.parse_args(arguments)
    if flags.quick:
        flags.rounds = QUICK_ROUNDS
    return flags


def measure(point: Point, flags: argparse.Namespace) -> list[contest.Row]:
    """Measures all steps at a point in alternation."""
    cases = [
        Case(
            engine="fdjax",
            network=contest.NETWORKS[0],
            **dataclasses.asdict(point),
            threads=flags.threads,
            dtype=flags.dtype,
            allocator=flags.allocator,
            step=step,
            seed=flags.seed,
        )
        for step in STEPS
    ]
    results = contest.run_contest(cases, flags.rounds)
    weights = next(results[case] for case in cases if case.step == "weights")
    return [contest.make_row(results[case], weights, None) for case in cases]


def draw(axes: Sequence[Axis], rows_of: dict[Point, list[contest.Row]], setting: str) -> Figure:
    """Draws a column of panels for every axis, time per step above memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), layout="constrained", facecolor="white")
    panels = figure.subplots(2, len(axes), sharex="col", sharey="row")
    for axis, (time_panel, memory_panel) in zip(axes, panels.T, strict=True):
        rows = [rows_of[point] for point in axis.points()]
        draw_lines(time_panel, axis, rows, "step_ms_median")
        for index, (_, color, _, _) in enumerate(STEPS.values()):
            low, high = ([row[index][field] for row in rows] for field in ("step_ms_min", "step_ms_max"))
            time_panel.vlines(axis.values, low, high, color=color, linewidth=1)
        draw_guide(time_panel, axis, rows)
        use_log_scale(time_panel)
        draw_lines(memory_panel, axis, rows, "peak_mb")
        time_panel.set_title(axis.title(), fontsize=10)
        memory_panel.set_xlabel(f"{axis.name} ({UNITS[axis.name]})")
    panels[0, 0].set_ylabel("time per step (ms)")
    panels[1, 0].set_ylabel("peak memory of the process (MB)")
    panels[1, 0].set_ylim(bottom=0)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Training step, {setting}; medians, with bars from fastest to slowest", fontsize=11)
    return figure


def draw_lines(panel: Axes, axis: Axis, rows: Sequence[Sequence[contest.Row]], field: str) -> None:
    """Draws a field of every step against the axis, on a logarithmic scale with its values as ticks."""
    from matplotlib.ticker import NullLocator

    for index, (label, color, marker, line) in enumerate(STEPS.values()):
        values = [row[index][field] for row in rows]
        panel.plot(axis.values, values, color=color, marker=marker, linestyle=line, label=label)
    panel.set_xscale("log")
    panel.set_xticks(axis.values, [f"{value:g}" for value in axis.values])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(color="0.9")


def use_log_scale(panel: Axes) -> None:
    """Makes the y axis logarithmic, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def draw_guide(panel: Axes, axis: Axis, rows: Sequence[Sequence[contest.Row]]) -> None:
    """Draws the time of the weight step if it were in proportion to the pixels of a batch."""
    power = {"batch": 1, "resolution": 2}.get(axis.name)
    if power is None:
        return
    first, start = axis.values[0], rows[0][0]["step_ms_median"]
    times = [start * (value / first) ** power for value in axis.values]
    panel.plot(axis.values, times, color="0.45", linewidth=1, linestyle=":", label="in proportion to a batch's pixels")


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every point once; prints its rows and rewrites the JSON file after them."""
    flags = parse(arguments)
    axes = QUICK_AXES if flags.quick else AXES
    report = contest.new_report(flags)
    report["settings"] |= {"network": contest.NETWORKS[0], "axes": [dataclasses.asdict(axis) for axis in axes]}
    rows_of: dict[Point, list[contest.Row]] = {}
    contest.print_heading()
    # Some points are on several axes.
    for point in dict.fromkeys(point for axis in axes for point in axis.points()):
        rows_of[point] = measure(point, flags)
        for row in rows_of[point]:
            contest.print_row(row)
        report["rows"] += rows_of[point]
        write_report(flags.json, report)
    if flags.picture:
        setting = f"{contest.NETWORKS[0]}, {flags.dtype}, {flags.allocator} allocator, threads: {flags.threads}"
        draw(axes, rows_of, setting).savefig(flags.picture, format="png", dpi=130)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
