"""A whole run, and the file that describes it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

from fdjax.config.checked import Checked
from fdjax.config.data import DataConfig
from fdjax.config.model import ModelConfig
from fdjax.config.phases import PHASES, AlternateConfig, LearnConfig, WeightPhaseConfig
from fdjax.config.saved import config_of_fields
from fdjax.errors import UserError
from fdjax.python_file import load_made


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(Checked):
    """Self-distillation: after pretraining, the unpruned network teaches the pruned one."""

    weight: float = 0.0
    """Share of the loss, 0 to 1, that compares logits with the unpruned network's; 0: off, 1: labels are not used."""
    temperature: float = 2.0
    """That both networks' logits are divided by."""

    def _check(self) -> None:
        self._require(0 <= self.weight <= 1, "weight", "a share from 0 to 1")
        self._require(self.temperature > 0, "temperature", "above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Checked):
    """How often a run saves and measures itself."""

    every_epochs: float = 1.0
    """Epochs between checkpoints; one more is written at the end of each phase."""
    keep: int = 2
    """Latest checkpoints that are kept, at least 2, beside the best on the validation share."""
    evaluate_every_epochs: float = 1.0
    """Epochs between evaluations (validation share if there is one, else the test set, for the curves only)."""
    time: bool = True
    """At the end of a run that has pruned, time its network, frozen, beside the dense one on this machine
    (on learn.engine, learn.engine_batch images at once)."""

    def _check(self) -> None:
        self._require(self.every_epochs > 0, "every_epochs", "above 0")
        self._require(
            2 <= self.keep <= 1_000_000, "keep", "from 2 (one is whole while another is written) to 1,000,000"
        )
        self._require(self.evaluate_every_epochs > 0, "evaluate_every_epochs", "above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig(Checked):
    """How steps are fed; figures do not depend on it but by rounding."""

    data_on_device: Literal["auto", "yes", "no"] = "auto"
    """yes: the data set lies on the devices. no: batches come from the host, overlapped. auto: yes up to 2 GiB."""
    steps_per_dispatch: int | None = None
    """Steps that one call does if the data lie on the devices (None: 1 on the CPU, 20 elsewhere)."""

    def _check(self) -> None:
        self._require(
            self.steps_per_dispatch is None or self.steps_per_dispatch >= 1, "steps_per_dispatch", "at least 1, or None"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """A whole run."""

    seed: int = 0
    """Of everything random: initial weights, order of images, augmentation, the parts of the training set."""
    phases: tuple[Literal["pretrain", "learn", "alternate", "refine", "scratch"], ...] = ("pretrain", "learn", "refine")
    """In order: pretrain (weights), learn (masks), alternate (masks and weights in turn), refine (masks rounded,
    weights), scratch (masks rounded, new weights)."""
    skip_nonfinite: bool = False
    """Skip steps whose loss or new state is not finite. The run then stops only where every step between two records of
    metrics is such; otherwise it stops at the first."""
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
                f"data.unlabelled has no labels to learn from, and distill.weight is {self.distill.weight:g}; give "
                "--distill.weight 1, so that the unpruned network teaches alone"
            )
        self._require("pretrain" not in self.phases[1:], "phases", "phases with pretrain first, if it is among them")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Config:
        """The config that `to_dict` wrote.

        Raises:
          UserError: fields or values that are no config's, or an option that there is no longer.
        """
        return config_of_fields(cls, fields)


def load_config(path: str) -> Config:
    """Runs a config file and returns what its `get_config()` makes.

    Raises:
      UserError: no such file, an error in it, or no `get_config` that returns a `Config`.
    """
    return load_made(path, "config", "get_config", Config, "fdjax.config.Config")
