"""Plots of the layers of a network: their MACs, and the kept counts of their sides.

`layers` is the list of this name in `summary.json`, with one mapping per layer of the network, in order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fdjax.reports.figures import (
    BLUE,
    COUNT_COLORS,
    ORANGE,
    VERMILION,
    NoDataError,
    block_words,
    name_ticks,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def layer_macs_figure(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws the MACs of each wrapped pointwise layer relative to the same layer dense (the paper's Figure 8).

    The lines are `pruned / dense` (without transforms) and `total / dense` (cheapest exact form, with transforms). The
    title gives both for the whole network.

    Args:
      layers: the layers of `summary.json`.

    Raises:
      NoDataError: if no layer is a wrapped pointwise layer.
    """
    wrapped = [layer for layer in layers if layer["kind"] == "pointwise" and layer["block"] and layer["dense"] > 0]
    if not wrapped:
        raise NoDataError("layers holds no wrapped pointwise layer, so there are no MACs to compare")
    x = np.arange(len(wrapped))
    dense = np.array([layer["dense"] for layer in wrapped], float)
    pruned = np.array([layer["pruned"] for layer in wrapped], float) / dense
    total = np.array([layer["total"] for layer in wrapped], float) / dense
    # The gate also removes the transforms of layers that are pruned by whole channels; those are not marked.
    released = np.array([bool(layer.get("released")) and layer["form"] == "dense" for layer in wrapped])

    width = float(np.clip(2.2 + 0.24 * len(wrapped), 7.2, 14.0))
    figure = new_figure(width, 4.9)
    axes = figure.add_subplot()
    axes.axhline(1.0, color="0.35", linewidth=1.1, linestyle="--", label="dense")
    axes.plot(x, pruned, color=VERMILION, marker="o", markersize=4, linewidth=1.5, label="pruned, without transforms")
    # The second line is thinner and on top, so that both are visible if a layer needs no transform.
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
    name_ticks(axes, x, [layer["name"] for layer in wrapped], limit=int((width - 1.2) / 0.16))

    sums = {key: sum(layer[key] for layer in layers) for key in ("dense", "pruned", "total")}
    axes.set_title(
        "MACs of each pointwise layer\n"
        f"whole network: {sums['total'] / sums['dense']:.2f}x MACs with transforms "
        f"({_si(sums['total'])} of {_si(sums['dense'])}), {sums['pruned'] / sums['dense']:.2f}x without",
        fontsize=10.5,
    )
    figure.legend(loc="outside lower center", ncols=4 if width > 8 else 2, fontsize=9, frameon=False)
    return figure


def kept_counts_figure(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws, for each masked layer side, the share of channels by kept count (the paper's Figure 11).

    There is a stacked bar for each side, with count 0 at the bottom. Colours stand for the kept count or, if block
    sizes differ, for the kept count over N.

    Args:
      layers: the layers of `summary.json`; `kept_counts[side]` has N + 1 numbers of channels, or is None.

    Raises:
      NoDataError: if no side of any layer has a mask.
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
            place += 0.45  # The gap keeps the sides of one layer together.
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
    name_ticks(axes, np.array(places), names, limit=int((width - 1.8) / 0.12), rotation=90)
    if uniform:
        num_coefs = most[0]
        norm = BoundaryNorm(np.arange(num_coefs + 2) - 0.5, num_coefs + 1)
        bar = figure.colorbar(ScalarMappable(norm, colors.resampled(num_coefs + 1)), ax=axes, pad=0.01, aspect=30)
        bar.set_ticks(np.unique(np.linspace(0, num_coefs, min(num_coefs, 16) + 1).round().astype(int)).tolist())
        bar.minorticks_off()
        bar.set_label("Kept count (0 = channel removed)")
        title = f"Channels by kept count, {block_words(num_coefs)}"
    else:
        bar = figure.colorbar(ScalarMappable(Normalize(0, 1), colors), ax=axes, pad=0.01, aspect=30)
        bar.set_label("Kept count / N (0 = channel removed)")
        title = "Channels by kept count, blocks of " + " and ".join(str(count) for count in most) + " coefficients"
    axes.set_title(title, fontsize=11)
    return figure


def progression_figure(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws how the kept counts of all masked layer sides changed in training (the paper's Figure 11).

    There is a stacked bar for each evaluation, from removed channels at the bottom to those that keep everything.

    Args:
      records: the objects of `metrics.jsonl`; "kept_counts" is layer -> side -> N + 1 numbers of channels.

    Raises:
      NoDataError: if fewer than two records have kept counts.
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


def _si(count: float) -> str:
    """Formats a count, such as 91.2M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:g}"
