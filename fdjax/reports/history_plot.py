"""The plot of a run over its steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from fdjax.reports.figures import BLUE, GREEN, ORANGE, PURPLE, NoDataError, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def history_figure(
    records: Sequence[Mapping[str, Any]], phases: Sequence[Mapping[str, Any]], target: float | None = None
) -> Figure:
    """Draws accuracy, MAC ratio and loss by training step, with the phases as shaded spans.

    Args:
      records: the objects of `metrics.jsonl`: "step" (of the whole run) and any of "train_top1", "validation_top1",
        "test_top1" (0..1), "macs_ratio" (hard masks, after the gate) and "train_loss". Values that are missing, None or
        not finite are skipped, and so are axes without values. Lines break when "phase" changes; test accuracy is drawn
        as points.
      phases: "name", "start_step" and "end_step" of each phase, in order.
      target: the target MAC ratio, which is drawn as a line.

    Raises:
      NoDataError: if no record has a value to draw.
    """
    top1 = (
        ("train_top1", "training", ORANGE, 100.0),
        ("validation_top1", "validation", BLUE, 100.0),
        ("test_top1", "test", GREEN, 100.0),
    )
    panels = (
        ("Top-1 (%)", top1, 1.5),
        ("MACs / dense MACs (×)", (("macs_ratio", "hard masks,\nafter the gate", PURPLE, 1.0),), 1.0),
        ("Loss", (("train_loss", "training", ORANGE, 1.0),), 1.0),
    )
    drawn = []
    for label, keys, share in panels:
        series = [(*_series(records, key), name, color, scale) for key, name, color, scale in keys]
        series = [entry for entry in series if len(entry[0])]
        if series:
            drawn.append((label, series, share))
    if not drawn:
        raise NoDataError("records hold no accuracy, MAC ratio or loss to draw")

    figure = new_figure(9.0, 1.2 + 1.75 * sum(share for *_, share in drawn))
    stack = figure.subplots(
        len(drawn), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": [share for *_, share in drawn]}
    )[:, 0]
    for axes, (label, series, _) in zip(stack, drawn, strict=True):
        for steps, values, name, color, scale in series:
            few = np.isfinite(values).sum() <= 120
            points = name == "test"  # Measured rarely: a line would suggest values between that were not measured.
            axes.plot(
                steps,
                scale * values,
                color=color,
                linestyle="none" if points else "-",
                linewidth=1.4 if few else 0.9,
                marker="D" if points else "o" if few else None,
                markersize=5 if points else 2.8,
                zorder=3 if points else 2,
                label=name,
            )
        if label.startswith("MACs"):
            if target is not None:
                axes.axhline(target, color="black", linewidth=1.0, linestyle="--", label=f"target {target:g}")
            axes.set_ylim(
                0.0, 1.07 * max([1.0, target or 0.0, *(float(np.nanmax(values)) for _, values, *_ in series)])
            )
        axes.set_ylabel(label)
        axes.grid(color="0.85", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False)
    stack[-1].set_xlabel("Training step")
    steps = [float(step) for _, series, _ in drawn for entry in series for step in entry[0]]
    steps += [float(phase[key]) for phase in phases for key in ("start_step", "end_step")]
    low, high = min(steps), max(steps)
    margin = 0.01 * (high - low) or 0.5
    stack[0].set_xlim(low - margin, high + margin)
    _shade_phases(list(stack), phases, 72 * 0.78 * figure.get_figwidth())  # the legend has the other 22%
    figure.suptitle("Training history", fontsize=11)
    return figure


def _series(records: Iterable[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and values of the records with a finite number under `key`, with a NaN between phases."""
    steps, values, phase = [], [], None
    for record in records:
        value = record.get(key)
        if value is None or not math.isfinite(value):
            continue
        if steps and record.get("phase") != phase:
            steps.append(record["step"])
            values.append(math.nan)
        phase = record.get("phase")
        steps.append(record["step"])
        values.append(float(value))
    return np.array(steps), np.array(values)


def _shade_phases(stack: Sequence[Axes], phases: Sequence[Mapping[str, Any]], points: float) -> None:
    """Shades the phases on all axes, which are `points` wide, and names them above the first, in up to four rows."""
    top, size = stack[0], 8.5
    low, high = top.get_xlim()
    row_ends: list[float] = []
    index = 0
    for name, same in groupby(phases, key=lambda phase: phase["name"]):
        spans = list(same)
        for phase in spans:
            for axes in stack:
                axes.axvspan(
                    phase["start_step"], phase["end_step"], color="0.88" if index % 2 else "0.96", linewidth=0, zorder=0
                )
            index += 1
        middle = points * ((spans[0]["start_step"] + spans[-1]["end_step"]) / 2 - low) / (high - low)
        half = 0.32 * size * len(name)
        row = next((i for i, end in enumerate(row_ends) if end < middle - half), len(row_ends))
        if row == 4:
            continue  # There is no room for the name; the phase is shaded without it.
        row_ends[row : row + 1] = [middle + half + 5]
        top.annotate(
            name,
            ((spans[0]["start_step"] + spans[-1]["end_step"]) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4 + row * (size + 3)),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=size,
            zorder=10 - row,  # The line from a higher name passes behind the lower names.
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0}
            if row
            else None,
        )
