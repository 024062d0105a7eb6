"""The plot of several runs in absolute MACs: which networks no other one beats, and published figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fdjax.reports.figures import NoDataError, save_figure
from fdjax.reports.panels import labelled, legend_below, top1_panels
from fdjax.reports.references import references_for
from fdjax.reports.results import Result
from fdjax.reports.tradeoff import kinds_of_masks, mask_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]
_REFERENCE_MARKERS = "<>12348p*hHxd|"


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Returns the points (MACs, top-1) that no other point beats in both, by ascending MACs."""
    front: list[Point] = []
    for macs, top1 in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or top1 > front[-1][1]:
            front.append((macs, top1))
    return front


def plot_pareto(results: Sequence[Result], path: str | Path) -> Path:
    """Writes `pareto_figure(results)` to `path` as a PNG and returns the path."""
    return save_figure(pareto_figure(results), path)


def pareto_figure(results: Sequence[Result]) -> Figure:
    """Draws top-1 against MACs (millions, with transforms) of dense and pruned networks of all sizes.

    There is a panel for each data set. Each run is a point, and so is its dense network; a stair joins those that no
    other one beats. Published figures of `references_for` are grey.

    Raises:
      NoDataError: if there is no run.
    """
    if not results:
        raise NoDataError("there is no run, so there is nothing to draw")
    sets = sorted({result.data_words for result in results})
    pruned = [result for result in results if result.pruned_top1 is not None]
    kinds = kinds_of_masks(pruned) if pruned else {}
    figure, panels = top1_panels(sets, "MACs (millions), transforms included", 1.4)
    for axes, data in zip(panels, sets, strict=True):
        mine = [result for result in results if result.data_words == data]
        _draw_references(axes, mine)
        _draw_runs(axes, mine, kinds)
    handles = labelled(figure)
    legend_below(figure, handles, min(len(sets) + 1, 4, len(handles)), 8.5)
    return figure


def _draw_runs(axes: Axes, results: Sequence[Result], kinds: Mapping[str, str]) -> None:
    series = {"dense": {(r.dense_macs / 1e6, 100 * r.dense_top1) for r in results if r.dense_top1 is not None}}
    for result in results:
        if result.pruned_top1 is not None:
            point = result.macs / 1e6, 100 * result.pruned_top1
            series.setdefault(kinds[result.name], set()).add(point)
    points = [point for found in series.values() for point in found]
    front = pareto_front(points)
    axes.step(
        *zip(*front, strict=True),
        where="post",
        color="0.35",
        linewidth=0.9,
        zorder=2,
        label="beaten by none of these",
    )
    styles = {"dense": ("white", "o"), **mask_styles(kinds)}
    for kind, found in series.items():
        color, marker = styles[kind]
        if found:
            axes.plot(
                *zip(*sorted(found), strict=True),
                color=color,
                marker=marker,
                markeredgecolor="black" if kind == "dense" else "white",
                markeredgewidth=0.9,
                markersize=7,
                linestyle="none",
                zorder=3,
                label=kind,
            )
    if max(x for x, _ in points) > 6 * min(x for x, _ in points):
        axes.set_xscale("log")


def _draw_references(axes: Axes, results: Sequence[Result]) -> None:
    references = next((found for result in results if (found := references_for(result))), ())
    for reference, marker in zip(references, _REFERENCE_MARKERS, strict=False):
        axes.plot(
            *zip(*reference.points, strict=True),
            color="0.55",
            marker=marker,
            markersize=5,
            linewidth=0.8,
            linestyle="-" if reference.sizes else "none",
            zorder=1,
            label=f"published: {reference.name}",
        )
