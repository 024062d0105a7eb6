"""A MobileNetV2 with weights of ImageNet, trained on CIFAR-10 at 64 pixels, then pruned with every kind of masks.

    export CIFAR10=DIR IMPORTED=DIR
    python -m fdjax sweep --config results/cifar10_transfer/sweep.py --workdir runs/cifar10_transfer

CIFAR10 is a folder of pictures with train/ and test/, IMPORTED the imported network (README.md). `SEEDS="0"` in the
environment makes those seeds only. Runs are in the order of their importance, and every one goes on where it was
interrupted. ../run_study.py makes these and the random rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fdjax.experiments.sweep import Sweep, SweepRun

# The study's key in ../table.toml with its title in pictures, and its config.
TABLES, CONFIG = {"transfer": "MobileNetV2 1.0 at 64 pixels, CIFAR-10"}, "configs/finetune.py"
LEARN_EPOCHS, REFINE_EPOCHS = 1, 4
MAC_TARGETS = (0.5,)
SEEDS = (0, 1)
DENSE_OF = {seed: seed for seed in SEEDS}
IMPORTED = Path(os.environ.get("IMPORTED", "imported")).resolve()

ALL = {
    "data.path": os.environ.get("CIFAR10", "data/cifar10"),
    "data.image_size": 64,
    "data.validation": 0.1,
    "data.batch_size": 128,
    "learn.block": 2,
}
DENSE = {"phases": ("pretrain",), "pretrain.epochs": 4, "pretrain.learning_rate": 0.08, "pretrain.body_rate": 0.5}
# The control has these too, and as many epochs as a pruned network's two phases.
REFINE = {"refine.learning_rate": 0.03}
PRUNED = {
    **REFINE,
    "phases": ("learn", "refine"),
    "learn.epochs": LEARN_EPOCHS,
    "refine.epochs": REFINE_EPOCHS,
    "learn.group_multiple": 8,
    "learn.gate": "macs",
    "learn.sharpen": 0.3,
}
MASKS: Mapping[str, Mapping[str, Any]] = {
    "channels": {"learn.levels": "0,N"},
    "tied": {"learn.levels": "0,1,N"},
    # Blocks of 4, as in the paper, but on the last maps, which have 2x2 pixels.
    "paper": {
        "learn.tied": False,
        "learn.sides": "both",
        "learn.levels": "all",
        "learn.block": 4,
        "learn.block_by_map": ((2, 2),),
    },
}


def dense_of(name: str) -> str:
    """Returns the name of the dense run that a run is compared with."""
    return f"dense_seed{DENSE_OF[int(name[-1])]}"


def of_seed(seed: int) -> Iterator[SweepRun]:
    """Yields the rows of a seed, the most important ones first."""
    dense = f"dense_seed{seed}"
    yield SweepRun(name=dense, settings={**DENSE, "seed": seed}, init=str(IMPORTED))

    def run(name: str, *settings: Mapping[str, Any]) -> SweepRun:
        merged = {key: value for part in settings for key, value in part.items()}
        return SweepRun(name=f"{name}_seed{seed}", settings={**merged, "seed": seed}, init=dense)

    yield run("control", REFINE, {"phases": ("refine",), "refine.epochs": LEARN_EPOCHS + REFINE_EPOCHS})
    for target in MAC_TARGETS:
        for name, masks in MASKS.items():
            yield run(f"{name}_{target}", PRUNED, masks, {"learn.target_macs": target})


def get_sweep() -> Sweep:
    """Returns the runs of the seeds in the environment's SEEDS, or of all."""
    seeds = [int(seed) for seed in os.environ.get("SEEDS", "").split()] or [*SEEDS]
    return Sweep(config=f"../../{CONFIG}", settings=ALL, runs=[run for seed in seeds for run in of_seed(seed)])
