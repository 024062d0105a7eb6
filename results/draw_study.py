"""Times the networks of a study, and draws accuracy against MACs and against time, with error bars over seeds.

    taskset -c 0 python results/draw_study.py cifar10_lossless --runs runs/cifar10_lossless   # times first, then draws
    python results/draw_study.py cifar10_lossless                                             # draws anew

The pictures and times are written into the study's folder. Before it, the runs are recorded (`python -m fdjax results`,
see the study's README.md); figures are those of table.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from run_study import HERE, load_study
from studies import Point, draw, is_finished, time_networks
from table import Row, load

STUDIES = sorted(file.parent.name for file in HERE.glob("*/sweep.py"))
ENGINES = {"native": "native code", "onnxruntime": "ONNX Runtime"}


def measure(study: ModuleType, runs: Path, out: Path, rounds: int, repeats: int) -> None:
    """Times the finished networks that come from one dense network in turn, beside it, on each engine at one image.

    Times that the file has of networks whose runs are not here are kept: each is over a dense network timed with it.
    """
    from fdjax import runtime
    from fdjax.provenance import cpu_model

    runtime.limit_threads(1)
    runtime.setup()
    finished = [run.name for run in sorted(runs.glob("*_seed?")) if is_finished(run)]
    pruned = [name for name in finished if not name.startswith(("dense", "control", "learn"))]
    sources = sorted({study.dense_of(name) for name in pruned})
    rows = json.loads(out.read_text())["rows"] if out.is_file() else []
    rows = [row for row in rows if row["network"] not in {*pruned, *sources}]
    for engine in ENGINES:
        for dense in sources:
            names = [name for name in pruned if study.dense_of(name) == dense]
            timed = time_networks(runs, dense, names, engine, 1, rounds, repeats)
            rows += [{**row, "processor": cpu_model()} for row in timed]
            out.write_text(json.dumps({"rounds": rounds, "repeats": repeats, "rows": rows}, indent=1) + "\n")


def point(row: Row, column: str) -> Point | None:
    """Returns a row's point, with x the figure of a column; None if it is not measured."""
    pairs = zip(row.figures.get(column, []), row.figures.get("pruned", []), strict=False)
    found = [(x, 100 * top1) for x, top1 in pairs if x is not None and top1 is not None]
    if not found:
        return None
    x, top1 = zip(*found, strict=True)
    errors = [stdev(of) if len(of) > 1 else 0.0 for of in (x, top1)]
    return Point(row.name.partition(".")[2].partition("_")[0], mean(x), mean(top1), *errors)


def points(rows: list[Row], column: str) -> list[Point]:
    """Returns the points of all rows, and the control at 1."""
    controls = [top1 for row in rows for top1 in row.figures.get("control", []) if top1 is not None]
    found = [at for row in rows if (at := point(row, column))]
    if found and controls:
        seeds = sorted({100 * top1 for top1 in controls})
        found.append(Point("control", 1.0, mean(seeds), 0.0, stdev(seeds) if len(seeds) > 1 else 0.0))
    return found


def main() -> int:
    """Measures if there are runs to measure, then draws; returns 1 if there is nothing to draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--runs", type=Path, help="folder of the runs; without it the pictures are drawn anew")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    folder, study = HERE / flags.study, load_study(flags.study)
    if flags.runs is not None:
        measure(study, flags.runs, folder / "time.json", flags.rounds, flags.repeats)
    rows = {title: [row for row in load() if row.name.startswith(f"{table}.")] for table, title in study.TABLES.items()}
    by_macs = {title: found for title, own in rows.items() if (found := points(own, "macs"))}
    by_time = {
        " · ".join([words] if len(rows) == 1 else [title, words]): found
        for title, own in rows.items()
        for engine, words in ENGINES.items()
        if (found := points(own, engine))
    }
    if not by_macs:
        print("no run is recorded: nothing to draw")
        return 1
    draw(by_macs, folder / "macs.png", "MACs over the dense network's (×)")
    if by_time:
        draw(by_time, folder / "time.png", "time over the dense network's, 1 image (×)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
