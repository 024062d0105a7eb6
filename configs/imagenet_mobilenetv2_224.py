"""The paper's ImageNet network: MobileNetV2 1.0-224, 2x2 blocks, 7x7 on the 7x7 maps (section 4: 0.68x, 205 M MACs).

    python train.py --config configs/imagenet_mobilenetv2_224.py --workdir runs/imagenet224
    python train.py --config configs/imagenet_mobilenetv2_224.py --workdir runs/imagenet224 --init DIR

Data: the TFDS set `imagenet2012` prepared as array_record (`fdjax data prepare`), or a folder of images (`--data.name
folder --data.path DIR`). `--init` may name an imported network (docs/import.md); `--phases learn scratch` then skips
pretraining. The network has 300.77 M MACs dense, classifier included. The paper's dense network reaches 71.8%.

Scheme: the paper's for ImageNet. Masks are learned on the trained network, and new weights are then trained with them.

Hyperparameters: a usual recipe for MobileNetV2 is SGD with Nesterov momentum 0.9, cosine from 0.05 over 150 epochs,
batch 256, weight decay 4e-5, random resized crops and flips; tests use the middle 87.5% of an image. The paper gives no
settings for masks.

Expected cost: 300 epochs of 5,004 steps, which needs accelerators. This config has not been measured yet.
"""

from fdjax.config import Config, DataConfig, LearnConfig, ModelConfig, WeightPhaseConfig


def get_config() -> Config:
    weights = WeightPhaseConfig(
        epochs=150, learning_rate=0.05, warmup_epochs=1, schedule="cosine", weight_decay=4e-5, label_smoothing=0.1
    )
    return Config(
        phases=("pretrain", "learn", "scratch"),
        data=DataConfig(
            name="imagenet2012", loading="stream", image_size=224, batch_size=256, random_resized_crop=True,
            crop_padding=0, eval_crop=0.875,
        ),
        model=ModelConfig(name="mobilenetv2", count_classifier=True),
        pretrain=weights,
        learn=LearnConfig(epochs=10, block=2, block_by_map=((7, 7),), sides="both", penalty="fcmask", target_macs=0.68),
        scratch=weights,
    )  # fmt: skip
