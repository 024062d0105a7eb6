"""Time of MobileNetV2s with seeded masks in native code, beside XLA, ONNX Runtime and OpenVINO (docs/native.md).

python benchmarks/native.py --masks paper=0.8 tied=0.44 channels=0.44 --batch 1 8 --threads 1 --json FILE
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import _contest as contest
from frozen_mobilenet_v2 import NETWORKS, build_graph

from fdjax import runtime
from fdjax.commands.output_files import write_report
from fdjax.errors import UserError, reports_user_errors

_MASKS = ("paper=0.8", "tied=0.44", "channels=0.44")


def _masked(text: str) -> tuple[str, float]:
    """ "tied=0.44": masks, and the share of the MACs by the paper's count."""
    masks, _, target = text.partition("=")
    if masks not in ("tied", "paper", "channels"):
        raise UserError(f"--masks {text}: give tied, paper or channels, and a share, as in tied=0.44")
    return masks, contest.share(target)


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every batch size, printing its table as it comes; the JSON file grows with them."""
    parser = contest.Parser("Time of pruned MobileNetV2s in native code, beside other engines.")
    parser.add_argument("--network", default="mobilenet_v2_192", choices=tuple(NETWORKS))
    parser.add_argument(
        "--masks", nargs="+", default=list(_MASKS), help="masks=share by the paper's count, one or several"
    )
    parser.add_argument("--batch", nargs="+", type=contest.integer(1), default=[1, 8], help="images at once")
    parser.add_argument("--engine", nargs="+", default=["native", "xla", "onnxruntime", "openvino"], help="engines")
    contest.add_shared_flags(parser)
    flags = parser.parse_args(arguments)
    forms = [_masked(text) for text in flags.masks]
    runtime.limit_threads(flags.threads)
    runtime.setup()
    from _seeded_masks import seeded_masks

    from fdjax.frozen import freeze
    from fdjax.frozen.bench import dense_network, seeded_variables
    from fdjax.frozen.engine_bench import bench_engines
    from fdjax.frozen.engines import check_engines
    from fdjax.reports import engines_table

    check_engines(flags.engine)
    networks = {"dense": dense_network(build_graph(flags.network, False, None), flags.seed)}
    report = contest.new_report(flags)
    report["masks"] = {}
    for masks, target in forms:
        graph = build_graph(flags.network, masks != "paper", None)
        found = seeded_masks(graph, masks, target, flags.seed)
        networks[f"{masks} {target}"] = freeze(graph, seeded_variables(graph, flags.seed), found.counts)
        report["masks"][f"{masks} {target}"] = {"ratio": found.macs.ratio, "paper_ratio": found.macs.paper_ratio}
    for batch in flags.batch:
        rows = bench_engines(networks, flags.engine, batch=batch, threads=flags.threads, rounds=flags.rounds)
        print(engines_table(rows), flush=True)
        report["rows"] += [{"network": flags.network, "threads": flags.threads, **row} for row in rows]
        write_report(flags.json, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
