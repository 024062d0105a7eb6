"""Plots of a run: MACs per layer, kept counts per layer side, sorted FCMask values, and the training history.

Each plot comes as `*_figure(...)`, which returns a matplotlib `Figure`, and as `plot_*(..., path)`, which writes that
figure as a PNG. Figures are made without pyplot, so no backend is chosen and no global state is touched; matplotlib is
imported when the first figure is made.

`layers` is the list of the same name in `summary.json`: one mapping per layer of the network, in order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
COUNT_COLORS = "viridis"
# Okabe and Ito's palette, which stays distinct under the common colour-vision deficiencies.
BLUE, VERMILION, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"

FCMaskEntry = tuple[str, ArrayLike, ArrayLike | None, int]


class NoDataError(ValueError):
    """The numbers given hold nothing for this plot (no wrapped layer, no mask, no figure in any record)."""


def plot_layer_macs(layers: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Writes `layer_macs_figure(layers)` to `path` as a PNG and returns the path."""
    return save_figure(layer_macs_figure(layers), path)


def layer_macs_figure(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws the MACs of each wrapped pointwise layer relative to the same layer dense (the paper's Figure 8).

    Args:
      layers: the layers of `summary.json`; MACs are counts. Lines: `pruned / dense` (no transforms) and
        `total / dense` (cheapest exact form, transforms in it). The title gives both over all layers, wrapped or not.

    Raises:
      NoDataError: no layer is a wrapped pointwise layer.
    """
    wrapped = [layer for layer in layers if layer["kind"] == "pointwise" and layer["block"] and layer["dense"] > 0]
    if not wrapped:
        raise NoDataError("layers holds no wrapped pointwise layer, so there are no MACs to compare")
    x = np.arange(len(wrapped))
    dense = np.array([layer["dense"] for layer in wrapped], float)
    pruned = np.array([layer["pruned"] for layer in wrapped], float) / dense
    total = np.array([layer["total"] for layer in wrapped], float) / dense
    # The gate also frees layers that are pruned by whole channels from their transforms; those are not marked.
    released = np.array([bool(layer.get("released")) and layer["form"] == "dense" for layer in wrapped])

    width = float(np.clip(2.2 + 0.24 * len(wrapped), 7.2, 14.0))
    figure = new_figure(width, 4.9)
    axes = figure.add_subplot()
    axes.axhline(1.0, color="0.35", linewidth=1.1, linestyle="--", label="dense")
    axes.plot(x, pruned, color=VERMILION, marker="o", markersize=4, linewidth=1.5, label="pruned, without transforms")
    # The second line is smaller and drawn over the first: where a layer needs no transform, both stay visible.
    axes.plot(x, total, color=BLUE, marker="s", markersize=2.8, linewidth=1.2, label="with transforms (cheapest form)")
    if released.any():
        axes.plot(
            x[released],
            total[released],
            color="black",
            marker="D",
            markersize=8.5,
            markerfacecolor="none",
            linestyle="none",
            label="released by the gate",
        )
    axes.set_ylim(0.0, 1.07 * max(1.0, float(pruned.max()), float(total.max())))
    axes.set_xlim(-0.6, len(wrapped) - 0.4)
    axes.set_ylabel("MACs relative to the dense layer (×)")
    axes.set_xlabel("Wrapped pointwise layer")
    axes.grid(axis="y", color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    _name_ticks(axes, x, [layer["name"] for layer in wrapped], limit=int((width - 1.2) / 0.16))

    sums = {key: sum(layer[key] for layer in layers) for key in ("dense", "pruned", "total")}
    axes.set_title(
        "MACs of each pointwise layer\n"
        f"whole network: {sums['total'] / sums['dense']:.2f}x MACs with transforms "
        f"({_si(sums['total'])} of {_si(sums['dense'])}), {sums['pruned'] / sums['dense']:.2f}x without",
        fontsize=10.5,
    )
    figure.legend(loc="outside lower center", ncols=4 if width > 8 else 2, fontsize=9, frameon=False)
    return figure


def plot_kept_counts(layers: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Writes `kept_counts_figure(layers)` to `path` as a PNG and returns the path."""
    return save_figure(kept_counts_figure(layers), path)


def kept_counts_figure(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws, for each masked layer side, the share of channels by kept count (the paper's Figure 11).

    One stacked bar per side, count 0 at the foot. Colours stand for the kept count, or, when the layers' block sizes
    differ, for the kept count over the layer's number of coefficients.

    Args:
      layers: the layers of `summary.json`; `kept_counts[side]` holds N + 1 numbers of channels, or None.

    Raises:
      NoDataError: no side of any layer has a mask.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, Normalize

    names, places, sides = [], [], []
    place = 0.0
    for layer in layers:
        kept = layer.get("kept_counts") or {}
        before = len(sides)
        for side in ("input", "output"):
            counts = np.asarray(kept.get(side) or (), float)
            if counts.sum() > 0:
                names.append(f"{layer['name']} {side}")
                places.append(place)
                sides.append(counts)
                place += 1.0
        if len(sides) > before:
            place += 0.45  # so that the sides of one layer stand together
    if not sides:
        raise NoDataError("layers holds no kept counts, so there is no mask to show")

    most = sorted({len(counts) - 1 for counts in sides})
    uniform = len(most) == 1
    colors = colormaps[COUNT_COLORS]
    x, height, bottom, shade = [], [], [], []
    for place, counts in zip(places, sides, strict=True):
        share = 100.0 * counts / counts.sum()
        (some,) = np.nonzero(counts)
        x += [place] * len(some)
        height += share[some].tolist()
        bottom += (np.cumsum(share) - share)[some].tolist()
        shade += (some / (len(counts) - 1)).tolist()

    width = float(np.clip(2.6 + 0.17 * (places[-1] + 1), 6.4, 15.0))
    figure = new_figure(width, 5.4)
    axes = figure.add_subplot()
    axes.bar(x, height, width=0.9, bottom=bottom, color=colors(shade), edgecolor="white", linewidth=0.25)
    axes.set_ylim(0, 100)
    axes.set_xlim(-0.9, places[-1] + 0.9)
    axes.set_ylabel("Share of channels (%)")
    axes.set_xlabel("Layer side")
    _name_ticks(axes, np.array(places), names, limit=int((width - 1.8) / 0.12), rotation=90)
    if uniform:
        num_coefs = most[0]
        norm = BoundaryNorm(np.arange(num_coefs + 2) - 0.5, num_coefs + 1)
        bar = figure.colorbar(ScalarMappable(norm, colors.resampled(num_coefs + 1)), ax=axes, pad=0.01, aspect=30)
        bar.set_ticks(np.unique(np.linspace(0, num_coefs, min(num_coefs, 16) + 1).round().astype(int)).tolist())
        bar.minorticks_off()
        bar.set_label("Kept count (0 = channel removed)")
        title = f"Channels by kept count, {_block_words(num_coefs)}"
    else:
        bar = figure.colorbar(ScalarMappable(Normalize(0, 1), colors), ax=axes, pad=0.01, aspect=30)
        bar.set_label("Kept count / N (0 = channel removed)")
        title = "Channels by kept count, blocks of " + " and ".join(str(count) for count in most) + " coefficients"
    axes.set_title(title, fontsize=11)
    return figure


def progression_figure(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws how the kept counts of all masked layer sides together moved in training (the paper's Figure 11).

    A stacked bar for each evaluation, from the channels that are removed, at the foot, to those that keep all.

    Args:
      records: the objects of `metrics.jsonl`; those with "kept_counts": layer -> side -> N + 1 numbers of channels.

    Raises:
      NoDataError: fewer than two records hold kept counts.
    """
    steps, shares = [], []
    for record in records:
        sides = [np.asarray(side, float) for layer in (record.get("kept_counts") or {}).values()
                 for side in layer.values() if side]  # fmt: skip
        if not sides:
            continue
        sums = np.zeros(4)
        for counts in sides:
            sums += counts[0], counts[1:-1][:1].sum(), counts[1:-1][1:].sum(), counts[-1]
        steps.append(f"{record['step']:,}\n{record.get('phase', '')}")
        shares.append(100 * sums / sums.sum())
    if len(steps) < 2:
        raise NoDataError("fewer than two records hold kept counts, so there is no progression to show")
    figure = new_figure(float(np.clip(2.5 + 0.7 * len(steps), 6.0, 12.0)), 3.6)
    axes = figure.add_subplot()
    heights, names = np.array(shares).T, ("nothing (removed)", "the mean only", "some coefficients", "all")
    places, feet = np.arange(len(steps)), np.zeros(len(steps))
    for height, name, color in zip(heights, names, ("black", VERMILION, ORANGE, BLUE), strict=True):
        axes.bar(places, height, bottom=feet, color=color, edgecolor="white", linewidth=0.4, label=name)
        feet += height
    step = math.ceil(len(steps) / 12)
    axes.set_xticks(places[::step].tolist(), steps[::step], fontsize=7.5)
    axes.set_xlabel("Training step, phase")
    axes.set_ylabel("Share of channels (%)")
    axes.set_ylim(0, 100)
    figure.legend(loc="outside right center", title="keep", fontsize=8.5, frameon=False)
    return figure


def plot_fcmask(
    name: str, values: ArrayLike, num_coefs: int, path: str | Path, hard_values: ArrayLike | None = None
) -> Path:
    """Writes `fcmask_figure(name, values, num_coefs, hard_values)` to `path` as a PNG and returns the path."""
    return save_figure(fcmask_figure(name, values, num_coefs, hard_values), path)


def fcmask_figure(name: str, values: ArrayLike, num_coefs: int, hard_values: ArrayLike | None = None) -> Figure:
    """Draws the FCMask values of one layer side, sorted from high to low (the paper's Figure 3).

    The horizontal line at n / num_coefs is the foot of coefficient n's region: solid where n is the first coefficient
    of an anti-diagonal of the zigzag, dashed inside an anti-diagonal.

    Args:
      name: what the title calls the layer side.
      values: [C] FCMask values in [0, 1].
      num_coefs: coefficients in a block, a square number.
      hard_values: [C] the same channels' values after rounding, drawn in the order of `values`.

    Raises:
      NoDataError: there are no channels.
      ValueError: `num_coefs` is no square number, or the shapes do not fit.
    """
    from matplotlib.ticker import MaxNLocator

    soft = np.asarray(values, float)
    hard = None if hard_values is None else np.asarray(hard_values, float)
    block = math.isqrt(max(num_coefs, 0))
    if num_coefs < 1 or block * block != num_coefs:
        raise ValueError(f"num_coefs must be a square number such as 4, 9 or 16, not {num_coefs}")
    if soft.ndim != 1 or (hard is not None and hard.shape != soft.shape):
        shapes = f"{soft.shape}" if hard is None else f"{soft.shape} and {hard.shape}"
        raise ValueError(f"FCMask values of {name} must be one value per channel, [C]; their shapes are {shapes}")
    if not len(soft):
        raise NoDataError(f"{name} has no channels, so there are no FCMask values to show")
    order = np.lexsort((-soft if hard is None else -hard, -soft))  # channels of equal value: by their rounded value
    edges = np.arange(len(soft) + 1) + 0.5

    figure = new_figure(7.2, 5.0)
    axes = figure.add_subplot()
    starts = _diagonal_starts(block)
    weight = 1.0 if num_coefs <= 25 else 0.55
    for n in range(1, num_coefs):
        solid = n in starts
        axes.axhline(
            n / num_coefs,
            color="0.55" if solid else "0.72",
            linestyle="-" if solid else (0, (5, 4)),
            linewidth=weight if solid else 0.75 * weight,
            zorder=1,
            gid=f"coefficient {n}",
        )
    axes.stairs(soft[order], edges, baseline=None, color=BLUE, linewidth=2.4, label="learned (soft)")
    if hard is not None:
        axes.stairs(hard[order], edges, baseline=None, color=VERMILION, linewidth=1.1, label="rounded (hard)")
    axes.set_xlim(0.5, len(soft) + 0.5)
    axes.set_ylim(-0.012, 1.012)
    axes.set_xlabel("Channel rank (by FCMask value, high to low)")
    axes.set_ylabel("FCMask value")
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.set_title(f"FCMask values of {name}\n{len(soft)} channels, {_block_words(num_coefs)}", fontsize=11)

    right = axes.twinx()
    right.set_ylim(axes.get_ylim())
    at, labels = _coefficient_labels(block)
    right.set_yticks(at, labels, fontsize=8)
    right.tick_params(length=0)
    right.set_ylabel("Coefficient (zigzag order)")
    if hard is not None:
        figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def plot_history(
    records: Sequence[Mapping[str, Any]],
    phases: Sequence[Mapping[str, Any]],
    path: str | Path,
    target: float | None = None,
) -> Path:
    """Writes `history_figure(records, phases, target)` to `path` as a PNG and returns the path."""
    return save_figure(history_figure(records, phases, target), path)


def history_figure(
    records: Sequence[Mapping[str, Any]], phases: Sequence[Mapping[str, Any]], target: float | None = None
) -> Figure:
    """Draws accuracy, MAC ratio and loss by training step, with the phases as shaded spans.

    Args:
      records: the objects of `metrics.jsonl`: "step" (over the whole run) and any of "train_top1",
        "validation_top1", "test_top1" (0..1), "macs_ratio" (hard masks, after the gate) and "train_loss". Values that
        are missing, None or not finite are skipped, and so is an axis without values. Lines break where "phase"
        changes; test accuracy is drawn as points.
      phases: "name", "start_step" and "end_step" of each phase, in order.
      target: the MAC ratio asked for, drawn as a line.

    Raises:
      NoDataError: no record holds a value to draw.
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
            points = name == "test"  # often measured at the end of a phase only: a line would invent what lies between
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


def plot_run(
    layers: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
    phases: Sequence[Mapping[str, Any]],
    fcmasks: Sequence[FCMaskEntry],
    out_dir: str | Path,
    target: float | None = None,
) -> list[Path]:
    """Draws all plots of a run into `out_dir` and returns the paths of those drawn; what has no data is skipped.

    Args:
      layers: as for `layer_macs_figure`.
      records: as for `history_figure`; so are `phases` and `target`.
      phases: see `records`.
      fcmasks: (name, soft values [C], hard values [C] or None, num_coefs) of each layer side; the one whose soft
        values have the largest standard deviation is drawn.
      out_dir: the folder, made if need be; files `layer_macs.png`, `kept_counts.png`, `fcmask.png`, `history.png`.
      target: see `records`.
    """
    out_dir = Path(out_dir)

    def widest_fcmask() -> Figure:
        filled = [entry for entry in fcmasks if np.size(entry[1])]
        if not filled:
            raise NoDataError("there are no FCMask values to show")
        name, soft, hard, num_coefs = max(filled, key=lambda entry: float(np.std(np.asarray(entry[1], float))))
        return fcmask_figure(name, soft, num_coefs, hard)

    figures = {
        "layer_macs.png": lambda: layer_macs_figure(layers),
        "kept_counts.png": lambda: kept_counts_figure(layers),
        "fcmask.png": widest_fcmask,
        "history.png": lambda: history_figure(records, phases, target),
    }
    paths = []
    for name, make in figures.items():
        try:
            figure = make()
        except NoDataError:
            continue
        paths.append(save_figure(figure, out_dir / name))
    return paths


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, width and height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes the PNG, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI, bbox_inches="tight")
    return path


def _name_ticks(axes: Axes, places: np.ndarray, names: Sequence[str], limit: int, rotation: float = 60) -> None:
    """Puts names under the x axis, only every second (third, ...) when there are more than `limit`."""
    step = math.ceil(len(names) / max(limit, 1))
    axes.set_xticks(
        places[::step].tolist(),
        list(names[::step]),
        rotation=rotation,
        ha="center" if rotation == 90 else "right",
        va="top" if rotation == 90 else "center",
        rotation_mode="default" if rotation == 90 else "anchor",
        fontsize=7.5,
    )


def _diagonal_starts(block: int) -> tuple[int, ...]:
    """The zigzag numbers of the coefficients that start an anti-diagonal of a block: (0, 1, 3, 6, 8) for 3."""
    sizes = [*range(1, block + 1), *range(block - 1, 0, -1)]
    return tuple(sum(sizes[:i]) for i in range(len(sizes)))


def _coefficient_labels(block: int) -> tuple[list[float], list[str]]:
    """Where to name the coefficients on an axis from 0 to 1, and how: each, or by anti-diagonals when many."""
    num_coefs = block * block
    if num_coefs <= 25:
        ends = [(n, n) for n in range(num_coefs)]
    else:
        starts = [*_diagonal_starts(block), num_coefs]
        ends = [(first, after - 1) for first, after in pairwise(starts)]
    at, labels = [], []
    for first, last in ends:
        middle = (first + last + 1) / (2 * num_coefs)
        if not at or middle - at[-1] > 0.034:
            at.append(middle)
            labels.append(str(first) if first == last else f"{first}–{last}")
    return at, labels


def _series(records: Iterable[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that hold a finite number under `key`, with a NaN where the phase changes."""
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
    """Shades the phases on all axes, `points` wide, and names them above the first, in rows where names would clash."""
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
            continue  # no room; the span is shaded all the same
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
            zorder=10 - row,  # the line down from a higher name passes behind the lower ones
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0}
            if row
            else None,
        )


def _block_words(num_coefs: int) -> str:
    block = math.isqrt(num_coefs)
    return f"{block} × {block} blocks ({num_coefs} coefficients)"


def _si(count: float) -> str:
    """A count in short: 91.2M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:g}"
