"""Times frozen networks beside each other: medians over interleaved rounds, and ratios to the first one.

    taskset -c 0 python results/archive/baselines/time_frozen.py --batch 1 8 --json FILE DENSE_FROZEN OTHER_FROZEN ...

The clock is the processor's, of one core: what other programs take does not count.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[3]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frozen", nargs="+", help="folders of frozen networks")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", required=True)
    flags = parser.parse_args()
    from fdjax import runtime

    runtime.limit_threads(1)  # Before jax is loaded.
    import numpy as np

    from fdjax.frozen import load
    from fdjax.frozen.bench import compile_network
    from fdjax.frozen.clock import has_one_core, interleaved
    from fdjax.provenance import processor

    if not has_one_core():
        print("the process has several cores: start it with taskset -c 0", file=sys.stderr)
        return 2
    networks, rows = [load(folder) for folder in flags.frozen], []
    for batch in flags.batch:
        runs = {folder: compile_network(network.frozen, batch).run
                for folder, network in zip(flags.frozen, networks, strict=True)}  # fmt: skip
        times = interleaved(runs, flags.rounds)
        first = float(np.median(times[flags.frozen[0]].own))
        for folder, found in times.items():
            median, quartiles = float(np.median(found.own)), np.percentile(found.own, [25, 75]).tolist()
            name, ratio = Path(folder).name, median / first
            rows.append({"network": name, "batch": batch, "ms": median, "ms_quartiles": quartiles, "time_ratio": ratio})
            print(f"batch {batch}: {name} {median:.3f} ms ({quartiles[0]:.3f} to {quartiles[1]:.3f}), {ratio:.3f}x")
    report = {"processor": processor(), "clock": "processor", "rounds": flags.rounds, "rows": rows}
    Path(flags.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
