"""ResNet-110 on CIFAR-10, dense: the network on which filter pruners are compared (93.50% dense in the publications).

    python train.py --config configs/cifar10_resnet110.py --workdir runs/resnet110

Data: the TFDS set `cifar10` prepared as array_record, or a folder of images. The network has 252.89 M MACs. All its
convolutions are 3x3, so there is nothing to wrap in a DCT, and no phase learns masks. `--model.name resnet20` makes the
smallest network of the family.

Hyperparameters: those of the publication (He et al. 2016): SGD with momentum 0.9, learning rate 0.1 after a warm-up,
times 0.1 at half and three quarters of 200 epochs, batch 128, weight decay 1e-4, random crop (padding 4) and flip.

Expected cost: 200 epochs of 390 steps at 253 M MACs per image, which needs an accelerator. This config has not been
measured yet.
"""

from fdjax.config import Config, DataConfig, ModelConfig, WeightPhaseConfig


def get_config() -> Config:
    return Config(
        phases=("pretrain",),
        data=DataConfig(name="cifar10", batch_size=128, crop_padding=4, flip=True),
        model=ModelConfig(name="resnet110"),
        pretrain=WeightPhaseConfig(
            epochs=200, learning_rate=0.1, warmup_epochs=1, schedule="step", step_at=(0.5, 0.75), step_factor=0.1,
            weight_decay=1e-4,
        ),
    )  # fmt: skip
