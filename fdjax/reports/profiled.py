"""Pictures and tables of profiled pruning: accuracy against MACs by method, and sensitivity layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fdjax.reports.figures import BLUE, GREEN, ORANGE, PURPLE, VERMILION, NoDataError, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMES = {
    "channel": "channel",
    "coefficient": "coefficient",
    "channel_coefficient": "channel-coefficient (sparse)",
    "band": "channel-frequency band",
    "random_channel": "random channels",
}
_STYLES = dict(zip(_NAMES, zip((BLUE, PURPLE, GREEN, ORANGE, "0.5"), "oD^sv", strict=True), strict=True))
_RUN_MARKERS = "PX*vhd<>"
_AXES = (
    ("bare_ratio", "MACs / dense MACs, without transforms (×)"),
    ("paper_ratio", "MACs / dense MACs, with transforms,\nthe paper's count (×)"),
)


def profile_table(report: Mapping[str, Any]) -> str:
    """Returns a table with a row for each point: method, target, MAC ratios by three conventions, top-1."""
    width = max([len("method"), *(len(method) for method in report["methods"])])
    of = "agree" if report["measure"] == "agreement" else "top-1"
    heading = f"{'method':{width}} {'asked':>6} {'bare':>6} {'paper':>6} {'total':>6} {of:>7}"
    rows = [heading, "-" * len(heading)]
    for method, points in report["methods"].items():
        for point in points:
            macs = point["macs"]
            total = f"{macs['ratio']:6.3f}" if macs["ratio"] is not None else f"{'-':>6}"
            rows.append(
                f"{method:{width}} {point['target']:6.2f} {macs['bare_ratio']:6.3f} {macs['paper_ratio']:6.3f} {total} "
                f"{100 * point['top1']:6.2f}%"
            )
    for point in report["resolutions"]:
        ratios = f"{point['ratio']:6.3f} " * 3
        rows.append(f"{'input':{width - 4}} {point['size']:3d} {'':>6} {ratios}{100 * point['top1']:6.2f}%")
    return "\n".join(rows)


def plot_profile(report: Mapping[str, Any], path: str | Path) -> Path:
    """Writes `profile_figure(report)` to `path` as a PNG and returns the path."""
    return save_figure(profile_figure(report), path)


def profile_figure(report: Mapping[str, Any]) -> Figure:
    """Draws top-1 against MACs before refinement, a curve per method (the paper's Figures 5 and 6).

    The two panels are of MACs without and with transforms; smaller inputs are one more curve. Runs are points: learned
    masks are filled before refinement and hollow after it, joined by a line; other networks are hollow.

    Args:
      report: the report of `fdjax profile`.

    Raises:
      NoDataError: if it has no curve.
    """
    methods = {name: points for name, points in report["methods"].items() if points}
    if not methods:
        raise NoDataError("the report has no curve to draw")
    figure = new_figure(10.2, 5.4)
    panels = figure.subplots(1, 2, sharey=True)
    kinds = sorted({run["kind"] for run in report["runs"]})
    for axes, (key, words) in zip(panels, _AXES, strict=True):
        axes.axhline(100 * report["dense"]["top1"], color="0.35", linestyle="--", linewidth=1.2, label="dense")
        for method, points in methods.items():
            places = sorted((point["macs"][key], 100 * point["top1"]) for point in points)
            (color, marker), label = _STYLES[method], _NAMES[method]
            axes.plot(
                *zip(*places, strict=True), color=color, marker=marker, markersize=5.5, linewidth=1.5, label=label
            )
        if report["resolutions"]:
            # It has no transforms, so its points are the same in both panels.
            places = sorted((point["ratio"], 100 * point["top1"]) for point in report["resolutions"])
            axes.plot(*zip(*places, strict=True), color="black", marker="*", markersize=7.5, linewidth=1.5,
                      label="smaller input")  # fmt: skip
        for run in report["runs"]:
            _draw_run(axes, run, key, _RUN_MARKERS[kinds.index(run["kind"]) % len(_RUN_MARKERS)])
        axes.set_xlabel(words)
        axes.grid(color="0.9", linewidth=0.7)
        axes.set_axisbelow(True)
    agreement = report["measure"] == "agreement"
    panels[0].set_ylabel("Same class as the unpruned network (%)" if agreement else "Test top-1 (%)")
    handles = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=2 if kinds else 3, fontsize=9, frameon=False
    )
    figure.suptitle(f"Profiled pruning before refinement\n{report['words']}", fontsize=11)
    return figure


def _draw_run(axes: Any, run: Mapping[str, Any], key: str, marker: str) -> None:
    place, style = run[key], {"color": VERMILION, "marker": marker, "markersize": 8, "linestyle": "none"}
    if run["rounded_top1"] is not None:
        axes.plot(
            [place, place], [100 * run["rounded_top1"], 100 * run["top1"]], color=VERMILION, linewidth=0.8, alpha=0.5
        )
        axes.plot(place, 100 * run["rounded_top1"], **style, label=f"{run['kind']}; before refinement")
    after = "; refined" if run["rounded_top1"] is not None else ""
    axes.plot(place, 100 * run["top1"], **style, markerfacecolor="none", label=f"{run['kind']}{after}")


def plot_sensitivity(rows: Sequence[Mapping[str, Any]], words: str, path: str | Path) -> Path:
    """Writes `sensitivity_figure(rows, words)` to `path` as a PNG and returns the path."""
    return save_figure(sensitivity_figure(rows, words), path)


def sensitivity_figure(rows: Sequence[Mapping[str, Any]], words: str) -> Figure:
    """Draws the loss of top-1 in points when one layer alone is pruned, by layer and kept count.

    Args:
      rows: `sensitivity` of the report of `fdjax profile`.
      words: a line under the title: network, data, images.

    Raises:
      NoDataError: if there are no rows.
    """
    if not rows:
        raise NoDataError("there is no layer whose sensitivity was measured")
    counts = sorted({int(count) for row in rows for count in row["top1"] if int(count) < row["num_coefs"]})
    lost = np.full((len(rows), len(counts)), np.nan)
    for at, row in enumerate(rows):
        whole = row["top1"][str(row["num_coefs"])]
        for column, count in enumerate(counts):
            if count < row["num_coefs"] and str(count) in row["top1"]:
                lost[at, column] = 100 * (whole - row["top1"][str(count)])
    figure = new_figure(max(4.8, 3.2 + 0.75 * len(counts)), 1.6 + 0.3 * len(rows))
    axes = figure.add_subplot()
    highest = max(float(np.nanmax(lost)), 1.0)
    image = axes.imshow(lost, cmap="viridis_r", vmin=0, vmax=highest, aspect="auto")
    for at, column in np.argwhere(np.isfinite(lost)):
        dark = lost[at, column] > 0.5 * highest
        axes.text(column, at, f"{lost[at, column]:.1f}", ha="center", va="center", fontsize=8,
                  color="white" if dark else "black")  # fmt: skip
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set_yticks(range(len(rows)), [f"{row['name']} ({'x'.join(map(str, row['map']))})" for row in rows], fontsize=8)
    axes.set_xlabel("Coefficients that every channel of the layer keeps")
    figure.colorbar(image, ax=axes, label="Top-1 lost (points)")
    figure.suptitle(f"Sensitivity to frequency, one layer at a time\n{words}", fontsize=10)
    return figure
