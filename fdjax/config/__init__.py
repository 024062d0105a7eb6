"""The description of a run: frozen dataclasses, which validate their fields when they are made.

A config file is a Python file with `get_config() -> Config`. A flag of `train.py` can override any field
(`--learn.target-macs 0.5`). The docstrings of the fields are the help texts of the flags.
"""

from fdjax.config.continuation import continuation_problem
from fdjax.config.data import DataConfig
from fdjax.config.model import ONNX_FACTORY, ModelConfig
from fdjax.config.phases import (
    HARD_PHASES,
    MASK_PHASES,
    MOST_STEPS,
    PHASES,
    AlternateConfig,
    LearnConfig,
    WeightPhaseConfig,
)
from fdjax.config.run import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DistillConfig,
    load_config,
    with_absolute_paths,
)

__all__ = [
    "HARD_PHASES",
    "MASK_PHASES",
    "MOST_STEPS",
    "ONNX_FACTORY",
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
    "with_absolute_paths",
]
