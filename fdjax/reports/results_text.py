"""Tables of finished runs as Markdown and CSV, with the mean and range of runs that differ only by their seed."""

from __future__ import annotations

import csv
import io
import json
import types
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

from fdjax.reports.results import Result
from fdjax.reports.seeds import run_settings, seed_groups

# Settings that have their own columns, or do not change any figure.
_SHOWN = {
    "model.name", "model.width", "data.name", "data.path", "data.train_limit", "learn.sides", "learn.tied",
    "learn.levels", "learn.penalty", "learn.block", "learn.block_by_map", "learn.block_by_layer", "learn.target_macs",
    "learn.target_convention", "learn.target_time", "distill.weight", "model.octave", "model.octave_maps",
}  # fmt: skip
_NONE = "–"

Cell = Callable[[Result], str | None]
Figure = Callable[[Result], float | None]


def _target_words(result: Result) -> str | None:
    if not result.has_masks:
        return None
    if result.target_time is not None:
        return f"{result.target_time:g}x of the time"
    words = f"lambda {result.lambda_:g}" if result.target_macs is None else f"{result.target_macs:g}x"
    return f"{words} by the paper's count" if result.target_convention == "paper" else words


def _hardware_words(result: Result) -> str | None:
    on_cpu = result.device is None or result.device.lower() == "cpu"
    return result.processor or result.device if on_cpu else result.device


def _other_settings(results: Sequence[Result]) -> dict[str, str | None]:
    """Returns for each run the settings that differ between runs and have no column, such as "refine.epochs 20"."""
    settings = {result.name: run_settings(result) for result in results}
    for result in results:
        if result.lambda_ is not None:  # A fixed lambda is shown in the column of the target.
            settings[result.name].pop("learn.lambda_", None)
    values: dict[str, set[str]] = {}
    for of_run in settings.values():
        for name, value in of_run.items():
            values.setdefault(name, set()).add(json.dumps(value))
    differ = {name for name, found in values.items() if len(found) > 1} - _SHOWN - {"phases", "data"}
    words = {}
    for result in results:
        mine = settings[result.name]
        told = [f"{name.rstrip('_')} {_setting_words(mine[name])}" for name in sorted(differ & mine.keys())]
        words[result.name] = ", ".join(told) or None
    return words


def _setting_words(value: Any) -> str:
    return str(value) if isinstance(value, str) else json.dumps(value).replace('"', "")


def csv_text(results: Sequence[Result]) -> str:
    """Returns the rows as CSV with unrounded figures; None is an empty cell."""
    text = io.StringIO()
    rows = [result.columns() for group in seed_groups(results) for result in group]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class _Form(NamedTuple):
    """The format of a figure: it is multiplied by `factor`, formatted by `spec`, and followed by `unit`."""

    factor: float
    spec: str
    unit: str

    def number(self, value: float) -> str:
        """Formats a figure without the unit; zero has no minus sign."""
        text = format(self.factor * value, self.spec)
        return format(0.0, self.spec) if float(text) == 0 else text


_PERCENT, _POINTS = _Form(100, ".2f", "%"), _Form(1, "+.2f", "")
_TIMES, _MINUTES = _Form(1, ".3f", "x"), _Form(1 / 60, ".1f", " min")
# Heading, value and format of each column with figures.
_FIGURES: tuple[tuple[str, Figure, _Form], ...] = (
    ("dense top-1", lambda r: r.dense_top1, _PERCENT),
    ("soft masks", lambda r: r.soft_top1, _PERCENT),
    ("rounded", lambda r: r.rounded_top1, _PERCENT),
    ("pruned top-1", lambda r: r.pruned_top1, _PERCENT),
    ("loss", lambda r: r.loss_points, _POINTS),
    ("MACs", lambda r: r.macs_ratio, _TIMES),
    ("time asked for", lambda r: r.target_time, _TIMES),
    ("frozen time", lambda r: r.time_ratio, _TIMES),
    ("by the paper's count", lambda r: r.paper_ratio, _TIMES),
    ("without transforms", lambda r: r.bare_ratio, _TIMES),
    ("time", lambda r: r.seconds, _MINUTES),
)
_KEPT = "removed / mean / partial / whole"
# Dense runs do not have these settings; that alone does not make them differ between rows.
_OF_MASKS = ("block", "masks", "target", "timed on")
_LEGEND = (
    "Dense: at the end of pretraining, or of a run that is not pruned. Soft masks, rounded: just before and just after "
    "masks are rounded. Pruned: at the end. Loss: dense less pruned, in points. MACs: of hard masks after the gate, "
    f"transforms included, over those of the dense network. Frozen time: that of the frozen network when the run "
    "ended, over the dense one's; time asked for: what it was to be. Time: of the run. "
    f"{_KEPT.capitalize()}: shares of the channels of all masked layer sides by what they keep: nothing, the mean, "
    "more, all. Means stand with the smallest and the largest value."
)


class ResultsTable(NamedTuple):
    """A table of runs in words, for Markdown and HTML.

    Attributes:
      same: the settings that are the same in all rows, in words.
      headings: headings of the columns: the run's name, settings that differ between rows, figures.
      num_settings: number of columns that are settings.
      rows: cells, as many as headings; the last row of a group of runs that differ only by their seed is its mean.
      means: whether each row is a mean.
      legend: explanation of the columns.
    """

    same: str
    headings: list[str]
    num_settings: int
    rows: list[list[str]]
    means: list[bool]
    legend: str


def results_table(results: Sequence[Result]) -> ResultsTable:
    """Makes the table for readers, with rounded figures; settings that are the same in all rows have no column.

    Args:
      results: the runs; their names differ.
    """
    groups = seed_groups(results)
    other = _other_settings(results)
    settings: tuple[tuple[str, Cell], ...] = (
        ("network", lambda r: r.network_words),
        ("dense MACs", lambda r: f"{r.dense_macs / 1e6:,.2f} M"),
        ("data", lambda r: r.data_words),
        ("phases", lambda r: r.phases),
        ("block", lambda r: r.block),
        ("masks", lambda r: r.masks),
        ("filters", lambda r: r.filters and f"removed by {r.filters}"),
        ("target", _target_words),
        ("timed on", lambda r: r.timed_on),
        ("other settings", lambda r: other[r.name]),
        ("test images", lambda r: f"{r.test_images:,}"),
        ("hardware", _hardware_words),
        ("jax", lambda r: r.jax),
        ("commit", lambda r: r.commit),
        ("seed", lambda r: str(r.seed)),
    )
    same, shown = [], []
    for heading, cell in settings:
        found = {cell(result) for result in results if result.has_masks or heading not in _OF_MASKS}
        if len(found) > 1:
            shown.append((heading, cell))
        elif found - {None}:
            same.append(f"{heading} {found.pop()}")
    figures = [entry for entry in _FIGURES if any(entry[1](result) is not None for result in results)]
    headings = [heading for heading, *_ in figures]
    kept = any(result.whole is not None for result in results)
    if kept:
        headings.insert(-1, _KEPT)

    def row(name: str, group: Sequence[Result]) -> list[str]:
        cells = [name]
        for _, cell in shown:
            found = {cell(result) for result in group}
            # The mean of a group has no value for a setting that differs within it.
            cells.append((found.pop() or _NONE) if len(found) == 1 else "")
        cells += [_spread([figure(result) for result in group], form) for _, figure, form in figures]
        if kept:
            cells.insert(-1, _kept_words(group))
        return cells

    rows, means = [], []
    for group in groups:
        rows += [row(result.name, [result]) for result in group]
        means += [False] * len(group)
        if len({result.seed for result in group}) > 1:
            rows.append(row(f"mean of {len(group)}", group))
            means.append(True)
    everywhere = "Same in all rows: " if len(results) > 1 else "Settings: "
    return ResultsTable(
        same=f"{everywhere}{'; '.join(same)}.",
        headings=["run", *(heading for heading, _ in shown), *headings],
        num_settings=len(shown),
        rows=rows,
        means=means,
        legend=_LEGEND,
    )


def markdown(results: Sequence[Result], pictures: Mapping[str, str] = types.MappingProxyType({})) -> str:
    """Returns `results_table` as Markdown.

    Args:
      results: the runs; their names differ.
      pictures: pictures below the table: alternative text -> file name.
    """
    table = results_table(results)
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table.rows]
    for row, is_mean in zip(rows, table.means, strict=True):
        row[0] = f"**{row[0]}**" if is_mean else row[0]
    written = [table.headings, ["---"] * len(table.headings), *rows]
    lines = [table.same, "", *(f"| {' | '.join(cells)} |" for cells in written), "", table.legend]
    for shown, file in pictures.items():
        lines += ["", f"![{shown}]({file})"]
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float | None], form: _Form) -> str:
    """Formats the mean, with the smallest and the largest value if they differ; a dash if a value is missing."""
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return _NONE
    low, high = form.number(min(there)), form.number(max(there))
    return f"{form.number(mean(there))}{form.unit}" + (f" ({low}..{high})" if low != high else "")


def _kept_words(group: Sequence[Result]) -> str:
    """Formats the shares of channels by kept count in percent, as means over the runs."""
    if any(result.whole is None for result in group):
        return _NONE
    shares = [mean(getattr(result, key) for result in group) for key in ("removed", "only_mean", "partial", "whole")]
    return " / ".join(f"{100 * share:.0f}" for share in shares) + "%"
