"""Fine-tuning: an imported MobileNetV2 1.0 on a folder of your own pictures, pruned to half of its MACs.

    fdjax import --config finetune --data.path DIR --format torchvision --weights FILE --new-classifier --out imported
    fdjax train --config finetune --data.path DIR --init imported --workdir run

DIR holds train/<class>/* and test/<class>/*, and validation/<class>/* if there is a validation set. docs/finetune.md
describes the way from there to a faster file.

Hyperparameters: the learning rates suit pretrained weights. SGD with Nesterov momentum 0.9 starts at 0.02 for the
classifier and a fifth of that for the body, with a cosine schedule and label smoothing 0.1. Augmentation is a random
part of at least half of each picture, and flips. Masks remove whole channels (levels 0,N), in multiples of 16: at
equal time in ONNX Runtime they keep more of the network than masks that can also keep the mean (results/finetune).
They come down along an aim (`approach`), because the phase has few steps, with Adam, whose moves do not depend on how
much a mask's layer costs. Blocks have 5x5 pixels, which divide all maps of a picture of 160 pixels. The gate decides by
the time that one image takes.
"""

from fdjax.config import CheckpointConfig, Config, DataConfig, LearnConfig, ModelConfig, WeightPhaseConfig


def get_config() -> Config:
    return Config(
        phases=("pretrain", "learn", "refine"),
        data=DataConfig(
            name="folder", path="pictures", image_size=160, batch_size=32, crop_padding=0, crop_area=0.5
        ),
        model=ModelConfig(name="mobilenetv2", padding="torch", count_classifier=True),
        pretrain=WeightPhaseConfig(
            epochs=3, learning_rate=0.02, body_rate=0.2, warmup_epochs=0.5, label_smoothing=0.1
        ),
        learn=LearnConfig(
            epochs=2,
            optimizer="adam",
            learning_rate=0.04,
            approach="aim",
            tied=True,
            levels="0,N",
            group_multiple=16,
            block=5,
            penalty="macs",
            target_macs=0.5,
            gate="time",
        ),
        refine=WeightPhaseConfig(epochs=6, learning_rate=0.01, label_smoothing=0.1),
        checkpoint=CheckpointConfig(every_epochs=1, evaluate_every_epochs=1),
    )  # fmt: skip
