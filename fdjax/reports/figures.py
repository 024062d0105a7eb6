"""What all plots share: a figure, its file, colours, the words below an axis.

Figures are made without pyplot, so no backend is chosen and no global state is touched; matplotlib is imported when the
first figure is made.
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
    """The numbers given hold nothing for this plot (no wrapped layer, no mask, no figure in any record)."""


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


def name_ticks(axes: Axes, places: np.ndarray, names: Sequence[str], limit: int, rotation: float = 60) -> None:
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


def block_words(num_coefs: int) -> str:
    """The block of so many coefficients, in words."""
    block = math.isqrt(num_coefs)
    return f"{block} × {block} blocks ({num_coefs} coefficients)"
