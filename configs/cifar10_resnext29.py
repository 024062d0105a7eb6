"""The paper's second CIFAR-10 network: ResNeXt-29 32x4d, 4x4 blocks, to 1/2.4 of its MACs (Table 1: -0.13%).

    python train.py --config configs/cifar10_resnext29.py --workdir runs/resnext29

Data: the TFDS set `cifar10` prepared as array_record, or a folder of images. The network has 772.47 M MACs dense, and
843.25 M with full transforms. The paper's dense network reaches 95.75%. `--model.cardinality 8` makes the small 8x4d.

Hyperparameters: the usual recipe for this network is SGD with Nesterov momentum 0.9, cosine from 0.1 over 200 epochs,
batch 128, weight decay 5e-4, random crop (padding 4) and flip. The paper gives no settings for masks and refinement;
those here are ours.

Expected cost: nine times the MACs of configs/cifar10_mobilenetv2.py, which needs an accelerator. This config has not
been measured yet.
"""

from fdjax.config import Config, DataConfig, LearnConfig, ModelConfig, WeightPhaseConfig


def get_config() -> Config:
    return Config(
        phases=("pretrain", "learn", "refine"),
        data=DataConfig(name="cifar10", batch_size=128, crop_padding=4, flip=True),
        model=ModelConfig(name="resnext29"),
        pretrain=WeightPhaseConfig(epochs=200, learning_rate=0.1, schedule="cosine", weight_decay=5e-4),
        learn=LearnConfig(epochs=50, block=4, sides="both", penalty="fcmask", target_macs=round(1 / 2.4, 4)),
        refine=WeightPhaseConfig(epochs=100, learning_rate=0.05, schedule="cosine", weight_decay=5e-4),
    )
