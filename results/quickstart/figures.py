"""README's picture: accuracy against measured time, of the quick start's networks on four engines.

    python results/quickstart/figures.py

It is drawn from the recorded summaries and times, beside which it lies.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

from fdjax.reports.figures import BLUE, GREEN, ORANGE, PURPLE, VERMILION, new_figure, save_figure

HERE = Path(__file__).resolve().parent
ENGINES = (
    ("native", "native code", VERMILION, "o"),
    ("xla", "XLA", BLUE, "s"),
    ("onnxruntime", "ONNX Runtime", GREEN, "^"),
    ("openvino", "OpenVINO", ORANGE, "D"),
)


def top1(run: str) -> float:
    """Test top-1 of a recorded run, in percent."""
    return 100 * json.loads((HERE / run / "summary.json").read_text())["top1"]


def time_ratios(file: str) -> dict[tuple[str, int], float]:
    """(engine, images at once) -> time of the pruned network over the dense one's on that engine."""
    rows = json.loads((HERE / file).read_text())["rows"]
    return {(row["engine"], row["batch"]): row["time_ratio"] for row in rows if row["form"] == "pruned"}


def accuracy_against_time(file: Path) -> None:
    """A panel for 1 and for 8 images at once; a point is one seed on one engine."""
    figure = new_figure(8.4, 3.6)
    panels = figure.subplots(1, 2, sharey=True)
    dense = [top1(f"dense_seed{seed}") for seed in range(3)]
    for axes, batch in zip(panels, (1, 8), strict=True):
        axes.scatter([1.0] * 3, dense, color="0.25", marker="*", s=70, zorder=3, label="dense, trained as long")
        for engine, label, color, marker in ENGINES:
            points = [
                (time_ratios(f"engines_seed{seed}.json")[engine, batch], top1(f"seed{seed}")) for seed in range(3)
            ]
            axes.scatter(*zip(*points, strict=True), color=color, marker=marker, label=f"pruned, {label}")
        paper = time_ratios("engines_paper_seed0.json")["native", batch]
        axes.scatter([paper], [top1("paper_seed0")], color=PURPLE, marker="P", label="the paper's masks, native code")
        axes.axvline(1.0, color="0.7", linewidth=1.0, linestyle="--", zorder=0)
        axes.set_xlim(0.4, 1.06)
        axes.set_ylim(86, 90)
        axes.set_title(f"{batch} image{'s' if batch > 1 else ''} at once", fontsize=10)
        axes.set_xlabel("measured time / dense network's, same engine (×)")
        axes.grid(color="0.92", linewidth=0.7)
    panels[0].set_ylabel("Test top-1 (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, file)


if __name__ == "__main__":
    accuracy_against_time(HERE / "accuracy_time.png")
