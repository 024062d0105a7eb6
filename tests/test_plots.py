"""The plots show the numbers given, as real PNG files, and say so when there are none."""

from __future__ import annotations

import struct
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.text import Text

from fdjax.reports import (
    NoDataError,
    fcmask_figure,
    history_figure,
    kept_counts_figure,
    layer_macs_figure,
    plot_run,
)
from fdjax.reports.fcmask_plot import _diagonal_starts
from fdjax.reports.figures import COUNT_COLORS, save_figure


def layer(name, kind="pointwise", block: int | None = 2, dense=1000, pruned=1000, total=1000, **rest):
    plain = {"full_transforms": dense, "paper_total": total, "form": "dense", "released": False}
    empty = {"input": None, "output": None}
    num_coefs = block * block if block else None
    macs = {"dense": dense, "pruned": pruned, "total": total}
    return (
        {"name": name, "kind": kind, "block": block, "num_coefs": num_coefs, "kept_counts": empty} | plain | macs | rest
    )


@pytest.fixture
def layers():
    return [
        layer("stem", "conv", None, dense=2000, pruned=2000, total=2000),
        layer("block01/expand", pruned=300, total=500, kept_counts={"input": None, "output": [1, 2, 3, 0, 4]}),
        layer("block01/depthwise", "depthwise", None),
        layer(
            "block01/project", pruned=400, total=400, kept_counts={"input": [5, 0, 0, 0, 5], "output": [0, 0, 0, 8, 0]}
        ),
        layer("head", dense=4000, pruned=4000, total=4000, released=True, form="dense"),
        layer("classifier", "dense", None),
    ]


@pytest.fixture
def records():
    return [
        {"step": 10, "phase": "pretrain", "train_loss": 2.0, "train_top1": 0.25},
        {"step": 20, "phase": "pretrain", "train_loss": 1.0, "train_top1": 0.5, "validation_top1": 0.4},
        {"step": 30, "phase": "learn", "train_loss": float("nan"), "macs_ratio": 0.7, "lambda": 0.1},
        {"step": 40, "phase": "learn", "train_loss": 1.5, "macs_ratio": 0.5, "test_top1": 0.45, "train_top1": None},
    ]


PHASES = [
    {"name": "pretrain", "start_step": 0, "end_step": 20},
    {"name": "learn", "start_step": 20, "end_step": 40},
]


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def heights(line):
    return np.asarray(line.get_ydata(), float)


def assert_png(path, smallest=(500, 350), largest=(2300, 1600)):
    with path.open("rb") as file:
        head = file.read(24)
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    size = struct.unpack(">II", head[16:24])
    assert all(low <= length <= high for low, length, high in zip(smallest, size, largest, strict=True)), size
    assert 5_000 < path.stat().st_size < 1_000_000
    pixels = imread(path)
    assert 0.01 < np.mean(pixels[..., :3].min(axis=-1) < 0.9) < 0.9  # neither blank nor all ink


def test_layer_macs_shows_the_ratios_of_wrapped_layers(layers):
    figure = layer_macs_figure(layers)
    (axes,) = figure.axes
    drawn = lines(axes)
    np.testing.assert_allclose(heights(drawn["pruned, without transforms"]), [0.3, 0.4, 1.0])
    np.testing.assert_allclose(heights(drawn["with transforms (cheapest form)"]), [0.5, 0.4, 1.0])
    np.testing.assert_allclose(heights(drawn["dense"]), 1.0)
    np.testing.assert_array_equal(drawn["released by the gate"].get_xydata(), [[2, 1]])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["block01/expand", "block01/project", "head"]
    assert "0.89x MACs with transforms (8.9k of 10k), 0.87x without" in axes.get_title()
    assert "MACs" in axes.get_ylabel() and axes.get_xlabel()
    low, high = axes.get_ylim()
    assert low == 0 and high > 1


def test_layer_macs_without_released_layers_has_no_mark_for_them(layers):
    (axes,) = layer_macs_figure(layers[:4]).axes
    assert "released by the gate" not in lines(axes)


def test_layer_macs_above_dense_stay_in_the_picture():
    (axes,) = layer_macs_figure([layer("a", total=2500)]).axes
    assert axes.get_ylim()[1] > 2.5


def test_names_are_thinned_when_many():
    (axes,) = layer_macs_figure([layer(f"layer{i}") for i in range(400)]).axes
    names = [tick.get_text() for tick in axes.get_xticklabels()]
    assert 40 < len(names) <= 90
    assert names[0] == "layer0"
    step = int(names[1].removeprefix("layer"))
    assert names == [f"layer{i}" for i in range(0, 400, step)]
    np.testing.assert_array_equal(axes.get_xticks(), range(0, 400, step))


def stacks(axes):
    """(bottom, height, colour) of each segment, by the bar's place."""
    bars = {}
    for patch in axes.patches:
        segment = (patch.get_y(), patch.get_height(), to_hex(patch.get_facecolor()))
        bars.setdefault(round(patch.get_x() + patch.get_width() / 2, 6), []).append(segment)
    return [bars[place] for place in sorted(bars)]


def colour(share):
    return to_hex(colormaps[COUNT_COLORS](float(share)))


def test_kept_counts_stack_the_shares_of_channels(layers):
    figure = kept_counts_figure(layers)
    axes, bar = figure.axes
    names = [tick.get_text() for tick in axes.get_xticklabels()]
    assert names == ["block01/expand output", "block01/project input", "block01/project output"]
    expand_output, project_input, project_output = stacks(axes)
    np.testing.assert_allclose([segment[:2] for segment in expand_output], [(0, 10), (10, 20), (30, 30), (60, 40)])
    assert [segment[2] for segment in expand_output] == [colour(n / 4) for n in (0, 1, 2, 4)]
    np.testing.assert_allclose([segment[:2] for segment in project_input], [(0, 50), (50, 50)])
    assert project_output == [(0, 100, colour(3 / 4))]
    assert bar.get_yticks().tolist() == [0, 1, 2, 3, 4]
    assert "Kept count (" in bar.get_ylabel() and "2 × 2" in axes.get_title() and "%" in axes.get_ylabel()


def test_kept_counts_of_different_blocks_are_coloured_by_share():
    figure = kept_counts_figure(
        [
            layer("a", block=2, kept_counts={"input": [0, 0, 6, 0, 0], "output": None}),
            layer("b", block=4, kept_counts={"input": [0] * 8 + [3] + [0] * 8, "output": None}),
        ]
    )
    axes, bar = figure.axes
    assert stacks(axes) == [[(0, 100, colour(0.5))], [(0, 100, colour(0.5))]]
    assert bar.get_ylim() == (0, 1)
    assert "/ N" in bar.get_ylabel() and "4 and 16 coefficients" in axes.get_title()


@pytest.mark.parametrize("num_coefs", [1, 9, 49, 256])
def test_kept_counts_take_any_number_of_coefficients(num_coefs, tmp_path):
    counts = [1] * (num_coefs + 1)
    assert_png(
        save_figure(
            kept_counts_figure([layer("a", kept_counts={"input": counts, "output": counts})]), tmp_path / "a.png"
        )
    )


def region_lines(axes):
    return {round(float(line.get_ydata()[0]), 6): line.get_linestyle() for line in axes.get_lines()}


def test_diagonals_of_the_zigzag():
    assert _diagonal_starts(1) == (0,)
    assert _diagonal_starts(2) == (0, 1, 3)
    assert _diagonal_starts(3) == (0, 1, 3, 6, 8)
    assert _diagonal_starts(4) == (0, 1, 3, 6, 10, 13, 15)


def test_fcmask_lines_are_solid_where_a_diagonal_starts():
    axes = fcmask_figure("head input", [0.2, 0.9], 9).axes[0]
    expected = {round(n / 9, 6): "-" if n in (1, 3, 6, 8) else "--" for n in range(1, 9)}
    assert region_lines(axes) == expected


def test_fcmask_of_one_coefficient_has_no_lines():
    assert region_lines(fcmask_figure("a", [0.5], 1).axes[0]) == {}


def test_fcmask_values_are_sorted_and_hard_values_follow():
    soft, hard = [0.2, 0.9, 0.55, 0.2], [0.0, 1.0, 0.5, 0.25]
    axes, right = fcmask_figure("block10/expand output", soft, 4, hard).axes
    steps = {patch.get_label(): patch.get_data() for patch in axes.patches}  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_allclose(steps["learned (soft)"].values, [0.9, 0.55, 0.2, 0.2])
    np.testing.assert_allclose(steps["rounded (hard)"].values, [1.0, 0.5, 0.25, 0.0])
    np.testing.assert_allclose(steps["learned (soft)"].edges, [0.5, 1.5, 2.5, 3.5, 4.5])
    assert "block10/expand output" in axes.get_title()
    assert [tick.get_text() for tick in right.get_yticklabels()] == ["0", "1", "2", "3"]
    np.testing.assert_allclose(right.get_yticks(), [0.125, 0.375, 0.625, 0.875])
    assert right.get_ylim() == axes.get_ylim()


def test_fcmask_without_hard_values_draws_one_line():
    assert len(fcmask_figure("a", np.linspace(0, 1, 5), 4).axes[0].patches) == 1


@pytest.mark.parametrize("num_coefs", [49, 256])
def test_many_coefficients_are_named_by_diagonal_without_clashes(num_coefs):
    right = fcmask_figure("a", [0.3], num_coefs).axes[1]
    assert np.diff(right.get_yticks()).min() > 0.03
    assert right.get_yticklabels()[0].get_text() == "0"
    assert "10–14" in [tick.get_text() for tick in right.get_yticklabels()]


@pytest.mark.parametrize(
    ("values", "num_coefs", "hard", "words"),
    [
        ([0.5], 8, None, "square"),
        ([0.5], 0, None, "square"),
        ([0.5], -4, None, "square"),
        ([[0.5]], 4, None, "one value per channel"),
        ([0.5, 0.2], 4, [1.0], "one value per channel"),
    ],
)
def test_fcmask_refuses_what_does_not_fit(values, num_coefs, hard, words):
    with pytest.raises(ValueError, match=words):
        fcmask_figure("a", values, num_coefs, hard)


def finite(line):
    data = np.asarray(line.get_xydata(), float)
    return data[np.isfinite(data[:, 1])]


def test_history_shows_each_series_and_the_target(records):
    figure = history_figure(records, PHASES, target=0.55)
    top1, macs, loss = figure.axes
    accuracy = lines(top1)
    np.testing.assert_allclose(finite(accuracy["training"]), [[10, 25], [20, 50]])
    np.testing.assert_allclose(finite(accuracy["validation"]), [[20, 40]])
    np.testing.assert_allclose(finite(accuracy["test"]), [[40, 45]])
    (ratio,) = [line for label, line in lines(macs).items() if "hard masks" in str(label)]
    np.testing.assert_allclose(finite(ratio), [[30, 0.7], [40, 0.5]])
    np.testing.assert_allclose(heights(lines(macs)["target 0.55"]), 0.55)
    np.testing.assert_allclose(finite(lines(loss)["training"]), [[10, 2.0], [20, 1.0], [40, 1.5]])
    assert "%" in top1.get_ylabel() and "MACs" in macs.get_ylabel() and "step" in loss.get_xlabel()
    assert top1.get_xlim()[0] <= 0 and top1.get_xlim()[1] >= 40
    assert top1.get_xlim() == macs.get_xlim() == loss.get_xlim()


def test_history_lines_break_between_phases(records):
    loss = lines(history_figure(records, PHASES).axes[-1])["training"]
    np.testing.assert_array_equal(np.isnan(heights(loss)), [False, False, True, False])


def test_history_shades_and_names_the_phases(records):
    for axes in history_figure(records, PHASES).axes:
        spans = [(patch.get_x(), patch.get_width()) for patch in axes.patches]  # pyright: ignore[reportAttributeAccessIssue]
        assert spans == [(0, 20), (20, 20)]
    assert [text.get_text() for text in history_figure(records, PHASES).axes[0].texts] == ["pretrain", "learn"]


def test_phase_names_do_not_overlap(records):
    bounds = [0, 30, 31, 32, 33, 40]
    names = ["pretrain", "learn", "alternate", "refine", "scratch"]
    phases = [
        {"name": name, "start_step": start, "end_step": end}
        for name, start, end in zip(names, bounds[:-1], bounds[1:], strict=True)
    ]
    figure = history_figure(records, phases)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = figure.axes[0].texts
    assert [text.get_text() for text in texts] == names
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in texts]  # without the line down
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_history_skips_axes_without_values_and_needs_no_phases():
    figure = history_figure([{"step": 5, "phase": "learn", "macs_ratio": 0.5}], [], target=0.4)
    (axes,) = figure.axes
    assert "MACs" in axes.get_ylabel()


def test_no_data_is_said():
    with pytest.raises(NoDataError, match="wrapped"):
        layer_macs_figure([layer("stem", "conv", None)])
    with pytest.raises(NoDataError, match="kept counts"):
        kept_counts_figure([layer("a"), layer("b", kept_counts=None)])
    with pytest.raises(NoDataError, match="channels"):
        fcmask_figure("a", [], 4)
    with pytest.raises(NoDataError, match="records"):
        history_figure([{"step": 1, "phase": "learn", "lambda": 0.1}], PHASES)


def test_plot_run_writes_all_plots(layers, records, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(
        "fdjax.reports.plots.fcmask_figure",
        lambda name, *args: chosen.append((name, *args)) or fcmask_figure(name, *args),
    )
    wide = ("wide", np.array([0.0, 1.0, 0.5]), np.array([0.0, 1.0, 0.5]), 4)
    fcmasks = [
        ("flat", np.ones(3), None, 4),
        wide,
        ("none", np.zeros(0), None, 4),
        ("narrow", np.array([0.4, 0.5]), None, 4),
    ]
    out = tmp_path / "new" / "plots"
    paths = plot_run(layers, records, PHASES, fcmasks, out, target=0.5)
    assert paths == [out / name for name in ("layer_macs.png", "kept_counts.png", "fcmask.png", "history.png")]
    assert [call[0] for call in chosen] == ["wide"]
    for path in paths:
        assert_png(path)


def test_plot_run_skips_what_has_no_data(layers, records, tmp_path):
    assert plot_run([], [], [], [], tmp_path) == []
    assert not list(tmp_path.iterdir())
    unmasked = [entry | {"kept_counts": {"input": None, "output": None}} for entry in layers]
    drawn = plot_run(unmasked, records, PHASES, [], tmp_path)
    assert [path.name for path in drawn] == ["layer_macs.png", "history.png"]


def test_a_full_size_network_fits(tmp_path):
    counts = [3, 1, 0, 2, 5, 1, 1, 1, 1, 9]
    kept = {"input": counts, "output": counts}
    network = [
        layer(f"block{i:02d}/{part}", block=3, pruned=400, total=600, kept_counts=kept)
        for i in range(1, 18)
        for part in ("expand", "project")
    ]
    assert_png(save_figure(layer_macs_figure(network), tmp_path / "macs.png"))
    assert_png(save_figure(kept_counts_figure(network), str(tmp_path / "kept.png")))
    (axes, _) = kept_counts_figure(network).axes
    assert len(axes.get_xticks()) == 68


def test_matplotlib_is_imported_late_and_pyplot_never(tmp_path):
    code = (
        "import sys; from fdjax.reports import plot_run; assert 'matplotlib' not in sys.modules; "
        f"assert plot_run([], [], [], [('a', [0.1, 0.5], None, 4)], {str(tmp_path)!r}); "
        "assert 'matplotlib.figure' in sys.modules; assert 'matplotlib.pyplot' not in sys.modules; "
        "assert not {'jax', 'flax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
