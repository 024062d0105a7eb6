"""A narrow MobileNetV2 for CIFAR-10 on two CPU cores, pruned in a form that saves time: tied masks, levels 0, 1, N.

    python train.py --config configs/cifar10_narrow.py --workdir runs/narrow --data.path DIR

Data: a folder of images with train/<class>/* and test/<class>/*, 32x32 RGB. The network is the paper's for CIFAR-100
(strides 1,2,2,2,1,1,1) at width 0.35. Its 7.90 M MACs are an eleventh of those of configs/cifar10_mobilenetv2.py.

Hyperparameters: SGD with Nesterov momentum 0.9, cosine, weight decay 4e-5, batch 128, crop (padding 4) and flip, as in
configs/cifar10_mobilenetv2.py, over as few epochs as a CPU allows. The penalty is that of expected MACs.

Expected: results/time/README.md has measured accuracy and times.
"""

from fdjax.config import CheckpointConfig, Config, DataConfig, LearnConfig, ModelConfig, WeightPhaseConfig


def get_config() -> Config:
    return Config(
        phases=("pretrain", "learn", "refine"),
        data=DataConfig(name="folder", path="data/cifar10", batch_size=128, crop_padding=4, flip=True),
        model=ModelConfig(name="mobilenetv2_cifar100", width=0.35),
        pretrain=WeightPhaseConfig(epochs=20, learning_rate=0.1, warmup_epochs=1),
        learn=LearnConfig(epochs=2, block=2, tied=True, levels="0,1,N", penalty="macs", target_macs=0.5),
        refine=WeightPhaseConfig(epochs=5, learning_rate=0.05),
        checkpoint=CheckpointConfig(every_epochs=2, evaluate_every_epochs=4),
    )
