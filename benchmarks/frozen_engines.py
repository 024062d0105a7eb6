"""Times frozen networks beside their dense networks, in XLA and in ONNX Runtime (docs/benchmarks.md).

python benchmarks/frozen_engines.py --frozen DIR [DIR ...] --batch 1 8 --threads 1 --json FILE
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import _contest as contest

from fdjax import runtime
from fdjax.commands.output_files import write_report
from fdjax.errors import reports_user_errors

if TYPE_CHECKING:
    from fdjax.frozen import FrozenNetwork
    from fdjax.frozen.bench import Peer

COLUMNS = ("network", "mac_ratio", "batch", "engine", "dense_ms", "frozen_ms", "time_ratio")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the flags."""
    parser = contest.Parser("Times frozen networks beside their dense networks, in XLA and in ONNX Runtime.")
    parser.add_argument("--frozen", nargs="+", required=True, metavar="DIR", help="folders that fdjax freeze made")
    parser.add_argument("--batch", nargs="+", type=contest.integer(1), default=[1, 8], help="batch sizes in images")
    parser.add_argument("--repeats", type=contest.integer(1), default=3, help="repetitions, of which the median counts")
    contest.add_shared_flags(parser)
    return parser.parse_args(arguments)


def measure(name: str, network: FrozenNetwork, batch: int, flags: argparse.Namespace, peer: Peer | None) -> list[dict]:
    """Measures a row for each engine that accepts the network; all of them are timed in alternation."""
    import numpy as np

    from fdjax.frozen.bench import compile_network, dense_network
    from fdjax.frozen.clock import has_one_core, interleaved

    forms = {"dense": dense_network(network.network, flags.seed), "frozen": network.frozen}
    run: dict[str, Callable[[], object]] = {f"xla {form}": compile_network(f, batch).run for form, f in forms.items()}
    if peer is not None:
        try:
            run |= {f"onnxruntime {form}": peer(f, batch) for form, f in forms.items()}
        except Exception as error:  # Its binding can raise any exception.
            print(f"{name}: ONNX Runtime refuses it: {str(error).splitlines()[0]}", flush=True)
    found = [interleaved(run, flags.rounds) for _ in range(flags.repeats)]
    rows = []
    for engine in ("xla", "onnxruntime") if "onnxruntime frozen" in run else ("xla",):
        dense, frozen = ([float(np.median(times[f"{engine} {form}"].own)) for times in found] for form in forms)
        ratios = sorted(pruned / whole for pruned, whole in zip(frozen, dense, strict=True))
        row: dict[str, Any] = {"network": name, "mac_ratio": network.manifest["macs"]["ratio"], "batch": batch}
        row |= {"engine": engine, "threads": flags.threads, "clock": "processor" if has_one_core() else "wall"}
        row |= {"dense_ms": float(np.median(dense)), "frozen_ms": float(np.median(frozen))}
        rows.append({**row, "time_ratio": float(np.median(ratios)), "time_ratio_range": [ratios[0], ratios[-1]]})
    return rows


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every network at every batch size; prints each row and rewrites the JSON file after it."""
    flags = parse(arguments)
    runtime.limit_threads(flags.threads)
    runtime.setup()
    from fdjax.frozen import load
    from fdjax.frozen.bench import onnxruntime_peer

    networks = {Path(folder).name: load(folder) for folder in flags.frozen}
    peer, report = onnxruntime_peer(flags.threads), contest.new_report(flags)
    report["settings"]["frozen"] = list(networks)
    print("  ".join(f"{column:>12}" for column in COLUMNS))
    for name, network in networks.items():
        for batch in flags.batch:
            for row in measure(name, network, batch, flags, peer):
                cells = [f"{row[key]:.3f}" if isinstance(row[key], float) else str(row[key]) for key in COLUMNS]
                print("  ".join(f"{cell:>12}" for cell in cells), flush=True)
                report["rows"].append(row)
            write_report(flags.json, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
