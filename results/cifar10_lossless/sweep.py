"""The paper's CIFAR-10 network at width 0.5, lossless data: every kind of masks beside a control of equal length.

    CIFAR10=DIR python -m fdjax sweep --config results/cifar10_lossless/sweep.py --workdir runs/cifar10_lossless

DIR is a folder of pictures with train/ and test/. `SEEDS="0"` in the environment makes those seeds only. Runs are in
the order of their importance, and every one goes on where it was interrupted. ../run_study.py makes these and the
random rows.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any

from fdjax.experiments.sweep import Sweep, SweepRun

# The study's key in ../table.toml with its title in pictures, and its config.
TABLES, CONFIG = {"half_width": "MobileNetV2 0.5, CIFAR-10"}, "configs/cifar10_mobilenetv2.py"
LEARN_EPOCHS, REFINE_EPOCHS = 2, 8
MAC_TARGETS = (0.5, 0.33)
TIME_TARGET, ENGINES = 0.6, ("native", "onnxruntime")
# Seed -> the seed of the dense network that it starts from. A second dense network takes as long as all rows of a seed:
# seed 1 has other masks and another order of images, from the same dense network.
DENSE_OF = {0: 0, 1: 0}

ALL = {
    "data.name": "folder",
    "data.path": os.environ.get("CIFAR10", "data/cifar10"),
    "data.cutout": 8,
    "model.width": 0.5,
    "checkpoint.every_epochs": 1,
    "checkpoint.evaluate_every_epochs": 4,
    "checkpoint.time": False,
}
DENSE = {
    "phases": ("pretrain",),
    "pretrain.epochs": 40,
    "pretrain.label_smoothing": 0.1,
    "pretrain.warmup_epochs": 1,
    "pretrain.weight_decay": 5e-4,
}
# The rate is the config's, half of the dense network's peak. Warm-up is for the paper's masks, whose refinement at the
# full rate from its first step was unstable in ../cifar10_transfer. The control has these too, and as many epochs as a
# pruned network's two phases.
REFINE = {"refine.label_smoothing": 0.1, "refine.weight_decay": 5e-4, "refine.warmup_epochs": 1}
PRUNED = {
    **REFINE,
    "phases": ("learn", "refine"),
    "learn.epochs": LEARN_EPOCHS,
    "refine.epochs": REFINE_EPOCHS,
    "learn.optimizer": "adam",
    "learn.learning_rate": 0.04,
    "learn.approach": "aim",
    "learn.sharpen": 0.3,
    "learn.block": 2,
    "learn.penalty": "macs",
    "learn.group_multiple": 8,
}
TRIED: Mapping[str, Mapping[str, Any]] = {"distilled": {"distill.weight": 0.5}}
MASKS: Mapping[str, Mapping[str, Any]] = {
    "channels": {"learn.tied": True, "learn.levels": "0,N"},
    "tied": {"learn.tied": True, "learn.levels": "0,1,N"},
    # Blocks of 4, as in the paper.
    "paper": {"learn.tied": False, "learn.sides": "both", "learn.levels": "all", "learn.block": 4},
}


def dense_of(name: str) -> str:
    """Returns the name of the dense run that a run is compared with."""
    return f"dense_seed{DENSE_OF[int(name[-1])]}"


def of_seed(seed: int) -> Iterator[SweepRun]:
    """Yields the rows of a seed, the most important ones first."""
    dense = f"dense_seed{DENSE_OF[seed]}"
    if DENSE_OF[seed] == seed:
        yield SweepRun(name=dense, settings={**DENSE, "seed": seed})

    def run(name: str, *settings: Mapping[str, Any]) -> SweepRun:
        merged = {key: value for part in settings for key, value in part.items()}
        return SweepRun(name=f"{name}_seed{seed}", settings={**merged, "seed": seed}, init=dense)

    yield run("control", REFINE, {"phases": ("refine",), "refine.epochs": LEARN_EPOCHS + REFINE_EPOCHS})
    for target in MAC_TARGETS:
        for name, masks in MASKS.items():
            yield run(f"{name}_{target}", PRUNED, masks, {"learn.target_macs": target})
    # What might help, each alone: refined from the same learned masks as those of channels_0.5, with another setting.
    half = {**PRUNED, **MASKS["channels"], "learn.target_macs": MAC_TARGETS[0], "seed": seed}
    learned = f"learn_channels_{MAC_TARGETS[0]}_seed{seed}"
    yield SweepRun(name=learned, settings={**half, "phases": ("learn",)}, init=dense)
    for name, setting in TRIED.items():
        settings = {**half, "phases": ("refine",), **setting}
        yield SweepRun(name=f"{name}_{MAC_TARGETS[0]}_seed{seed}", settings=settings, init=learned)
    for engine in ENGINES:
        # A target of time needs masks whose time can be predicted, which the paper's are not.
        for name in ("channels", "tied"):
            time = {"learn.target_macs": None, "learn.target_time": TIME_TARGET, "learn.engine": engine}
            yield run(f"{name}_{engine}_{TIME_TARGET}", PRUNED, MASKS[name], time, {"learn.engine_batch": 1})


def get_sweep() -> Sweep:
    """Returns the runs of the seeds in the environment's SEEDS, or of all."""
    seeds = [int(seed) for seed in os.environ.get("SEEDS", "").split()] or [*DENSE_OF]
    # The dense networks of other seeds, from which rows start, are among the runs too.
    others = sorted({DENSE_OF[seed] for seed in seeds} - {*seeds})
    runs = [run for seed in others for run in itertools.islice(of_seed(seed), 1)]
    runs += [run for seed in seeds for run in of_seed(seed)]
    return Sweep(config=f"../../{CONFIG}", settings=ALL, runs=runs)
