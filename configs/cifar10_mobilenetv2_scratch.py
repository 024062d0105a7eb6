"""configs/cifar10_mobilenetv2.py by the paper's ImageNet scheme: learned masks, then new weights trained with them.

    python train.py --config configs/cifar10_mobilenetv2_scratch.py --workdir runs/scratch --init runs/cifar10

The weights are trained as in pretraining, from another seed.

This config has not been measured yet.
"""

import dataclasses
from pathlib import Path

from fdjax.config import Config, load_config


def get_config() -> Config:
    base = load_config(str(Path(__file__).with_name("cifar10_mobilenetv2.py")))
    return dataclasses.replace(base, phases=("pretrain", "learn", "scratch"), scratch=base.pretrain)
