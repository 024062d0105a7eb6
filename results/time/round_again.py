"""Rounds the learned masks of runs with a target of time again, and measures what comes out a few times more.

    taskset -c 0 python results/time/round_again.py runs/targets/channels_xla06_s0 ... --json FILE

The masks are those that a run had learned (`soft_masks.npz`). The measurements that follow the rounding have no part in
it, so that they are free of its choice of the nearest of several.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

from fdjax import runtime


def round_again(run: Path, repeats: int) -> dict:
    """Returns a row: what was asked for, and the MACs and measured times of the rounded masks."""
    from flax.traverse_util import unflatten_dict

    from fdjax.frozen.bench import seeded_variables
    from fdjax.training.restore import open_checkpoint
    from fdjax.training.rounding import gated_masks
    from fdjax.training.time_table import measure_table, measured_ratio, stopwatch_of

    restored = open_checkpoint(str(run))[2]
    learn, graph = restored.config.learn, restored.graph
    with np.load(run / "soft_masks.npz") as soft:
        masks = unflatten_dict(dict(soft), sep="/")
    hard = gated_masks(learn, graph, masks, measure_table(learn, graph), learned=True)
    weights, stopwatch = seeded_variables(graph), stopwatch_of(learn)
    times = [measured_ratio(graph, weights, hard.counts, stopwatch)[0] for _ in range(repeats)]
    row = {"network": run.name, "engine": learn.engine, "batch": learn.engine_batch, "asked": learn.target_time}
    return {**row, "macs": hard.macs.ratio, "time_ratio": float(np.median(times)), "time_ratios": times}


def main() -> int:
    """Rounds and measures one run after the other, and rewrites the JSON file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="workdirs of runs with learn.target_time")
    parser.add_argument("--repeats", type=int, default=5, help="measurements after the rounding")
    parser.add_argument("--json", type=Path, required=True)
    flags = parser.parse_args()
    runtime.limit_threads(1)
    runtime.setup()
    rows = []
    for run in flags.runs:
        rows.append(round_again(run, flags.repeats))
        print(json.dumps(rows[-1]), flush=True)
        flags.json.write_text(json.dumps({"repeats": flags.repeats, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
