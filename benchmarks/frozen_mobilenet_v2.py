"""Times pruned, frozen MobileNetV2s beside the dense network and ONNX Runtime, or on engines (docs/benchmarks.md).

python benchmarks/frozen_mobilenet_v2.py --masks tied paper --targets 0.8 0.5 --batch 1 8 --threads 1 --json FILE
python benchmarks/frozen_mobilenet_v2.py --engine native xla onnxruntime openvino --masks paper=0.8 tied=0.44 \\
    channels=0.44 --batch 1 8 --threads 1 --json FILE

With --engine the dense and the pruned networks are timed in alternation on all engines (docs/native.md).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import _contest as contest

from fdjax import runtime
from fdjax.commands.output_files import write_report
from fdjax.errors import UserError, reports_user_errors

if TYPE_CHECKING:
    from fdjax.frozen import Frozen, Stopwatch
    from fdjax.frozen.bench import Peer
    from fdjax.graph.masks import MaskedGraph

# Name -> variant, side in pixels, channels, classes, block, blocks by map (the paper's, if it has the network).
NETWORKS: dict[str, tuple[str, int, int, int, int, dict[int, int]]] = {
    "mobilenet_v2_192": ("mobilenetv2", 192, 3, 1000, 3, {}),
    "mobilenet_v2_224": ("mobilenetv2", 224, 3, 1000, 2, {7: 7}),
    "mobilenet_v2_cifar10": ("mobilenetv2_cifar10", 32, 3, 10, 4, {}),
    "mobilenet_v2_cifar100": ("mobilenetv2_cifar100", 32, 3, 100, 4, {}),
    "mobilenet_v2_small": ("mobilenetv2_small", 28, 1, 10, 2, {7: 7}),
}
MASKS = ("tied", "paper", "channels")
GATES = ("time", "macs")


def _form(text: str) -> tuple[str, float | None]:
    """Parses masks, and their own share of the MACs if there is one, such as "tied=0.44"."""
    masks, equals, target = text.partition("=")
    if masks not in MASKS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(MASKS)}, alone or as in tied=0.44")
    return masks, contest.share(target) if equals else None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the flags; every combination of their values is measured."""
    parser = contest.Parser("Times frozen networks with random masks beside the dense network.")

    def several(flag: str, help_text: str, default: Sequence, **accepted) -> None:
        parser.add_argument(flag, nargs="+", default=list(default), help=help_text, **accepted)

    several("--network", "networks", ["mobilenet_v2_192"], choices=tuple(NETWORKS))
    masks = "masks: tied at levels 0, 1 and N, the paper's, or whole channels; tied=0.44 sets its own share"
    several("--masks", masks, [("tied", None), ("paper", None)], type=_form, metavar="MASKS")
    several("--targets", "shares of the MACs by the paper's count (paper_ratio)", [0.8, 0.5], type=contest.share)
    several("--batch", "batch sizes in images", [1, 8], type=contest.integer(1))
    parser.add_argument("--dtype", choices=contest.DTYPES, default="float32", help="type of weights and activations")
    parser.add_argument("--block", type=contest.integer(1, 16), help="block size K of every layer (None: the paper's)")
    gate = "layers to release: those that are slower pruned, or no cheaper (default: time; with --engine: macs)"
    parser.add_argument("--gate", choices=GATES, help=gate)
    engines = "engines to time in alternation: native, xla, onnxruntime, openvino"
    parser.add_argument("--engine", nargs="+", default=[], help=engines)
    parser.add_argument("--layers", action="store_true", help="also time each run and layer alone")
    parser.add_argument("--no-onnxruntime", dest="peer", action="store_false", help="leave ONNX Runtime out")
    parser.add_argument("--picture", type=contest.output_file, metavar="FILE", help="plot of time against MACs to draw")
    contest.add_shared_flags(parser)
    flags = parser.parse_args(arguments)
    if flags.engine and (flags.gate == "time" or flags.layers or flags.picture or flags.dtype != "float32"):
        parser.error("--engine takes --gate macs and float32 only, and neither --layers nor --picture")
    flags.gate = flags.gate or ("macs" if flags.engine else "time")
    flags.forms = [
        (masks, share) for masks, own in flags.masks for share in ([own] if own is not None else flags.targets)
    ]
    return flags


def build_graph(name: str, tied: bool, block: int | None) -> MaskedGraph:
    """Makes the graph of a network at width 1.0."""
    from fdjax.config import LearnConfig
    from fdjax.training.network import trace_network
    from fdjax.zoo import MobileNet

    variant, side, channels, classes, own_block, by_map = NETWORKS[name]
    if block is None:
        block = own_block
    else:
        by_map = {}
    try:
        learn = LearnConfig(block=block, block_by_map=tuple(by_map.items()), tied=tied)
        network = MobileNet(variant, classes, 1.0)
        return trace_network(network, (side, side, channels), learn, count_classifier=classes == 1000)
    except ValueError as error:
        raise UserError(str(error)) from error


def freeze_seeded(
    graph: MaskedGraph, masks: str, target: float, seed: int, gate: str, stopwatch: Stopwatch
) -> tuple[Frozen, dict[str, Any]]:
    """Freezes a network with random masks; forms are chosen by measured time. Returns it, and facts for a row."""
    from _seeded_masks import seeded_masks

    from fdjax.frozen import freeze, release_slower
    from fdjax.frozen.bench import seeded_variables

    variables, slower = seeded_variables(graph, seed), set[str]()
    while True:
        found = seeded_masks(graph, masks, target, seed, slower)
        newly = release_slower(graph, variables, found.counts, stopwatch)[1] if gate == "time" else []
        if slower.issuperset(newly):
            break
        slower.update(newly)
    facts = {
        "masks": masks,
        "target": target,
        "mac_ratio": found.macs.ratio,
        "paper_ratio": found.macs.paper_ratio,
        "gate": gate,
        "released": list(found.released),
        "released_by_time": sorted(slower),
    }
    return freeze(graph, variables, found.counts, stopwatch.choose), facts


def measure(name: str, masks: str, target: float, batch: int, flags: argparse.Namespace, peer: Peer | None):
    """Measures a row, and its runs and layers alone (empty without --layers)."""
    from fdjax.frozen import Stopwatch
    from fdjax.frozen.bench import bench, bench_layers, dense_network

    graph = build_graph(name, masks != "paper", flags.block)
    stopwatch = Stopwatch(batch, runtime.times_cache_dir())
    frozen, facts = freeze_seeded(graph, masks, target, flags.seed, flags.gate, stopwatch)
    dense = dense_network(graph, flags.seed)
    facts = {"network": name, "threads": flags.threads, **facts}
    row = bench(frozen, dense, facts, batch=batch, dtype=flags.dtype, rounds=flags.rounds, peer=peer)
    return row, bench_layers(frozen, dense, batch=batch) if flags.layers else []


def measure_engines(flags: argparse.Namespace) -> None:
    """Prints a table for each network and batch size, and rewrites the JSON file after it."""
    from _seeded_masks import seeded_masks

    from fdjax.frozen import freeze
    from fdjax.frozen.bench import dense_network, seeded_variables
    from fdjax.frozen.engine_bench import bench_engines
    from fdjax.frozen.engines import check_engines
    from fdjax.reports import engines_table

    check_engines(flags.engine)
    report = contest.new_report(flags)
    report["masks"] = {}
    for name in flags.network:
        networks = {"dense": dense_network(build_graph(name, False, flags.block), flags.seed)}
        for masks, target in flags.forms:
            graph = build_graph(name, masks != "paper", flags.block)
            found = seeded_masks(graph, masks, target, flags.seed)
            networks[f"{masks} {target}"] = freeze(graph, seeded_variables(graph, flags.seed), found.counts)
            ratios = {"ratio": found.macs.ratio, "paper_ratio": found.macs.paper_ratio}
            report["masks"].setdefault(name, {})[f"{masks} {target}"] = ratios
        for batch in flags.batch:
            rows = bench_engines(networks, flags.engine, batch=batch, threads=flags.threads, rounds=flags.rounds)
            print(engines_table(rows), flush=True)
            report["rows"] += [{"network": name, "threads": flags.threads, **row} for row in rows]
            write_report(flags.json, report)


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every row; prints each and rewrites the JSON file after it."""
    flags = parse(arguments)
    runtime.limit_threads(flags.threads)
    runtime.setup()
    if flags.engine:
        measure_engines(flags)
        return 0
    from fdjax.frozen.bench import onnxruntime_peer
    from fdjax.reports import bench_table, plot_bench

    peer = onnxruntime_peer(flags.threads) if flags.peer and flags.dtype == "float32" else None
    report = contest.new_report(flags)
    report["layers"] = []
    for name, (masks, target), batch in itertools.product(flags.network, flags.forms, flags.batch):
        row, layers = measure(name, masks, target, batch, flags, peer)
        print(bench_table({"rows": [row], "layers": {str(batch): layers} if layers else {}}), flush=True)
        report["rows"].append(row)
        if layers:
            which = {"network": name, "masks": masks, "target": target, "batch": batch}
            report["layers"].append({**which, "blocks": layers})
        write_report(flags.json, report)
    if flags.picture:
        plot_bench(report["rows"], Path(flags.picture))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
