"""ResNet-110 on CIFAR-10, dense: where the filter pruners are compared (dense 93.50% in the publications).

    python train.py --config configs/cifar10_resnet110.py --workdir runs/resnet110

Data: TFDS `cifar10` prepared as array_record, or a folder of images. 252.89 M MACs. Its convolutions are 3x3: there is
nothing to wrap in a DCT, and no phase that learns masks. `--model.name resnet20` makes the smallest of the family.

Hyperparameters: those of the publication (He et al. 2016): SGD, momentum 0.9, learning rate 0.1 with a warm-up, times
0.1 at half and three quarters of 200 epochs, batch 128, weight decay 1e-4, random crop (pad 4) and flip.

Expected cost: 200 epochs of 390 steps at 253 M MACs an image: a task for an accelerator. Not measured yet.
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
