"""The paper's CIFAR-10 network: MobileNetV2 1.0, 4x4 blocks, to half of its MACs (Table 1: 2x fewer MACs, +0.07%).

    python train.py --config configs/cifar10_mobilenetv2.py --workdir runs/cifar10
    python train.py --config configs/cifar10_mobilenetv2.py --workdir runs/cifar10 --data.name folder --data.path DIR

Data: the TFDS set `cifar10` prepared as array_record, or a folder of images. The network has 89.01 M MACs dense, and
117.98 M with full transforms. The paper's dense network reaches 94.2%.

Hyperparameters: pretraining follows the recipe that is known to reach 94% with this network: SGD with Nesterov momentum
0.9, cosine from 0.1 over 200 epochs, batch 128, weight decay 4e-5 (with 5e-4, 90 to 91% are reported), random crop
(padding 4) and flip. The paper gives no settings for masks and refinement; those here are ours.

Expected cost: 350 epochs of 390 steps at 89 M MACs per image. A pretraining step took 2.5 s on two CPU cores, which
makes 54 hours for pretraining and an estimated five days in total. Neither the time on an accelerator nor the accuracy
of this config has been measured yet.
"""

from fdjax.config import Config, DataConfig, LearnConfig, ModelConfig, WeightPhaseConfig


def get_config() -> Config:
    return Config(
        phases=("pretrain", "learn", "refine"),
        data=DataConfig(name="cifar10", batch_size=128, crop_padding=4, flip=True),
        model=ModelConfig(name="mobilenetv2_cifar10", width=1.0),
        pretrain=WeightPhaseConfig(epochs=200, learning_rate=0.1, schedule="cosine", weight_decay=4e-5),
        learn=LearnConfig(epochs=50, block=4, sides="both", penalty="fcmask", target_macs=0.5),
        refine=WeightPhaseConfig(epochs=100, learning_rate=0.05, schedule="cosine", weight_decay=4e-5),
    )
