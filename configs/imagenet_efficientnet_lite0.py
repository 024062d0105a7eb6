r"""EfficientNet-Lite0 on ImageNet, from imported weights to 0.7x: tied masks, levels 0, 1, N, 2x2 and 7x7 blocks.

    fdjax import --config configs/imagenet_efficientnet_lite0.py --format efficientnet_lite --weights FILE \
        --out runs/lite0-dense
    python train.py --config configs/imagenet_efficientnet_lite0.py --workdir runs/lite0 --init runs/lite0-dense

Without labels, on a folder of pictures, taught by the unpruned network alone:

    python train.py --config configs/imagenet_efficientnet_lite0.py --workdir runs/lite0 --init runs/lite0-dense \
        --data.unlabelled PICTURES --distill.weight 1

Data: the TFDS set `imagenet2012` prepared as array_record, or a folder of images; either way, the test set is
ImageNet's validation set. The network has 385.19 M MACs dense, classifier included. Its publishers report 74.8% dense.

Hyperparameters: ours. Masks are learned for 2 epochs; refinement is SGD, cosine from 0.01 over 20 epochs.

Expected cost: 22 epochs of 5,004 steps, which needs accelerators. This config has not been measured yet.
"""

import dataclasses
from pathlib import Path

from fdjax.config import Config, DistillConfig, LearnConfig, WeightPhaseConfig, load_config


def get_config() -> Config:
    base = load_config(str(Path(__file__).with_name("imagenet_mobilenetv2_224.py")))
    return dataclasses.replace(
        base,
        phases=("learn", "refine"),
        model=dataclasses.replace(base.model, name="efficientnet_lite0", batch_norm_epsilon=1e-3),
        learn=LearnConfig(
            epochs=2, block=2, block_by_map=((7, 7),), tied=True, levels="0,1,N", penalty="macs", target_macs=0.7
        ),
        refine=WeightPhaseConfig(epochs=20, learning_rate=0.01, schedule="cosine", weight_decay=4e-5),
        distill=DistillConfig(weight=0.5),
    )
