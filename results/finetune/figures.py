"""The table of README.md and its picture: accuracy on validation and test pictures against time in ONNX Runtime.

    python results/finetune/figures.py

Both are made from the recorded evaluations and times, beside which they lie.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

from fdjax.reports.figures import BLUE, GREEN, VERMILION, new_figure, save_figure

HERE = Path(__file__).resolve().parent
RUNS = {
    "dense": ("fine-tuned for 3 epochs", BLUE, "s"),
    "control": ("the control, 8 epochs more", GREEN, "*"),
    "pruned": ("half of the time: masks for 2 epochs, refined for 6", VERMILION, "o"),
}
SEEDS = (0, 1)


def read(run: str, seed: int, file: str) -> dict:
    """A JSON file of a run's folder."""
    return json.loads((HERE / f"{run}_seed{seed}" / file).read_text())


def top1(run: str, seed: int) -> tuple[float, float, int]:
    """Top-1 of the test pictures, and of validation and test pictures, in percent; the number of all of them."""
    parts = [read(run, seed, f"eval_{split}.json") for split in ("test", "validation")]
    count = sum(part["num_examples"] for part in parts)
    return 100 * parts[0]["top1"], sum(100 * part["top1"] * part["num_examples"] for part in parts) / count, count


def cost(run: str, seed: int) -> tuple[float, float]:
    """MACs and time over the dense network's."""
    if run != "pruned":
        return 1.0, 1.0
    row = next(row for row in read(run, seed, "bench.json")["rows"] if row["form"] == "pruned")
    return read(run, seed, "summary.json")["macs"]["ratio"], row["time_ratio"]


def main() -> None:
    """Prints the rows and draws the picture."""
    figure = new_figure(6.0, 3.6)
    axes = figure.subplots()
    for run, (words, color, marker) in RUNS.items():
        times, accuracies, counts = [], [], []
        for seed in SEEDS:
            test, both, count = top1(run, seed)
            macs, time = cost(run, seed)
            print(f"| `{run}_seed{seed}`: {words} | {seed} | {test:.2f}% | {both:.2f}% | {macs:.3f}x | {time:.2f}x |")
            times.append(time)
            accuracies.append(both)
            counts.append(count)
        shares = [accuracy / 100 for accuracy in accuracies]
        errors = [100 * math.sqrt(p * (1 - p) / n) for p, n in zip(shares, counts, strict=True)]
        # The dense networks have the same time; beside one another their error bars can be told apart.
        shift = {"dense": -0.012, "control": 0.012, "pruned": 0.0}[run]
        places = [time + shift + 0.006 * seed for time, seed in zip(times, SEEDS, strict=True)]
        axes.errorbar(places, accuracies, errors, color=color, marker=marker, linestyle="", capsize=3, label=words)
    axes.set_xlim(0.35, 1.06)
    axes.set_xlabel("measured time in ONNX Runtime, 1 image / dense network's (×)")
    axes.set_ylabel("Top-1, validation and test (%)")
    axes.grid(color="0.92", linewidth=0.7)
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=9)
    save_figure(figure, HERE / "accuracy_time.png")


if __name__ == "__main__":
    main()
