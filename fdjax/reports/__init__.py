"""Numbers in, plots and tables out. Never runs a network."""

from fdjax.reports.plots import (
    NoDataError,
    fcmask_figure,
    history_figure,
    kept_counts_figure,
    layer_macs_figure,
    plot_fcmask,
    plot_history,
    plot_kept_counts,
    plot_layer_macs,
    plot_run,
)
from fdjax.reports.tables import macs_table

__all__ = [
    "NoDataError",
    "fcmask_figure",
    "history_figure",
    "kept_counts_figure",
    "layer_macs_figure",
    "macs_table",
    "plot_fcmask",
    "plot_history",
    "plot_kept_counts",
    "plot_layer_macs",
    "plot_run",
]
