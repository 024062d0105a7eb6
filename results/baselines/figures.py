"""The picture of this folder: pruning at full resolution beside smaller input and smaller width (the paper's Figure 7).

    python results/baselines/figures.py

It is drawn from the recorded summaries here and in results/cifar10.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

from fdjax.reports.figures import BLUE, GREEN, ORANGE, VERMILION, new_figure, save_figure

HERE = Path(__file__).resolve().parent
CIFAR10 = HERE.parent / "cifar10" / "main" / "runs"
# Label, color, marker, summaries in the order of their MACs.
CURVES = (
    ("pruned at 32x32 (2 + 5 epochs)", BLUE, "o", [CIFAR10 / name for name in ("half_seed0", "third_seed0")]),
    ("smaller input, dense (7 epochs)", VERMILION, "s", [HERE / f"resolution/runs/size{of}" for of in (24, 20, 16)]),
    ("pruned at 24x24 (7 + 2 + 5 epochs)", ORANGE, "D", [HERE / "resolution/runs/size24_half"]),
    ("smaller width, dense (20 + 7 epochs)", GREEN, "^", [HERE / f"width/runs/width{of}" for of in (0.2, 0.1)]),
)  # fmt: skip


def summary(run: Path) -> dict | None:
    """A recorded run's summary, or None."""
    file = run / "summary.json"
    return json.loads(file.read_text()) if file.exists() else None


def points(runs: Sequence[Path]) -> list[tuple[float, float]]:
    """(MACs with transforms in millions, top-1 in percent) of those that are recorded."""
    found = [one for one in map(summary, runs) if one]
    return [(one["macs"]["total"] / 1e6, 100 * one["top1"]) for one in found]


def resolutions(file: Path) -> None:
    """Top-1 against MACs: a curve for each way of having fewer."""
    figure = new_figure(7.4, 4.8)
    axes = figure.subplots()
    dense = summary(CIFAR10 / "dense_seed0")
    assert dense is not None
    axes.axhline(100 * dense["top1"], color="0.35", linestyle="--", linewidth=1.2,
                 label="dense, 32x32, width 0.35 (20 epochs)")  # fmt: skip
    for label, color, marker, runs in CURVES:
        places = points(runs)
        if places:
            axes.plot(*zip(*places, strict=True), color=color, marker=marker, markersize=6, linewidth=1.5, label=label)
            sizes = [run.name.removeprefix("size").removeprefix("width") for run in runs if summary(run)]
            if len(places) > 1 and color != BLUE:
                for (x, y), size in zip(places, sizes, strict=True):
                    axes.annotate(size, (x, y), xytext=(6, -11), textcoords="offset points", fontsize=8, color=color)
    axes.set_xlabel("MACs, transforms included (millions)")
    axes.set_ylabel("Test top-1 (%)")
    axes.set_title("Pruning beside smaller input and smaller networks (the paper's Figure 7)\n"
                   "MobileNetV2 on the CIFAR-10 JPEG copy, one seed", fontsize=10)  # fmt: skip
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8.5)
    save_figure(figure, file)


if __name__ == "__main__":
    resolutions(HERE / "resolution.png")
