"""Times the networks of results/time on their engines, each engine's networks turn by turn, and draws what came out.

python results/time/measure.py --runs runs/time --json results/time/time.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent))

from studies import LOOKS, Point, draw, is_finished, time_networks  # noqa: E402

# Engine and images at once -> the suffix of the networks that were learned for it.
ENGINES = {("native", 1): "native06", ("xla", 8): "xla05", ("onnxruntime", 1): "ort07"}
# What every engine times: networks that are no engine's own.
COMMON = ("width025", "pixels24")
# On the other engines the paper's masks are slower than the dense network, so that the gate by time releases them.
PAPER = {"native": ("paper_native",)}


def measure(runs: Path, seed: int, out: Path, rounds: int, repeats: int) -> None:
    """Writes a row for each network and engine: top-1, MACs and time over those of the dense network."""
    from fdjax import runtime

    runtime.limit_threads(1)
    runtime.setup()
    rows = []
    for (engine, batch), suffix in ENGINES.items():
        kinds = [f"channels_{suffix}", f"tied_{suffix}", *COMMON, *PAPER.get(engine, ())]
        names = [name for kind in kinds if is_finished(runs / (name := f"{kind}_s{seed}"))]
        if f"channels_{suffix}_s{seed}" in names:
            rows += time_networks(runs, f"dense_s{seed}", names, engine, batch, rounds, repeats)
            out.write_text(json.dumps({"rounds": rounds, "repeats": repeats, "rows": rows}, indent=1) + "\n")


def pictures(file: Path) -> None:
    """Accuracy against time, a panel for each engine."""
    rows = json.loads(file.read_text())["rows"]
    # The dense network beside them is the control, which was trained as long as the pruned ones.
    (control,) = (json.loads((run / "summary.json").read_text())["top1"] for run in file.parent.glob("control_s?"))
    panels: dict[str, list[Point]] = {}
    for row in rows:
        kind = row["network"].partition("_")[0]
        images = "1 image" if row["batch"] == 1 else f"{row['batch']} images"
        title = f"{row['engine']}, {images} at once"
        top1 = control if kind == "dense" else row["top1"]
        kind = kind if kind in LOOKS else "control"
        panels.setdefault(title, []).append(Point(kind, row["time_ratio"], 100 * top1))
    draw(panels, file.with_suffix(".png"), "time over the dense network's (×)")


def main() -> None:
    """Measures, unless told only to draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, help="folder of the runs; without it the picture is drawn anew")
    parser.add_argument("--seed", type=int, default=0, help="seed of the runs, the end of their names")
    parser.add_argument("--json", type=Path, default=HERE / "time.json")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    if flags.runs is not None:
        measure(flags.runs, flags.seed, flags.json, flags.rounds, flags.repeats)
    pictures(flags.json)


if __name__ == "__main__":
    main()
