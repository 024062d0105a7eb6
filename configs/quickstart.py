"""Quick start: a small MobileNetV2 on the embedded Fashion-MNIST subset, pruned to half of its MACs, and faster.

    python train.py --config configs/quickstart.py --workdir runs/quickstart

The network is small enough for two CPU cores (5.03 M MACs). Its masks are of the kind that saves time on a processor:
whole channels (tied masks, kept counts 0 and N) in multiples of 8, gated by the time that 8 images take. With
`--learn.levels 0,1,N`, channels may also keep the means of 7x7 blocks. The paper's own masks are in
configs/quickstart_paper.py. Both save as many MACs, but less time or none.

Hyperparameters: SGD with Nesterov momentum 0.9, cosine, weight decay 4e-5, as in configs/cifar10_mobilenetv2.py, over
as few epochs as this network needs on 10,000 images. Masks come down along an aim (`approach`), with Adam, as in
configs/finetune.py: their phase has few steps.

Expected: results/quickstart/README.md has measured accuracy and times.
"""

from fdjax.config import CheckpointConfig, Config, DataConfig, LearnConfig, ModelConfig, WeightPhaseConfig


def get_config() -> Config:
    return Config(
        phases=("pretrain", "learn", "refine"),
        data=DataConfig(name="fashion_mnist_subset", batch_size=128, crop_padding=2),
        model=ModelConfig(name="mobilenetv2_small"),
        pretrain=WeightPhaseConfig(epochs=12, learning_rate=0.1, warmup_epochs=1),
        learn=LearnConfig(
            epochs=2,
            approach="aim",
            optimizer="adam",
            learning_rate=0.04,
            tied=True,
            levels="0,N",
            group_multiple=8,
            block=7,
            penalty="macs",
            target_macs=0.5,
            gate="time",
            engine_batch=8,
        ),
        refine=WeightPhaseConfig(epochs=10, learning_rate=0.05),
        checkpoint=CheckpointConfig(every_epochs=2, evaluate_every_epochs=2),
    )
