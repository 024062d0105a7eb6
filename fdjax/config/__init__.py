"""What a run is asked to do: frozen dataclasses, validated when they are made.

A config file is Python with `get_config() -> Config`. Every field can be overridden by a flag of `train.py`
(`--learn.target-macs 0.5`). Field docstrings are the flags' help texts.
"""

from fdjax.config.continuation import continuation_problem
from fdjax.config.data import DataConfig
from fdjax.config.model import ModelConfig
from fdjax.config.phases import (
    HARD_PHASES,
    MASK_PHASES,
    MOST_STEPS,
    PHASES,
    AlternateConfig,
    LearnConfig,
    WeightPhaseConfig,
)
from fdjax.config.run import CheckpointConfig, ComputeConfig, Config, DistillConfig, load_config

__all__ = [
    "HARD_PHASES",
    "MASK_PHASES",
    "MOST_STEPS",
    "PHASES",
    "AlternateConfig",
    "CheckpointConfig",
    "ComputeConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "LearnConfig",
    "ModelConfig",
    "WeightPhaseConfig",
    "continuation_problem",
    "load_config",
]
