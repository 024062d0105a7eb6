"""Draws time beside MACs, native code and OpenVINO: python results/native/figures.py"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent


def main() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    files = {"one image": "mobilenet_v2_192_pair.json", "8 images": "mobilenet_v2_192_batch8.json"}
    for axis, (title, name) in zip(axes, files.items(), strict=True):
        rows = [row for row in json.loads((HERE / name).read_text())["rows"] if row["form"] != "dense"]
        for engine, marker in (("native", "o"), ("openvino", "s")):
            mine = [row for row in rows if row["engine"] == engine and row["time_ratio"] < 1.5]
            x, y = [row["mac_ratio"] for row in mine], [row["time_ratio"] for row in mine]
            axis.plot(x, y, marker, label=engine)
            for row in mine:
                axis.annotate(row["form"], (row["mac_ratio"], row["time_ratio"]), fontsize=7)
        axis.plot([0.3, 1], [0.3, 1], color="grey", linewidth=0.8)
        axis.set(title=title, xlabel="MACs over the dense network's", ylim=(0.3, 1))
    axes[0].set_ylabel("time over the dense network's")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(HERE / "mobilenet_v2_192.png", dpi=110)


if __name__ == "__main__":
    main()
