"""The network that the paper times: MobileNetV2 1.0-192, 3x3 blocks, to 0.80x (section 4: 22.1% faster, < 1% loss).

    python train.py --config configs/imagenet_mobilenetv2_192.py --workdir runs/imagenet192

This is configs/imagenet_mobilenetv2_224.py at 192 pixels. The network has 221.32 M MACs dense, and reaches 70.7% in the
paper. In fdjax, the masks that save time are tied masks at levels 0, 1, N (docs/freeze.md): `--learn.tied
--learn.levels 0,1,N`.

This config has not been measured yet.
"""

import dataclasses
from pathlib import Path

from fdjax.config import Config, LearnConfig, load_config


def get_config() -> Config:
    base = load_config(str(Path(__file__).with_name("imagenet_mobilenetv2_224.py")))
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, image_size=192),
        learn=LearnConfig(epochs=10, block=3, sides="both", penalty="fcmask", target_macs=0.8),
    )
