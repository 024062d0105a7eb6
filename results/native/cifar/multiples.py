"""Times learned masks in native code, rounded to half of the MACs with any number of channels and with multiples of 8.

python results/native/cifar/multiples.py --learned RUN [--gated RUN] --json FILE

RUN is a folder of train.py whose last phase is `learn`; --gated names a run whose gate by time has decided which layers
stay whole. No weights are needed: time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[3]))

from fdjax import runtime


def main() -> None:
    """Prints a line for each network, batch size and repeat, and writes all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--learned", required=True, help="run with the learned masks")
    parser.add_argument("--gated", help="run with the decisions of the gate by time")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    flags = parser.parse_args()
    runtime.limit_threads(1)
    runtime.setup()
    from fdjax.frozen import freeze
    from fdjax.frozen.bench import dense_network, seeded_variables
    from fdjax.frozen.engine_bench import bench_engines
    from fdjax.pruning import harden_to_target
    from fdjax.training.build import flat_masks
    from fdjax.training.restore import open_checkpoint

    learned = open_checkpoint(flags.learned)[2]
    released = open_checkpoint(flags.gated)[2].done.released if flags.gated else ()
    graph, rows = learned.graph, []
    forms = {"dense": dense_network(graph)}
    for multiple in (1, 8):
        hard = harden_to_target(
            graph,
            flat_masks(learned.state.fcmask),
            0.5,
            levels=learned.config.learn.counts_below_whole,
            released=released,
            group_multiple=multiple,
        )
        forms[f"multiple {multiple}, {hard.macs.ratio:.3f}x MACs"] = freeze(graph, seeded_variables(graph), hard.counts)
    for batch in (1, 8):
        for repeat in range(5):
            for row in bench_engines(forms, ["native"], batch=batch, threads=1, rounds=150):
                rows.append({**row, "repeat": repeat})
                print(f"{batch}  {row['form']:28}  {row['ms']:.3f} ms  {row['time_ratio']:.3f}", flush=True)
    flags.json.write_text(json.dumps({"released": list(released), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
