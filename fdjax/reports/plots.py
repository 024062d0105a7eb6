"""Draws all plots of a run into one folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fdjax.reports.fcmask_plot import fcmask_figure
from fdjax.reports.figures import NoDataError, save_figure
from fdjax.reports.history_plot import history_figure
from fdjax.reports.layer_plots import kept_counts_figure, layer_macs_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FCMaskEntry = tuple[str, ArrayLike, ArrayLike | None, int]


def plot_run(
    layers: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
    phases: Sequence[Mapping[str, Any]],
    fcmasks: Sequence[FCMaskEntry],
    out_dir: str | Path,
    target: float | None = None,
) -> list[Path]:
    """Draws all plots of a run: `layer_macs.png`, `kept_counts.png`, `fcmask.png` and `history.png`.

    Args:
      layers: as for `layer_macs_figure`.
      records: as for `history_figure`.
      phases: as for `history_figure`.
      fcmasks: (name, soft values [C], hard values [C] or None, num_coefs) of each layer side; the one whose soft
        values have the largest standard deviation is drawn.
      out_dir: the folder; it is made if it does not exist.
      target: as for `history_figure`.

    Returns:
      The paths of the plots; a plot without data is left out.
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
