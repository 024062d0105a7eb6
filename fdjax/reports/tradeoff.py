"""Plots of several runs: accuracy against MACs, and against measured time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fdjax.reports.figures import BLUE, GREEN, ORANGE, PURPLE, VERMILION, NoDataError, save_figure
from fdjax.reports.panels import labelled, legend_below, top1_panels
from fdjax.reports.results import Result, epochs_words, mask_words
from fdjax.reports.seeds import seed_groups, settings_key

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS, MARKERS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE), "os^DvPX"
_DENSE_LINES = ("--", "-.", ":", (0, (8, 2)))


class Against(NamedTuple):
    """The quantity that accuracy is drawn against.

    Attributes:
      word: its name.
      label: label of the axis.
      of: returns its value for a run, or None.
      panel: returns the panel of a run: its task, and what else runs in one panel have in common.
    """

    word: str
    label: str
    of: Callable[[Result], float | None]
    panel: Callable[[Result], str]


MACS = Against("MACs", "MACs / dense MACs, transforms included (×)", lambda r: r.macs_ratio, lambda r: r.task)
TIME = Against(
    "time", "time / dense time, frozen (×)", lambda r: r.time_ratio, lambda r: f"{r.task}\n{r.timed_on or ''}"
)


def plot_tradeoff(results: Sequence[Result], path: str | Path, against: Against = MACS) -> Path:
    """Writes `tradeoff_figure(results, against)` to `path` as a PNG and returns the path."""
    return save_figure(tradeoff_figure(results, against), path)


def _drawn(results: Sequence[Result], against: Against) -> list[Result]:
    """Returns the pruned runs to draw; against time, those of which at least two were timed in the same way.

    Raises:
      NoDataError: if there is none.
    """
    pruned = [result for result in results if result.pruned_top1 is not None]
    if not pruned:
        raise NoDataError(f"no run has masks, so there is no accuracy to draw against {against.word}")
    if against is not TIME:
        return pruned
    timed = [result for result in pruned if result.timed_on is not None]
    places = Counter(against.panel(result) for result in timed)
    timed = [result for result in timed if places[against.panel(result)] > 1]
    if not timed:
        raise NoDataError("no two runs have a time that was measured on one engine with as many images at once")
    return timed


def tradeoff_figure(results: Sequence[Result], against: Against = MACS) -> Figure:
    """Draws the top-1 of pruned networks against their MAC ratio, or time, beside the dense networks.

    Every run is a point. There is a panel for each network and data set (and for time, each engine and batch size), and
    a colour and a marker for each kind of masks. A thin line joins the means over seeds of runs that differ only by the
    target. Dense networks are horizontal lines at the mean over seeds, in a band from the lowest to the highest, for
    each length of their training.

    Raises:
      NoDataError: if no run has masks, or no two runs have times that can be compared.
    """
    pruned = _drawn(results, against)
    tasks = {against.panel(result): result.task for result in sorted(pruned, key=against.panel)}
    kinds = kinds_of_masks(pruned)
    styles = mask_styles(kinds)
    baselines = {
        panel: _dense_top1s([result for result in results if result.task == task]) for panel, task in tasks.items()
    }
    recipes = sorted({recipe for of_task in baselines.values() for recipe in of_task})

    figure, panels = top1_panels(list(tasks), against.label, 0.9, against.word)
    for axes, panel in zip(panels, tasks, strict=True):
        for recipe, values in baselines[panel].items():
            line = _DENSE_LINES[recipes.index(recipe) % len(_DENSE_LINES)]
            axes.axhspan(100 * min(values), 100 * max(values), color="0.5", alpha=0.15, linewidth=0, zorder=0)
            several = any(len(of_task.get(recipe, ())) > 1 for of_task in baselines.values())
            label = ("dense" if len(recipes) == 1 else f"dense, {recipe}") + (" (mean and range)" if several else "")
            axes.axhline(100 * mean(values), color="0.35", linewidth=1.2, linestyle=line, zorder=1, label=label)
        mine = [result for result in pruned if against.panel(result) == panel]
        for kind, (color, marker) in styles.items():
            of_kind = [result for result in mine if kinds[result.name] == kind]
            for curve in _curves(of_kind, against):
                axes.plot(*zip(*curve, strict=True), color=color, linewidth=1.0, alpha=0.55, zorder=2)
            axes.plot(
                [_value(result, against) for result in of_kind],
                [100 * (result.pruned_top1 or 0.0) for result in of_kind],
                color=color,
                marker=marker,
                linestyle="none",
                markersize=7,
                markeredgecolor="white",
                markeredgewidth=0.7,
                alpha=0.85,
                zorder=3,
                label=kind,
            )
        ratios = [_value(result, against) for result in mine]
        # Runs with the same target differ in the third digit, which a narrower axis would exaggerate.
        margin = max(0.08 * (max(ratios) - min(ratios)), 0.15 - (max(ratios) - min(ratios)) / 2)
        axes.set_xlim(max(0.0, min(ratios) - margin), max(ratios) + margin)
        low, high = axes.get_ylim()  # The same holds for a tenth of a point.
        axes.set_ylim(min(low, (low + high - 1) / 2), max(high, (low + high + 1) / 2))
    handles = labelled(figure)
    # Pruned runs come first, then dense ones, with as many columns as there is room for.
    names = [*styles, *(label for label in handles if label not in styles)]
    room = int(figure.get_figwidth() / (0.5 + 0.085 * max(len(name) for name in names)))
    legend_below(figure, {name: handles[name] for name in names}, int(np.clip(room, 1, len(names))), 9)
    return figure


def mask_styles(kinds: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Returns a colour and a marker for each kind of masks of `kinds_of_masks`."""
    # The numbers of colours and markers have no common divisor, so 35 kinds can be distinguished.
    return {
        kind: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, kind in enumerate(sorted(set(kinds.values())))
    }


def kinds_of_masks(results: Sequence[Result]) -> dict[str, str]:
    """Returns the masks of each run in words: the sides, and other settings and lengths of phases that differ."""
    words = {
        result.name: [
            *([f"filters removed by {result.filters}"] if result.filters is not None else []),
            *([*mask_words(result.config), f"block {result.block}"] if result.has_masks else []),
            *_lengths(result, [p for p in result.own_phases if p != "pretrain"]),
        ]
        for result in results
    }
    common = set.intersection(*(set(of_run) for of_run in words.values()))
    return {
        name: ", ".join(w for i, w in enumerate(of_run) if i == 0 or w not in common) for name, of_run in words.items()
    }


def _value(result: Result, against: Against) -> float:
    value = against.of(result)
    assert value is not None
    return value


def _curves(results: Sequence[Result], against: Against) -> list[list[tuple[float, float]]]:
    """Returns curves of (ratio, top-1 in percent), means over seeds at each target, of runs that are else equal."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for group in seed_groups(results):
        point = mean(_value(r, against) for r in group), mean(100 * (r.pruned_top1 or 0.0) for r in group)
        key = settings_key(group[0], "learn.target_macs", "learn.target_time")
        curves.setdefault(key, []).append(point)
    return [sorted(points) for points in curves.values() if len(points) > 1]


def _lengths(result: Result, phases: Sequence[str]) -> list[str]:
    """Returns phases with their lengths, such as "refine 5 epochs"."""
    words = []
    for phase in phases:
        settings = getattr(result.config, phase)
        length = epochs_words(settings.epochs) if settings.steps is None else f"{settings.steps:,} steps"
        words.append(f"{phase} {length}")
    return words


def _dense_top1s(results: Sequence[Result]) -> dict[str, list[float]]:
    """Returns the length of a dense network's training, in words -> its top-1 with each seed."""
    found: dict[str, dict[tuple[int, float], None]] = {}
    given = []
    for result in results:
        if result.dense_top1 is None:
            continue
        at = result.seed, result.dense_top1
        phases = ("pretrain",) if result.is_pruned else result.config.phases
        own = [phase for phase in phases if phase in result.own_phases]
        if not own:
            given.append(at)
            continue
        lengths = [*(["by --init"] if len(own) < len(phases) else []), *_lengths(result, own)]
        # Runs that started from the same pretrained network share its dense top-1.
        found.setdefault(", ".join(lengths), {})[at] = None
    known = {at for values in found.values() for at in values}
    for at in given:  # The config does not say how the network of --init was trained.
        if at not in known:
            found.setdefault("as given by --init", {})[at] = None
    return {recipe: [top1 for _, top1 in values] for recipe, values in found.items()}
