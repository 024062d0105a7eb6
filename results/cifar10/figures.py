"""The pictures of this folder that compare runs: the paper's Figure 9 (schemes) and Figure 10 (rates of masks).

    python results/cifar10/figures.py

They are drawn from the recorded summaries, beside which they lie.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

from fdjax.reports.figures import BLUE, GREEN, VERMILION, new_figure, save_figure

HERE = Path(__file__).resolve().parent

SCHEMES = (("refine", "learn, then refine", BLUE, "o"), ("alternate", "alternate, then refine", VERMILION, "s"),
           ("scratch", "learn, then train from scratch", GREEN, "^"))  # fmt: skip
TARGETS = (0.8, 0.5, 0.33, 0.2)
RATES = (0.01, 0.03, 0.1, 0.3)
# Learned with the usual rate, and refined, is one of the forms.
ORDINARY = "forms/runs/tied_01N_block2_{}_seed0"


def summary(run: str) -> dict | None:
    """A recorded run's summary, or None."""
    file = HERE / run / "summary.json"
    return json.loads(file.read_text()) if file.exists() else None


def schemes(file: Path) -> None:
    """Top-1 against the MAC ratio for each scheme."""
    figure = new_figure(7.0, 4.2)
    axes, dense = figure.subplots(), None
    for name, label, color, marker in SCHEMES:
        runs = [f"schemes/runs/{name}_{target}" for target in TARGETS]
        if name == "refine":
            runs = [ORDINARY.format(target) if target in (0.5, 0.33) else run
                    for run, target in zip(runs, TARGETS, strict=True)]  # fmt: skip
        found = [one for one in map(summary, runs) if one]
        if found:
            dense = found[0]["dense_top1"]
            points = sorted((one["macs"]["ratio"], 100 * one["top1"]) for one in found)
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=label)
    if dense is not None:
        axes.axhline(100 * dense, color="0.35", linestyle="--", linewidth=1.2, label="dense")
    axes.set_xlabel("MACs / dense MACs, transforms included (×)")
    axes.set_ylabel("Test top-1 (%)")
    axes.set_title("Schemes (the paper's Figure 9), tied masks, levels 0, 1, N, one seed", fontsize=10)
    axes.grid(color="0.9", linewidth=0.7)
    axes.legend(frameon=False)
    save_figure(figure, file)


def rates(file: Path) -> None:
    """Top-1 before and after rounding, and after refinement, against the learning rate of masks."""
    runs = [(rate, summary(ORDINARY.format(0.33) if rate == 0.1 else f"rates/runs/rate{rate}")) for rate in RATES]
    found = [(rate, one) for rate, one in runs if one]
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    learned = [next(phase for phase in one["phases"] if phase["name"] == "learn") for _, one in found]
    curves = (
        ("refined", [one["top1"] for _, one in found], BLUE, "o"),
        ("soft masks", [phase["soft_top1"] for phase in learned], GREEN, "^"),
        ("rounded", [phase["top1"] for phase in learned], VERMILION, "s"),
    )
    for label, values, color, marker in curves:
        points = [100 * value for value in values]
        axes.plot([rate for rate, _ in found], points, color=color, marker=marker, label=label)
    axes.set_xscale("log")
    axes.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    axes.minorticks_off()
    axes.set_xlabel("learning rate of masks (SGD)")
    axes.set_ylabel("Test top-1 (%)")
    axes.set_title("Learning rates of masks (the paper's Figure 10), 0.33x MACs, one seed", fontsize=10)
    axes.grid(color="0.9", linewidth=0.7)
    axes.legend(frameon=False)
    save_figure(figure, file)


if __name__ == "__main__":
    schemes(HERE / "schemes.png")
    rates(HERE / "rates.png")
