"""The plot of one layer side's FCMask values."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from fdjax.reports.figures import BLUE, VERMILION, NoDataError, block_words, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def fcmask_figure(name: str, values: ArrayLike, num_coefs: int, hard_values: ArrayLike | None = None) -> Figure:
    """Draws the FCMask values of one layer side, sorted from high to low (the paper's Figure 3).

    The horizontal line at n / num_coefs is the lower end of coefficient n's region: solid if n is the first coefficient
    of an anti-diagonal of the zigzag, otherwise dashed.

    Args:
      name: the layer side's name in the title.
      values: FCMask values in [0, 1], [C].
      num_coefs: number of coefficients of a block, a square number.
      hard_values: the values after rounding, [C], in the order of `values`.

    Returns:
      The figure.

    Raises:
      NoDataError: if there are no channels.
      ValueError: if `num_coefs` is not a square number, or the shapes do not fit.
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
    order = np.lexsort((-soft if hard is None else -hard, -soft))  # Ties are sorted by the rounded value.
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
    axes.set_title(f"FCMask values of {name}\n{len(soft)} channels, {block_words(num_coefs)}", fontsize=11)

    right = axes.twinx()
    right.set_ylim(axes.get_ylim())
    at, labels = _coefficient_labels(block)
    right.set_yticks(at, labels, fontsize=8)
    right.tick_params(length=0)
    right.set_ylabel("Coefficient (zigzag order)")
    if hard is not None:
        figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def _diagonal_starts(block: int) -> tuple[int, ...]:
    """Returns the numbers of the coefficients that start an anti-diagonal of a block, such as (0, 1, 3, 6, 8) for 3."""
    sizes = [*range(1, block + 1), *range(block - 1, 0, -1)]
    return tuple(sum(sizes[:i]) for i in range(len(sizes)))


def _coefficient_labels(block: int) -> tuple[list[float], list[str]]:
    """Returns the places and labels of the coefficients on an axis from 0 to 1; many are labelled by anti-diagonals."""
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
