"""What averaging the weights of a run's last epochs gives, and what batch norm measured anew does alone.

    python results/cifar10_lossless/averaged.py --checkpoints FOLDER --data DIR --json FILE

FOLDER holds the run's checkpoints at the ends of its last epochs (a run keeps them with --checkpoint.keep 10). Batch
norm is measured on 4,096 training images in batches of 64: plain ones, and augmented ones as in training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from fdjax import runtime
from fdjax.checkpoint import Checkpoints
from fdjax.checkpoints.calibrate import training_sample
from fdjax.checkpoints.statistics import make_statistics
from fdjax.data import augment, training_statistics
from fdjax.training.devices import Devices
from fdjax.training.evaluate import make_evaluator
from fdjax.training.restore import load_restored_data, restore

IMAGES, AVERAGED = 4096, (2, 4, 8)


def main() -> None:
    """Prints top-1 on the test images for each, and writes it."""
    runtime.setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--json", type=Path, required=True)
    flags = parser.parse_args()
    checkpoints = Checkpoints(flags.checkpoints)
    last = restore(checkpoints, checkpoints.steps()[-1])
    ends = [step for step in checkpoints.steps() if (step - last.phase.start) % last.phase.steps_per_epoch == 0]
    data, dataset = last.config.data, load_restored_data(last, flags.data)
    plain, _ = training_sample(last.config, dataset, IMAGES)
    fill = np.array(training_statistics(dataset, last.config.seed)[0], np.float32)

    @jax.jit
    def augmented(images: Any) -> Any:
        made = augment(jax.random.key(1), images, data.crop_padding, data.flip, cutout_size=data.cutout, fill=fill)
        return jnp.clip(jnp.round(made.astype(jnp.float32)), 0, 255).astype(jnp.uint8)

    network, variables = last.evaluation()
    evaluate = make_evaluator(network, last.graph, Devices())
    measure = make_statistics(dataclasses.replace(network, batch_norm_momentum=0.0), last.graph)
    found = []

    def add(weights: str, statistics: str, **collections: Any) -> None:
        top1 = evaluate({**variables, **collections}, dataset.test_images, dataset.test_labels)["top1"]
        found.append({"weights": weights, "batch_norm": statistics, "top1": top1})
        print(json.dumps(found[-1]), flush=True)

    pictures = np.asarray(augmented(jnp.asarray(plain)))
    add("last", "as trained")
    add("last", "plain images", batch_stats=measure(variables, plain))
    add("last", "augmented images", batch_stats=measure(variables, pictures))
    for count in AVERAGED:
        weights = [restore(checkpoints, step).evaluation()[1]["params"] for step in ends[-count:]]
        mean = jax.tree.map(lambda *leaves: np.mean(np.stack(leaves), axis=0, dtype=np.float64), *weights)
        mean = jax.tree.map(lambda leaf: leaf.astype(np.float32), mean)
        statistics = measure({**variables, "params": mean}, pictures)
        add(f"mean of the last {count} epochs", "augmented images", params=mean, batch_stats=statistics)
    flags.json.write_text(json.dumps({"phase": last.phase.name, "steps": ends, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
