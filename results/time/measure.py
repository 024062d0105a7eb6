"""Times the networks of results/time on their engines, each engine's networks turn by turn, and draws what came out.

python results/time/measure.py --runs runs/time --json results/time/time.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent.parent))

from fdjax import runtime

HERE = Path(__file__).resolve().parent
# Engine and images at once -> the suffix of the networks that were learned for it.
ENGINES = {("native", 1): "native06", ("xla", 8): "xla05", ("onnxruntime", 1): "ort07"}
# What every engine times: networks that are no engine's own.
COMMON = ("width025_s0", "width015_s0", "pixels24_s0")
# On the other engines the paper's masks are slower than the dense network, so that the gate by time releases them.
PAPER = {"native": ("paper_native_s0",)}


def measure(runs: Path, out: Path, rounds: int, repeats: int) -> None:
    """Writes a row for each network and engine: top-1, MACs and time over those of the dense network."""
    runtime.limit_threads(1)
    runtime.setup()
    import numpy as np

    from fdjax.frozen.assemble import freeze
    from fdjax.frozen.bench import dense_network, seeded_variables
    from fdjax.frozen.choice import Stopwatch
    from fdjax.frozen.engine_bench import bench_engines
    from fdjax.training.restore import open_checkpoint

    rows = []
    for (engine, batch), suffix in ENGINES.items():
        stopwatch = Stopwatch(batch, runtime.times_cache_dir(), engine)
        names = [f"channels_{suffix}_s0", f"tied_{suffix}_s0", *COMMON, *PAPER.get(engine, ())]
        names = [name for name in names if (runs / name / "summary.json").is_file()]
        if f"channels_{suffix}_s0" not in names:
            continue
        forms, summaries = {}, {}
        for name in ("dense_s0", *names):
            restored = open_checkpoint(str(runs / name))[2]
            weights = seeded_variables(restored.graph)
            summaries[name] = json.loads((runs / name / "summary.json").read_text())
            if restored.hard is None:
                forms[name] = dense_network(restored.graph)
            else:
                forms[name] = freeze(restored.graph, weights, restored.hard.counts, stopwatch.choose)
        found = [bench_engines(forms, [engine], batch=batch, threads=1, rounds=rounds) for _ in range(repeats)]
        for rank, name in enumerate(forms):
            ratios = sorted(run[rank]["time_ratio"] for run in found)
            ms = float(np.median([run[rank]["ms"] for run in found]))
            row = {"network": name, "engine": engine, "batch": batch, "top1": summaries[name]["top1"], "ms": ms}
            row |= {"macs": summaries[name]["macs"]["total"], "time_ratio": float(np.median(ratios))}
            rows.append({**row, "time_ratio_range": [ratios[0], ratios[-1]]})
            print(json.dumps(rows[-1]), flush=True)
        out.write_text(json.dumps({"rounds": rounds, "repeats": repeats, "rows": rows}, indent=1) + "\n")


def draw(file: Path) -> None:
    """Accuracy against time, a panel for each engine."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = json.loads(file.read_text())["rows"]
    # The dense network beside them is the control, which was trained as long as the pruned ones.
    control = json.loads((HERE / "control_s0" / "summary.json").read_text())["top1"]
    rows = [{**row, "top1": control} if row["network"] == "dense_s0" else row for row in rows]
    looks = {
        "dense": ("dense, trained as long", "black", "*"),
        "channels": ("whole channels", "tab:blue", "o"),
        "tied": ("tied 0, 1, N", "tab:orange", "s"),
        "paper": ("the paper's masks", "tab:red", "^"),
        "width": ("narrower network", "tab:green", "v"),
        "pixels": ("smaller picture", "tab:purple", "D"),
    }
    shown = [key for key in ENGINES if any(row["engine"] == key[0] for row in rows)]
    figure, axes = plt.subplots(1, len(shown), figsize=(1 + 4 * len(shown), 4))
    for axis, (engine, batch) in zip(axes, shown, strict=True):
        mine = [row for row in rows if row["engine"] == engine]
        for kind, (label, colour, marker) in looks.items():
            points = sorted((r["time_ratio"], 100 * r["top1"]) for r in mine if r["network"].startswith(kind))
            if not points:
                continue
            x, y = zip(*points, strict=True)
            axis.plot(x, y, marker, color=colour, label=label, markersize=10 if kind == "dense" else 7)
        images = "1 image" if batch == 1 else f"{batch} images"
        axis.set(title=f"{engine}, {images} at once", xlabel="time over the dense network's")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1 of 10,000 test images, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, frameon=False)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(file.with_suffix(".png"), dpi=120)


def main() -> None:
    """Measures, unless told only to draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, help="folder of the runs; without it the picture is drawn anew")
    parser.add_argument("--json", type=Path, default=HERE / "time.json")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    if flags.runs is not None:
        measure(flags.runs, flags.json, flags.rounds, flags.repeats)
    draw(flags.json)


if __name__ == "__main__":
    main()
