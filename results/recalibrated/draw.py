"""Draws accuracy and agreement of pruned networks without refinement, with batch norm corrected and as it was trained.

python results/recalibrated/draw.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent.parent))

from fdjax.reports.figures import BLUE, VERMILION, new_figure, save_figure

HERE = Path(__file__).resolve().parent
LITE = HERE.parent / "efficientnet_lite0"
PANELS = {
    "MobileNetV2 1.0-64, CIFAR-10, 512 training images": (HERE / "corrected.json", HERE / "trained.json"),
    "EfficientNet-Lite0, 80 pictures of 8 photographs": (LITE / "tied_corrected.json", LITE / "tied.json"),
}
METHODS = {
    "band": ("low frequencies", VERMILION, "^"),
    "channel": ("whole channels", BLUE, "o"),
    "random_channel": ("random channels", "0.5", "x"),
}


def draw(file: Path) -> None:
    """Draws a panel for each network: solid where batch norm is corrected, dashed where it is as trained."""
    figure = new_figure(10, 4.2)
    handles = {}
    for axis, (title, files) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for path, style, words in zip(files, ("-", "--"), ("corrected", "as trained"), strict=True):
            report = json.loads(path.read_text())
            for method, (label, colour, marker) in METHODS.items():
                points = report["methods"].get(method, [])
                x = [point["macs"]["bare_ratio"] for point in points]
                y = [100 * point["top1"] for point in points]
                looks = {"color": colour, "marker": marker, "linestyle": style}
                if points:
                    handles[f"{label}, {words}"] = axis.plot(x, y, **looks)[0]
        axis.set_title(title)
        axis.set_xlabel("MACs without transforms, over dense")
        axis.set_ylabel("agreement (%)" if report["measure"] == "agreement" else "test top-1 (%)")
        axis.set_ylim(0, 100)
        axis.grid(alpha=0.3)
    figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, file)


if __name__ == "__main__":
    draw(HERE / "accuracy.png")
