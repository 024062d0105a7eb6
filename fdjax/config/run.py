"""The config of a whole run, and the file that holds it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fdjax.config.checked import Checked
from fdjax.config.data import DataConfig
from fdjax.config.model import ModelConfig
from fdjax.config.phases import PHASES, AlternateConfig, LearnConfig, WeightPhaseConfig
from fdjax.config.saved import config_of_fields
from fdjax.errors import UserError
from fdjax.python_file import load_made, shipped_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(Checked):
    """Self-distillation: after pretraining, the unpruned network teaches the pruned one."""

    weight: float = 0.0
    """Share of the loss, 0 to 1, that compares logits with the unpruned network's. 0: off; 1: labels are not used."""
    temperature: float = 2.0
    """Temperature, above 0, by which both networks' logits are divided."""

    def _check(self) -> None:
        self._require(0 <= self.weight <= 1, "weight", "a share from 0 to 1")
        self._require(self.temperature > 0, "temperature", "above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Checked):
    """How often a run saves and evaluates the network."""

    every_epochs: float = 1.0
    """Epochs between checkpoints; another is written at the end of each phase."""
    keep: int = 2
    """Number of latest checkpoints to keep, at least 2; the best on the validation share is kept as well."""
    evaluate_every_epochs: float = 1.0
    """Epochs between evaluations, on the validation share if there is one, or else on the test set (for curves)."""
    time: bool = True
    """Time the frozen network beside the dense one at the end of a run that has pruned, on this machine, on
    learn.engine with learn.engine_batch images per call."""

    def _check(self) -> None:
        self._require(self.every_epochs > 0, "every_epochs", "above 0")
        self._require(
            2 <= self.keep <= 1_000_000, "keep", "from 2 (one is whole while another is written) to 1,000,000"
        )
        self._require(self.evaluate_every_epochs > 0, "evaluate_every_epochs", "above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig(Checked):
    """How steps are fed with data; results depend on it by rounding error only."""

    data_on_device: Literal["auto", "yes", "no"] = "auto"
    """Where the data set is held. yes: on the devices. no: batches are prefetched from the host. auto: yes up to
    2 GiB."""
    steps_per_dispatch: int | None = None
    """Steps per dispatched call, if the data are on the devices (None: 1 on the CPU, 20 on others)."""

    def _check(self) -> None:
        self._require(
            self.steps_per_dispatch is None or self.steps_per_dispatch >= 1, "steps_per_dispatch", "at least 1, or None"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """The config of a whole run."""

    seed: int = 0
    """Seed of everything random: initial weights, order of images, augmentation, splits of the training set."""
    phases: tuple[Literal["pretrain", "learn", "alternate", "refine", "scratch"], ...] = ("pretrain", "learn", "refine")
    """Phases, in order: pretrain (trains weights), learn (masks), alternate (masks and weights in turn), refine (rounds
    masks, trains weights), scratch (rounds masks, trains new weights)."""
    skip_nonfinite: bool = False
    """Skip steps whose loss or new state is not finite. The run then stops only if every step between two records of
    metrics is not finite; without this flag, it stops at the first such step."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    pretrain: WeightPhaseConfig = WeightPhaseConfig()
    learn: LearnConfig = LearnConfig()
    alternate: AlternateConfig = AlternateConfig()
    refine: WeightPhaseConfig = WeightPhaseConfig()
    scratch: WeightPhaseConfig = WeightPhaseConfig()
    distill: DistillConfig = DistillConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    compute: ComputeConfig = ComputeConfig()

    def _check(self) -> None:
        self._require(0 <= self.seed < 2**31, "seed", "from 0 to 2**31 - 1")
        self._require(len(self.phases) > 0, "phases", f"at least one of {', '.join(PHASES)}")
        self._require(
            all(phase not in self.phases[:at] for at, phase in enumerate(self.phases)), "phases", "different phases"
        )
        if self.data.unlabelled is not None and self.distill.weight < 1:
            raise UserError(
                f"the images of data.unlabelled have no labels, and distill.weight is {self.distill.weight:g}; give "
                "--distill.weight 1, so that only the unpruned network teaches"
            )
        self._require("pretrain" not in self.phases[1:], "phases", "phases with pretrain first, if it is among them")

    def to_dict(self) -> dict[str, Any]:
        """Returns the config in plain JSON types, which `from_dict` reads."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Config:
        """Reads a config that `to_dict` wrote.

        Raises:
          UserError: the fields or values are not those of a config, or name an option that has been removed.
        """
        return config_of_fields(cls, fields)


def with_absolute_paths(config: Config) -> Config:
    """Makes the paths of the data and of an ONNX file absolute, so that any directory will do for an evaluation."""
    absolute = {
        field: str(Path(path).expanduser().resolve())
        for field in ("path", "unlabelled")
        if (path := getattr(config.data, field)) is not None
    }
    file = config.model.onnx_file
    model = config.model if file is None else config.model.with_onnx_file(file)
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, **absolute))


def load_config(path: str) -> Config:
    """Runs a config file and returns the config that its `get_config()` makes.

    Args:
      path: path of the file, or the name of a config that comes with fdjax, such as "finetune".

    Returns:
      The config.

    Raises:
      UserError: the file does not exist, fails, or has no `get_config` that returns a `Config`.
    """
    return load_made(shipped_file(path, "configs") or path, "config", "get_config", Config, "fdjax.config.Config")
