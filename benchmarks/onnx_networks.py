"""What removing half of the MACs would give networks of ONNX files: reads, masks, freezes and times each.

    python benchmarks/onnx_networks.py FILE.onnx [...] --size 224 --json FILE.json

Masks are of whole channels in multiples of 8 and drawn by a seed, so nothing has to be trained: times do not depend on
which channels are left. For each file it prints the MACs, the largest difference of the network here from the file in
ONNX Runtime, that of the pruned frozen network (in XLA, in ONNX Runtime) from the masked one, both over the largest
output, and the times of one image in ONNX Runtime on one thread: of the file itself, and over it of the frozen dense
network and of the pruned one (medians of alternating runs; processor time in a process of one core, as under `taskset
-c 0`, else by the wall clock).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
import onnx
import onnxruntime

import fdjax
from fdjax.commands.output_files import write_report
from fdjax.errors import reports_user_errors
from fdjax.frozen.clock import clock, interleaved, quartiles
from fdjax.frozen.onnx_model import onnxruntime_session, to_onnx
from fdjax.onnx import read_onnx_graph
from fdjax.provenance import commit, cpu_model

GROUP = 8
SECONDS = 5.0  # of timing for a file


def pruned_counts(graph: Any, target: float, seed: int) -> Mapping[str, np.ndarray]:
    """Draws kept counts of whole channels that leave `target` of the MACs."""
    rng = np.random.default_rng(seed)
    drawn = {
        path: rng.uniform(0, 1, np.shape(mask)).astype(np.float32) for path, mask in fdjax.init_fcmask(graph).items()
    }
    return fdjax.harden(graph, drawn, target_macs=target, group_multiple=GROUP).counts


def difference(found: Any, wanted: Any) -> float:
    """Returns the largest difference over the largest wanted number."""
    return float(np.abs(np.asarray(found) - np.asarray(wanted)).max() / np.abs(np.asarray(wanted)).max())


def measure(file: Path, size: int, target: float, seed: int) -> dict[str, Any]:
    """Reads, prunes, freezes and times the network of a file; returns a row."""
    read = read_onnx_graph(file)
    apply, variables = fdjax.from_onnx(file)
    rows, columns = (side or size for side in read.size)
    images = np.random.default_rng(seed).uniform(-1, 1, (1, rows, columns, read.channels or 3)).astype(np.float32)
    theirs = images if read.channels_last else images.transpose(0, 3, 1, 2)
    itself = onnxruntime_session(onnx.load(str(file)), 1)
    start = time.process_time()
    graph = fdjax.with_masks(fdjax.trace(apply, variables, images))
    traced = time.process_time() - start
    counts = pruned_counts(graph, target, seed)
    pruned = fdjax.freeze(graph, variables, counts)
    dense = fdjax.freeze(graph, variables, graph.full_counts())
    sessions = {
        name: onnxruntime_session(to_onnx(of.frozen.program, of.frozen.arrays), 1)
        for name, of in (("dense", dense), ("pruned", pruned))
    }
    wanted = jax.jit(fdjax.masked(apply, graph))(counts, variables, images)
    differences = {
        "dense_difference": difference(jax.jit(apply)(variables, images), itself(theirs)),
        "frozen_difference": difference(pruned(images), wanted),
        "onnx_difference": difference(sessions["pruned"](images), wanted),
    }
    runs = {"file": lambda: itself(theirs), **{name: lambda run=run: run(images) for name, run in sessions.items()}}
    times = {name: found.own for name, found in interleaved(runs, seconds=SECONDS).items()}
    over = {name: times[name] / times["file"] for name in sessions}
    return {
        "network": file.stem,
        "size": [rows, columns],
        "macs": graph.dense_macs,
        "trace_seconds": traced,
        "macs_ratio": fdjax.count(graph, counts).ratio,
        **differences,
        "file_ms": float(np.median(times["file"])),
        **{f"{name}_time_ratio": float(np.median(ratios)) for name, ratios in over.items()},
        **{f"{name}_time_ratio_quartiles": quartiles(ratios) for name, ratios in over.items()},
    }


@reports_user_errors
def main() -> int:
    """Prints a row for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="ONNX files")
    parser.add_argument("--size", type=int, default=224, help="side of images in pixels, where the file fixes none")
    parser.add_argument("--target-macs", type=float, default=0.5, help="share of the MACs that is left")
    parser.add_argument("--seed", type=int, default=0, help="seed of masks and images")
    parser.add_argument("--json", help="file to write the rows to")
    flags = parser.parse_args()
    found = []
    print("| network, pixels | MACs | to ONNX Runtime | pruned | frozen: XLA, ONNX | file | dense | pruned |")
    print("|---|---|---|---|---|---|---|---|")
    for file in flags.files:
        try:
            row = measure(file, flags.size, flags.target_macs, flags.seed)
        except ValueError as error:  # What cannot be read or frozen, says why.
            row = {"network": file.stem, "failed": str(error)}
            print(f"| {file.stem} | {error} |", flush=True)
        else:
            print(
                f"| {row['network']}, {row['size'][0]} | {row['macs'] / 1e6:.1f} M | {row['dense_difference']:.0e} | "
                f"{row['macs_ratio']:.2f}x | {row['frozen_difference']:.0e}, {row['onnx_difference']:.0e} | "
                f"{row['file_ms']:.2f} ms | {row['dense_time_ratio']:.2f}x | {row['pruned_time_ratio']:.2f}x |",
                flush=True,
            )
        found.append(row)
    settings = {"target_macs": flags.target_macs, "group_multiple": GROUP, "seed": flags.seed, "clock": clock()}
    made_by = {"commit": commit(), "cpu": cpu_model(), "onnxruntime": onnxruntime.__version__}
    write_report(flags.json, {**settings, **made_by, "rows": found})
    return int(any("failed" in row for row in found))


if __name__ == "__main__":
    sys.exit(main())
