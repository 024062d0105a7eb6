"""A run small enough for the tests: every kind of phase, a few steps each, on the embedded data."""

from __future__ import annotations

from fdjax.config import (
    AlternateConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LearnConfig,
    ModelConfig,
    WeightPhaseConfig,
)

STEPS = 6
PHASES = ("pretrain", "learn", "alternate", "refine", "scratch")


def get_config() -> Config:
    weights = WeightPhaseConfig(steps=STEPS, learning_rate=0.02)
    every_two_steps = 2 * 16 / 9000
    return Config(
        phases=PHASES,
        data=DataConfig(batch_size=16, validation=0.1, crop_padding=2),
        model=ModelConfig(name="mobilenetv2_small", width=0.3),
        pretrain=weights,
        learn=LearnConfig(steps=STEPS, block=2, block_by_map=((7, 7),), target_macs=0.7),
        alternate=AlternateConfig(steps=STEPS, unit="steps", learning_rate=0.02, free_batchnorm_fraction=0.5),
        refine=weights,
        scratch=weights,
        checkpoint=CheckpointConfig(every_epochs=every_two_steps, evaluate_every_epochs=1.0, keep=100, time=False),
    )
