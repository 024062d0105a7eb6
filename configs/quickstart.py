"""Quick start: a small MobileNetV2 on the embedded Fashion-MNIST subset, pruned to half of its MACs.

    python train.py --config configs/quickstart.py --workdir runs/quickstart

The network is small enough for two CPU cores (5.03 M MACs) and wide enough for its size that transforms pay: 2x2 blocks
on the 14x14 maps, one 7x7 block on the 7x7 maps, as the paper does it on ImageNet's last stage.

Hyperparameters: SGD with Nesterov momentum 0.9, cosine, weight decay 4e-5, as in configs/cifar10_mobilenetv2.py, over
as few epochs as bring this network to its level on 10,000 images; masks as the paper describes them (both sides, all
kept counts, its penalty), learned by SGD.

Expected: measured figures and time in results/quickstart/README.md.
"""

from fdjax.config import CheckpointConfig, Config, DataConfig, LearnConfig, ModelConfig, WeightPhaseConfig


def get_config() -> Config:
    return Config(
        phases=("pretrain", "learn", "refine"),
        data=DataConfig(name="fashion_mnist_subset", batch_size=128, crop_padding=2),
        model=ModelConfig(name="mobilenetv2_small"),
        pretrain=WeightPhaseConfig(epochs=12, learning_rate=0.1, warmup_epochs=1),
        learn=LearnConfig(epochs=4, block=2, block_by_map=((7, 7),), target_macs=0.5),
        refine=WeightPhaseConfig(epochs=6, learning_rate=0.05),
        checkpoint=CheckpointConfig(every_epochs=2, evaluate_every_epochs=2),
    )
