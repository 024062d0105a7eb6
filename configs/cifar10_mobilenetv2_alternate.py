"""configs/cifar10_mobilenetv2.py by the scheme of appendix A.1: masks and weights are learned in turn, epoch by epoch.

    python train.py --config configs/cifar10_mobilenetv2_alternate.py --workdir runs/alternate --init runs/cifar10

Batch norm is frozen in the first four fifths of the alternation and free in the last. A short refinement follows,
because masks are rounded only after the alternation. After pretraining, weights are trained for as many epochs as in
learn-then-refine.

This config has not been measured yet.
"""

import dataclasses
from pathlib import Path

from fdjax.config import AlternateConfig, Config, load_config


def get_config() -> Config:
    base = load_config(str(Path(__file__).with_name("cifar10_mobilenetv2.py")))
    return dataclasses.replace(
        base,
        phases=("pretrain", "alternate", "refine"),
        alternate=AlternateConfig(epochs=100, learning_rate=0.01, schedule="cosine", free_batchnorm_fraction=0.2),
        refine=dataclasses.replace(base.refine, epochs=50),
    )
