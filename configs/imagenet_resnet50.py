"""ResNet-50 on ImageNet, pruned from trained weights: 4x4 blocks, 2x2 on the 14x14 and 7x7 on the 7x7 maps, to half.

    fdjax import --config configs/imagenet_resnet50.py --format torchvision --weights FILE --out runs/resnet50-dense
    python train.py --config configs/imagenet_resnet50.py --workdir runs/resnet50 --init runs/resnet50-dense

Data: the TFDS set `imagenet2012` prepared as array_record, or a folder of images. The network has 4,089.18 M MACs
dense, classifier included. `--model.name resnext50_32x4d` on both lines replaces it with ResNeXt-50 (4,230.48 M).

Hyperparameters: ours. The penalty on masks is that of expected MACs, because the convolutions between the pointwise
layers become cheaper too. Refinement is SGD, cosine from 0.01 over 30 epochs.

Expected cost: 35 epochs of 5,004 steps at 4.1 G MACs per image, which needs accelerators. This config has not been
measured yet.
"""

import dataclasses
from pathlib import Path

from fdjax.config import Config, LearnConfig, WeightPhaseConfig, load_config


def get_config() -> Config:
    base = load_config(str(Path(__file__).with_name("imagenet_mobilenetv2_224.py")))
    return dataclasses.replace(
        base,
        phases=("learn", "refine"),
        model=dataclasses.replace(base.model, name="resnet50", padding="torch"),
        learn=LearnConfig(epochs=5, block=4, block_by_map=((14, 2), (7, 7)), penalty="macs", target_macs=0.5),
        refine=WeightPhaseConfig(epochs=30, learning_rate=0.01, schedule="cosine", weight_decay=1e-4),
    )
