"""The page of `fdjax report`: one run, or a comparison of several and then each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from fdjax.reports import html
from fdjax.reports.bench import bench_figure
from fdjax.reports.classes import classes_section
from fdjax.reports.closer import closer_script, closer_section, script_policy
from fdjax.reports.fcmask_plot import fcmask_figure
from fdjax.reports.figures import NoDataError
from fdjax.reports.frequency import coef_mask_figure, equivalence, image_frequencies_figure, strategies_figure
from fdjax.reports.history_plot import history_figure
from fdjax.reports.layer_plots import kept_counts_figure, layer_macs_figure, progression_figure
from fdjax.reports.pareto import pareto_figure
from fdjax.reports.plots import FCMaskEntry
from fdjax.reports.references import references_for
from fdjax.reports.results import Result
from fdjax.reports.results_text import results_table
from fdjax.reports.tradeoff import tradeoff_figure
from fdjax.reports.words import asked_words, count_words, outcome_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NONE = "–"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleImages:
    """Example images of a data set.

    Attributes:
      pixels: uint8 [n, H, W, C]; n may be 0.
      names: names of their classes.
      missing: why there are no images.
    """

    pixels: np.ndarray
    names: Sequence[str] = ()
    missing: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFigures:
    """The data of a run that a page shows.

    Attributes:
      result: the run's row.
      summary: the object in `summary.json`.
      records: the objects of `metrics.jsonl`.
      fcmask: the learned FCMask of a layer side, as for `fcmask_figure`; None if there is none.
      fcmask_png: a drawn picture of it, if there is no `fcmask`.
      images: examples from its test set.
      benches: name -> benchmark of its frozen network, as `fdjax bench --json` wrote it.
    """

    result: Result
    summary: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    fcmask: FCMaskEntry | None = None
    fcmask_png: bytes | None = None
    images: ExampleImages
    benches: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def report_page(
    runs: Sequence[RunFigures],
    left_out: Mapping[str, str],
    benches: Mapping[str, Mapping[str, Any]],
    version: str,
) -> str:
    """Returns the page as HTML.

    Args:
      runs: the runs, at least one; their names differ.
      left_out: workdir -> why it has no section.
      benches: benchmarks of `fdjax bench --json` that belong to none of the runs.
      version: fdjax's version.
    """
    names = [run.result.name for run in runs]
    title = f"fdjax report: {names[0]}" if len(runs) == 1 else f"fdjax report: {len(runs)} runs"
    parts = [html.element("h1", escape(title))]
    if left_out:
        listed = "".join(html.element("li", escape(f"{name}: {why}")) for name, why in left_out.items())
        words = f"Left out, without a result: {len(left_out)} of {len(runs) + len(left_out)} workdirs"
        parts.append(html.element("div", html.paragraph(words), html.element("ul", listed), class_="note"))
    if len(runs) > 1:
        parts += [_contents(names), *_comparison([run.result for run in runs])]
    for number, run in enumerate(runs):
        parts += _run_section(run, number)
    if benches:
        parts.append(html.element("h2", "Measured time of other frozen networks"))
        parts.append(html.paragraph("No run on this page has the MACs of these networks."))
        parts += [_bench(name, found) for name, found in benches.items()]
    parts += _mathematics(runs[0].result)
    parts.append(html.paragraph(f"Made by fdjax {version} from the runs' files."))
    parts.append(closer_script())
    return html.page(title, "\n".join(parts), script_policy())


def _contents(names: Sequence[str]) -> str:
    entries = [("#comparison", "Comparison"), *((f"#run{i}", name) for i, name in enumerate(names))]
    entries.append(("#mathematics", "How it works"))
    items = [html.element("li", html.element("a", escape(text), href=target)) for target, text in entries]
    return html.element("nav", html.element("ul", *items))


def _figure(
    make: Callable[[], Figure], text: str, caption: str = "", *, wide: bool = True, pixels: bool = False
) -> str:
    """Returns the picture, or an empty text if there are no data for it."""
    try:
        return html.picture(make(), text, caption, wide=wide, pixels=pixels)
    except NoDataError:
        return ""


def _comparison(results: Sequence[Result]) -> list[str]:
    shown = results_table(results)
    strong = [i for i, is_mean in enumerate(shown.means) if is_mean]
    last = 1 + shown.num_settings

    def figures_first(cells: Sequence[str]) -> list[str]:
        return [cells[0], *cells[last:], *cells[1:last]]

    sources = {f"{ref.name}: {ref.source}": None for result in results for ref in references_for(result)}
    published = f" Published figures: {'; '.join(sources)}." if sources else ""
    return [
        html.element("h2", "Comparison", id="comparison"),
        html.paragraph(shown.same),
        html.table(figures_first(shown.headings), map(figures_first, shown.rows), strong),
        html.paragraph(shown.legend),
        _figure(
            lambda: tradeoff_figure(results),
            "Top-1 of the pruned networks against their MAC ratio",
            "Every run is a point; a thin line joins the means over seeds of runs that differ only by their target.",
        ),
        _figure(
            lambda: pareto_figure(results),
            "Top-1 against MACs of all networks",
            "The stair joins the networks that no other one beats in both top-1 and MACs." + published,
        ),
    ]


# -- one run


def _run_section(run: RunFigures, number: int) -> list[str]:
    result, summary = run.result, run.summary
    return [
        html.element("h2", escape(result.name), id=f"run{number}"),
        html.paragraph(outcome_words(result)),
        html.facts(_headline(result)),
        html.element("h3", "What was asked"),
        html.pairs(asked_words(result, summary["phases"])),
        html.element("h3", "What came out"),
        _macs_table(summary["macs"], result),
        html.paragraph(
            "MACs are multiply-accumulates with hard masks after the gate. Without transforms only products are "
            "counted. By the paper's count every wrapped layer is transformed, with K² MACs for each kept coefficient "
            "on either side. With transforms each layer has its cheapest exact form; this count is the one compared."
        ),
        _phase_table(summary["phases"]),
        *classes_section(summary),
        *_curves(run),
        html.element("h3", "Layers"),
        _layer_table(summary["layers"]),
        *closer_section(summary["layers"], run.images.pixels, run.images.names),
        html.element("h3", "Measured time"),
        *([_bench(name, found) for name, found in run.benches.items()] or [_no_bench(result)]),
        html.element("h3", "Images in the frequency domain"),
        _images(run),
        html.element("h3", "Where it ran"),
        html.pairs(_provenance(summary)),
    ]


def _headline(result: Result) -> list[tuple[str, str, str]]:
    cards = []
    if result.dense_top1 is not None:
        cards.append(("Dense top-1", f"{100 * result.dense_top1:.2f}%", result.dense_origin))
    if result.pruned_top1 is not None:
        change = "" if result.loss_points is None else f"{0.0 - result.loss_points:+.2f} points"
        cards.append(("Pruned top-1", f"{100 * result.pruned_top1:.2f}%", change))
    cards.append(("Dense MACs", count_words(result.dense_macs), "no transforms"))
    if result.is_pruned:
        cards.append(("Pruned MACs", count_words(result.macs), "transforms included"))
        asked = f"asked: {result.target_macs:g}" if result.target_macs is not None else ""
        ratio = result.paper_ratio if result.target_convention == "paper" else result.macs_ratio
        cards.append(("MAC ratio", f"{ratio:.3f}×", asked))
    if result.time_ratio is not None:
        asked = f"asked: {result.target_time:g}" if result.target_time is not None else "of the dense network's"
        cards.append(("Frozen time", f"{result.time_ratio:.3f}×", asked))
    cards.append(("Time of the run", f"{result.seconds / 60:.1f} min", "its own phases"))
    return cards


def _macs_table(macs: Mapping[str, Any], result: Result) -> str:
    pruned = [
        ("pruned, without transforms", macs["pruned"]),
        ("pruned, with transforms (cheapest exact forms)", macs["total"]),
        ("pruned, by the paper's count", macs["paper_total"]),
        ("transforms alone, by that count", max(0, macs["paper_total"] - macs["pruned"])),
    ]
    whole = "nothing pruned, full DCT and IDCT", macs["full_transforms"]
    removed = [("filters removed", macs["dense"])] if result.filters is not None else []
    rows = [("dense", result.dense_macs), *removed, *(pruned if result.has_masks else []), whole]
    return html.table(
        ["MACs of the network", "count", "of the dense"],
        [(name, f"{count:,.0f}", f"{count / result.dense_macs:.3f}×") for name, count in rows],
    )


def _steps_words(phase: Mapping[str, Any]) -> str:
    stopped = phase.get("stopped")
    if not isinstance(stopped, Mapping):
        return f"{phase['steps']:,}"
    return f"stopped at {stopped['at']:,} of {phase['steps']:,}, the best at {stopped['best']:,}"


def _phase_table(phases: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            phase["name"],
            _steps_words(phase),
            f"{phase['seconds'] / 60:.1f} min" if "seconds" in phase else _NONE,
            _NONE if phase.get("soft_top1") is None else f"{100 * phase['soft_top1']:.2f}%",
            f"{100 * phase['top1']:.2f}%" if phase.get("top1") is not None else _NONE,
            f"{phase['ratio']:.3f}×" if phase.get("ratio") is not None else _NONE,
        )
        for phase in phases
    ]
    headings = ["phase", "steps", "time", "top-1 before rounding", "top-1 at its end", "MACs at its end"]
    return html.table(headings, rows)


def _curves(run: RunFigures) -> list[str]:
    layers, records, summary = run.summary["layers"], run.records, run.summary
    ends = list(accumulate(phase["steps"] for phase in summary["phases"]))
    spans = [
        {"name": phase["name"], "start_step": end - phase["steps"], "end_step": end}
        for phase, end in zip(summary["phases"], ends, strict=True)
    ]
    target = summary.get("target_macs") if summary.get("target_convention") == "total" else None
    history = [
        html.element("h3", "Curves"),
        _figure(lambda: history_figure(records, spans, target), "Accuracy, MAC ratio and loss by training step"),
    ]
    if not run.result.has_masks:
        return history
    return [
        *history,
        _figure(
            lambda: layer_macs_figure(layers),
            "MACs of each pointwise layer over those of the dense layer",
            "The paper's Figure 8: the MACs that remain of each pointwise layer, without and with its transforms.",
        ),
        _fcmask(run),
        _figure(
            lambda: kept_counts_figure(layers),
            "Share of channels by kept count, for each masked layer side",
            "The paper's Figure 11: how many coefficients the channels of each layer side keep.",
        ),
        _figure(
            lambda: progression_figure(records),
            "Share of channels by what they keep, at each evaluation",
            "All masked layer sides together, in the course of training.",
        ),
    ]


def _fcmask(run: RunFigures) -> str:
    caption = (
        "The paper's Figure 3: FCMask of the layer side whose values differ most, sorted; a line for each coefficient."
    )
    levels = run.result.config.learn.levels
    if levels != "all":
        caption += f" These masks are rounded to the levels {levels} only, which share the range evenly."
    if run.fcmask is not None:
        name, soft, hard, num_coefs = run.fcmask
        return _figure(lambda: fcmask_figure(name, soft, num_coefs, hard), f"FCMask values of {name}, sorted", caption)
    if run.fcmask_png is not None:
        return html.image(html.png_uri(run.fcmask_png), "FCMask values of a layer side, sorted", caption, "35rem")
    return ""


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> str:
    headings = ["layer", "block", "form", "dense", "pruned", "by the paper", "with transforms", "ratio"]
    headings += [f"{side} keeps 0 / mean / some / all" for side in ("input", "output")]
    rows = []
    for layer in layers:
        kept = layer.get("kept_counts") or {}
        counts = [f"{layer[key]:,}" if key in layer else _NONE for key in ("dense", "pruned", "paper_total", "total")]
        released = ", released" if layer.get("released") else ""
        rows.append(
            [
                layer["name"],
                str(layer.get("block") or _NONE),
                f"{layer.get('form', _NONE)}{released}",
                *counts,
                f"{layer['ratio']:.3f}" if "ratio" in layer else _NONE,
                *(_kept_words(kept.get(side)) for side in ("input", "output")),
            ]
        )
    return html.table(headings, rows)


def _kept_words(counts: Sequence[int] | None) -> str:
    if not counts:
        return _NONE
    between = counts[1:-1]
    return f"{counts[0]} / {sum(between[:1])} / {sum(between[1:])} / {counts[-1]}"


def _bench(name: str, found: Mapping[str, Any]) -> str:
    columns = (
        ("engine", "engine", "s"), ("batch", "batch", "d"), ("threads", "threads", "d"), ("dtype", "type", "s"),
        ("dense_ms", "dense, ms", ".3f"),
        ("frozen_ms", "frozen, ms", ".3f"), ("onnxruntime_dense_ms", "ONNX Runtime dense, ms", ".3f"),
        ("time_ratio", "time, frozen / dense", ".3f"), ("mac_ratio", "MACs, frozen / dense", ".3f"),
    )  # fmt: skip
    columns = [column for column in columns if any(row.get(column[0]) is not None for row in found["rows"])]
    rows = [
        [_NONE if row.get(key) is None else format(row[key], form) for key, _, form in columns] for row in found["rows"]
    ]
    machine = found.get("machine") or {}
    words = {"processor": "", "device": "", "jax": "jax "}
    where = ", ".join(f"{word}{machine[key]}" for key, word in words.items() if machine.get(key))
    return "".join(
        [
            html.paragraph(f"{name}: medians for a batch, on {where or 'an unnamed machine'}."),
            html.table([heading for _, heading, _ in columns], rows),
            _figure(
                lambda: bench_figure(found["rows"]), "Time against MACs, both over the dense network's", wide=False
            ),
        ]
    )


def _no_bench(result: Result) -> str:
    if not result.is_pruned:
        return html.paragraph("A dense network is not compared with itself.")
    return html.paragraph(
        "Not measured. fdjax freeze compiles the network, fdjax bench --json FILE times it, and --bench FILE shows the "
        "times here."
    )


def _images(run: RunFigures) -> str:
    if not len(run.images.pixels):
        return html.paragraph(f"Example images are missing: {run.images.missing}", "note")
    block = run.result.config.learn.block
    # A block of one pixel, or one larger than the image, shows nothing.
    block = block if 1 < block <= min(run.images.pixels.shape[1:3]) else 2
    return _figure(
        lambda: image_frequencies_figure(run.images.pixels, block, run.images.names),
        f"Test images, their coefficients in {block}x{block} blocks, and truncated reconstructions",
        "Test images of this run: each image, the amplitudes of its coefficients (low frequencies at the upper left, "
        "dark is large), and its reconstruction from the first coefficients. The network transforms its maps in the "
        "same way.",
        pixels=True,
    )


def _provenance(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = summary.get("versions") or {}
    return [(str(name), str(value)) for name, value in versions.items() if value is not None]


# -- the paper's figures


def _mathematics(result: Result) -> list[str]:
    learn = result.config.learn
    same = equivalence()
    return [
        html.element("h2", "How it works", id="mathematics"),
        html.paragraph("Drawn from the library's own functions, not copied from the paper."),
        _figure(
            strategies_figure,
            "Four ways to prune half of the coefficients of a layer",
            "The paper's Figure 1: what is kept (grey) of a layer's channels and coefficients at one half. If channels "
            "keep a band from the lowest frequency on (d), all products are dense.",
        ),
        _figure(
            lambda: coef_mask_figure(learn.block, learn.counts_below_whole),
            "The mask of each coefficient as a function of FCMask",
            "The paper's Figure 2: one learned value of a channel decides how many of its coefficients are kept.",
        ),
        html.picture(
            same.figure,
            "A pointwise layer as one product, as masked products of coefficients, and band by band",
            "The paper's Figure 4, computed on a random map: (a) the plain layer; (b) the same layer between a DCT and "
            f"its inverse, with masks (without masks it differs from (a) by {same.plain_error:.0e} of the largest "
            f"output); (c) band by band, which gives the result of (b) within {same.banded_error:.0e} with "
            f"{count_words(same.banded_macs)} instead of {count_words(same.dense_macs)} MACs, without transforms.",
            wide=True,
        ),
    ]
