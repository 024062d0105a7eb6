"""Numbers in, plots out: what a run's figures look like. Never runs a network."""

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

__all__ = [
    "NoDataError",
    "fcmask_figure",
    "history_figure",
    "kept_counts_figure",
    "layer_macs_figure",
    "plot_fcmask",
    "plot_history",
    "plot_kept_counts",
    "plot_layer_macs",
    "plot_run",
]
