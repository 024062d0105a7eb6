"""Quick start: a small MobileNetV2 on the embedded Fashion-MNIST subset, pruned to half of its MACs."""

from fdjax.config import CheckpointConfig, Config, DataConfig, LearnConfig, ModelConfig, WeightPhaseConfig


def get_config() -> Config:
    return Config(
        phases=("pretrain", "learn", "refine"),
        data=DataConfig(name="fashion_mnist_subset", batch_size=128, crop_padding=2),
        model=ModelConfig(name="mobilenetv2_small"),
        pretrain=WeightPhaseConfig(epochs=14, learning_rate=0.1, warmup_epochs=1),
        learn=LearnConfig(epochs=4, block=2, block_by_map={7: 7}, target_macs=0.5),
        refine=WeightPhaseConfig(epochs=8, learning_rate=0.05),
        checkpoint=CheckpointConfig(every_epochs=5, evaluate_every_epochs=5),
    )
