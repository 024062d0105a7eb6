"""Makes plots, tables and one HTML page from numbers; it never executes a network.

`fdjax.reports.run_page` draws with `fdjax.ops`, and so loads jax; it is imported from its own file.
"""

from fdjax.reports.bench import bench_figure, bench_table, engines_table, plot_bench
from fdjax.reports.fcmask_plot import fcmask_figure
from fdjax.reports.figures import NoDataError
from fdjax.reports.history_plot import history_figure
from fdjax.reports.layer_plots import kept_counts_figure, layer_macs_figure, progression_figure
from fdjax.reports.pareto import pareto_figure, pareto_front, plot_pareto
from fdjax.reports.plots import plot_run
from fdjax.reports.profiled import plot_profile, plot_sensitivity, profile_table
from fdjax.reports.references import MOBILENET_V2_IMAGENET, references_for
from fdjax.reports.results import Result, read_result
from fdjax.reports.results_text import csv_text, markdown
from fdjax.reports.seeds import flat_settings, seed_groups
from fdjax.reports.tables import blocks_table, frozen_table, macs_table
from fdjax.reports.tradeoff import MACS, TIME, plot_tradeoff, tradeoff_figure

__all__ = [
    "MACS",
    "MOBILENET_V2_IMAGENET",
    "TIME",
    "NoDataError",
    "Result",
    "bench_figure",
    "bench_table",
    "blocks_table",
    "csv_text",
    "engines_table",
    "fcmask_figure",
    "flat_settings",
    "frozen_table",
    "history_figure",
    "kept_counts_figure",
    "layer_macs_figure",
    "macs_table",
    "markdown",
    "pareto_figure",
    "pareto_front",
    "plot_bench",
    "plot_pareto",
    "plot_profile",
    "plot_run",
    "plot_sensitivity",
    "plot_tradeoff",
    "profile_table",
    "progression_figure",
    "read_result",
    "references_for",
    "seed_groups",
    "tradeoff_figure",
]
