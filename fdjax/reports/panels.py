"""Plots of top-1 against MACs or time: panels side by side, one legend below them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fdjax.reports.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The most panels in a row.
_MOST_COLUMNS = 3


def top1_panels(
    names: Sequence[str], label: str, legend_height: float, against: str = "MACs"
) -> tuple[Figure, list[Axes]]:
    """Makes a figure with a panel for each name, in rows of up to three.

    Args:
      names: titles of the panels.
      label: label of the x axes.
      legend_height: room for the legend below the panels, in inches.
      against: a word for what top-1 is drawn against.
    """
    columns = min(len(names), _MOST_COLUMNS)
    rows = math.ceil(len(names) / columns)
    figure = new_figure(7.6 if columns == 1 else 4.9 * columns, legend_height + 4.2 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel("Test top-1 (%)")
    for axes, name in zip(panels, names, strict=False):
        axes.set_xlabel(label)
        title = name if len(names) > 1 else f"Top-1 against {against}\n{name}"
        axes.set_title(title, fontsize=9 if len(names) > 1 else 11)
        axes.grid(color="0.9", linewidth=0.7)
        axes.set_axisbelow(True)
    return figure, panels[: len(names)]


def labelled(figure: Figure) -> dict[str, Artist]:
    """Returns the entries of a figure's legend: each label -> the first artist with that label."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    return handles


def legend_below(figure: Figure, handles: Mapping[str, Artist], columns: int, font_size: float) -> None:
    """Draws a legend below the panels, in the order of `handles`."""
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=columns,
        fontsize=font_size,
        frameon=False,
    )
