"""What all plots share: figures, their files, colours, and the names below an axis.

Figures are made without pyplot, so that no backend is chosen and no global state changes. matplotlib is imported when
the first figure is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
COUNT_COLORS = "viridis"
# Okabe and Ito's palette, which stays distinct under the common colour-vision deficiencies.
BLUE, VERMILION, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"


class NoDataError(ValueError):
    """The numbers have nothing for this plot, such as no wrapped layer, no mask, or no figure in any record."""


def new_figure(width: float, height: float) -> Figure:
    """Makes a figure; width and height are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a PNG file, and makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI, bbox_inches="tight")
    return path


def name_ticks(axes: Axes, places: np.ndarray, names: Sequence[str], limit: int, rotation: float = 60) -> None:
    """Puts names under the x axis; with more than `limit` only every second (third, ...) of them.

    Args:
      axes: the axes.
      places: the names' places on the x axis, [n].
      names: the names.
      limit: the most names that are shown.
      rotation: their rotation in degrees.
    """
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


def block_words(num_coefs: int) -> str:
    """Words a block of `num_coefs` coefficients."""
    block = math.isqrt(num_coefs)
    return f"{block} × {block} blocks ({num_coefs} coefficients)"
