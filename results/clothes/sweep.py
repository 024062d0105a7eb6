"""A MobileNetV2 with weights of ImageNet, fine-tuned on photographs of clothes, pruned in the paper's blocks.

    export CLOTHES=DIR IMPORTED=DIR
    python -m fdjax sweep --config results/clothes/sweep.py --workdir runs/clothes

CLOTHES is a folder of pictures with train/, validation/ and test/; IMPORTED holds the imported network for each size of
the pictures, in the folders 160 and 192 (README.md). `SIDES="160"` in the environment makes those sizes only. Every run
goes on where it was interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fdjax.experiments.sweep import Sweep, SweepRun

# The networks' keys in ../table.toml with their titles in pictures.
TABLES = {"clothes160": "160 pixels, blocks of 2", "clothes192": "192 pixels, blocks of 3"}
CONFIG, SEED = "configs/finetune.py", 0
LEARN_EPOCHS, REFINE_EPOCHS, TARGET = 2, 6, 0.5
IMPORTED = Path(os.environ.get("IMPORTED", "imported")).resolve()
# Side of the pictures -> the blocks. The paper has 2x2 for 224 pixels, with one block for each map of 7x7, and 3x3 for
# 192 pixels. Of 160 pixels the last maps have 5x5.
BLOCKS: Mapping[int, Mapping[str, Any]] = {
    160: {"learn.block": 2, "learn.block_by_map": ((5, 5),)},
    192: {"learn.block": 3},
}
ALL = {"data.path": os.environ.get("CLOTHES", "clothing"), "seed": SEED, "checkpoint.time": False}
PRUNED = {
    "phases": ("learn", "refine"),
    "learn.epochs": LEARN_EPOCHS,
    "refine.epochs": REFINE_EPOCHS,
    "learn.target_macs": TARGET,
    "learn.group_multiple": 8,
    "learn.gate": "macs",
    "learn.sharpen": 0.3,
}
MASKS: Mapping[str, Mapping[str, Any]] = {
    "channels": {"learn.levels": "0,N"},
    "tied": {"learn.levels": "0,1,N"},
    "paper": {"learn.tied": False, "learn.sides": "both", "learn.levels": "all"},
}


def dense_of(name: str) -> str:
    """Returns the name of the dense run that a run is compared with: channels160_seed0 -> dense160_seed0."""
    kind, _, seed = name.rpartition("_")
    return f"dense{kind[-3:]}_{seed}"


def of_side(side: int) -> Iterator[SweepRun]:
    """Yields the rows of a size of the pictures."""
    own = {"data.image_size": side, **BLOCKS[side]}
    dense = f"dense{side}_seed{SEED}"
    yield SweepRun(name=dense, settings={**own, "phases": ("pretrain",)}, init=str(IMPORTED / str(side)))
    longer = {"phases": ("refine",), "refine.epochs": LEARN_EPOCHS + REFINE_EPOCHS}
    for name, settings in {"control": longer, **{name: {**PRUNED, **masks} for name, masks in MASKS.items()}}.items():
        yield SweepRun(name=f"{name}{side}_seed{SEED}", settings={**own, **settings}, init=dense)


def get_sweep() -> Sweep:
    """Returns the runs of the sizes in the environment's SIDES, or of both."""
    sides = [int(side) for side in os.environ.get("SIDES", "").split()] or [*BLOCKS]
    return Sweep(config=f"../../{CONFIG}", settings=ALL, runs=[run for side in sides for run in of_side(side)])
