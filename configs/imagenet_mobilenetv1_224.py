"""MobileNetV1 1.0-224 on ImageNet, 2x2 blocks, 7x7 on the 7x7 maps, to half of its 568.74 M MACs.

    python train.py --config configs/imagenet_mobilenetv1_224.py --workdir runs/mobilenetv1

This is configs/imagenet_mobilenetv2_224.py with another network (published: 70.6% top-1, Howard et al. 2017). It has
not been measured yet.
"""

import dataclasses
from pathlib import Path

from fdjax.config import Config, load_config


def get_config() -> Config:
    base = load_config(str(Path(__file__).with_name("imagenet_mobilenetv2_224.py")))
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, name="mobilenetv1"),
        learn=dataclasses.replace(base.learn, target_macs=0.5),
    )
