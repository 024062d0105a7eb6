"""Measures learned masks at their rounding: with batch norm as trained, and corrected as `fdjax prune` corrects it.

    python results/recalibrated/rounded.py --runs runs/cifar10_transfer --data DIR --json rounded.json

RUNS holds the dense networks and the pruned runs of results/cifar10_transfer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parent.parent.parent))

from fdjax import runtime

IMAGES, SEEDS = 512, (0, 1)
KINDS = {"channels": "whole channels", "tied": "tied 0, 1, N", "paper": "the paper's"}


def measure(runs: Path, data: str, kind: str, seed: int) -> dict[str, object]:
    """Rounds the soft masks that a run has learned, on its dense network, and evaluates on all test images."""
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import unflatten_dict

    from fdjax.checkpoints.calibrate import training_sample
    from fdjax.checkpoints.statistics import corrected_statistics, make_statistics
    from fdjax.config import Config
    from fdjax.training.build import build_network, collection_of, hard_masks, hard_network
    from fdjax.training.devices import Devices
    from fdjax.training.evaluate import make_evaluator
    from fdjax.training.own_network import zoo_network
    from fdjax.training.restore import load_restored_data, open_checkpoint

    run = runs / f"{kind}_0.5_seed{seed}"
    config = Config.from_dict(json.loads((run / "config.json").read_text()))
    dense = open_checkpoint(str(runs / f"dense_seed{seed}"))[2]
    network, graph = build_network(config, dense.graph.input_shape, dense.graph.num_classes)
    graph = dataclasses.replace(graph, input_mean=dense.graph.input_mean, input_std=dense.graph.input_std)
    soft = {path: jnp.asarray(mask) for path, mask in np.load(run / "soft_masks.npz").items()}
    hard = hard_masks(config.learn, graph, unflatten_dict(soft, sep="/"), to_target=True)
    collections = {
        **dense.state.variables(),
        "fcmask": jax.tree.map(jnp.asarray, collection_of(graph, hard.counts)),
    }
    dataset = load_restored_data(dense, data)
    images, _ = training_sample(config, dataset, IMAGES)

    plain = dataclasses.replace(zoo_network(network, "rounded.py"), mode="off")
    rounded = zoo_network(hard_network(network, graph, hard.counts), "rounded.py")
    before, after = (
        make_statistics(dataclasses.replace(form, batch_norm_momentum=0.0), graph)(collections, images)
        for form in (plain, rounded)
    )
    corrected = corrected_statistics(collections["batch_stats"], before, after)
    evaluate = make_evaluator(rounded, graph, Devices())
    top1 = {
        name: evaluate({**collections, "batch_stats": statistics}, dataset.test_images, dataset.test_labels)["top1"]
        for name, statistics in (("as_trained", collections["batch_stats"]), ("corrected", corrected))
    }
    phases = {phase["name"]: phase for phase in json.loads((run / "summary.json").read_text())["phases"]}
    soft_top1 = phases["learn"]["soft_top1"]
    return {"masks": KINDS[kind], "seed": seed, "macs": hard.macs.ratio, "soft": soft_top1, **top1}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--json", type=Path, required=True)
    parsed = parser.parse_args()
    rows = []
    for seed in SEEDS:
        for kind in KINDS:
            rows.append(measure(parsed.runs, parsed.data, kind, seed))
            print(json.dumps(rows[-1]), flush=True)
            parsed.json.write_text(json.dumps({"images": IMAGES, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    runtime.setup()
    main()
