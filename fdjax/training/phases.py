"""The phases of a run as ranges of steps."""

from __future__ import annotations

import dataclasses
from typing import Literal

from fdjax.config import HARD_PHASES, MASK_PHASES, MOST_STEPS, AlternateConfig, Config, LearnConfig, WeightPhaseConfig
from fdjax.errors import UserError

StepKind = Literal["weights", "masks"]


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase of a run.

    Attributes:
      name: one of `fdjax.config.PHASES`.
      index: place in the run, from 0.
      start: number of the run's steps before the phase.
      steps: number of the phase's steps.
      steps_per_epoch: steps in an epoch of the training data.
    """

    name: str
    index: int
    start: int
    steps: int
    steps_per_epoch: int

    @property
    def end(self) -> int:
        """The number of the run's steps that are done when the phase ends."""
        return self.start + self.steps

    @property
    def learns_masks(self) -> bool:
        """Whether the phase trains masks."""
        return self.name in MASK_PHASES

    @property
    def hard(self) -> bool:
        """Whether masks are rounded in the phase."""
        return self.name in HARD_PHASES

    @property
    def adapts_weights(self) -> bool:
        """Whether the phase trains weights under masks; the weights are then no longer the unpruned network's."""
        return self.name not in ("pretrain", "learn")

    def kind(self, config: Config, phase_step: int) -> StepKind:
        """Returns what step `phase_step` of the phase, counted from 0, trains."""
        if self.name == "learn":
            return "masks"
        if self.name != "alternate":
            return "weights"
        alternate = config.alternate
        unit = self.steps_per_epoch if alternate.unit == "epochs" else 1
        turn = phase_step // unit % (alternate.mask_turn + alternate.weight_turn)
        return "masks" if turn < alternate.mask_turn else "weights"

    def trains_batch_norm(self, config: Config, phase_step: int) -> bool:
        """Whether the weight step `phase_step` of the phase uses and updates batch statistics."""
        if self.name != "alternate":
            return True
        return phase_step >= round((1 - config.alternate.free_batchnorm_fraction) * self.steps)

    def weight_steps(self, config: Config) -> int:
        """Returns how many of the phase's steps train weights."""
        if self.name != "alternate":
            return 0 if self.name == "learn" else self.steps
        return sum(self.kind(config, step) == "weights" for step in range(self.steps))


def phase_settings(config: Config, name: str) -> WeightPhaseConfig | LearnConfig | AlternateConfig:
    """Returns the settings of a phase."""
    return getattr(config, name)


def has_teacher(config: Config, phase: Phase) -> bool:
    """Whether a phase distils from the unpruned network."""
    return config.distill.weight > 0 and phase.name != "pretrain"


def plan_phases(config: Config, steps_per_epoch: int) -> tuple[Phase, ...]:
    """Plans the phases of a config, one after the other.

    Raises:
      UserError: if they have more steps than int32 can count.
    """
    phases, start = [], 0
    for index, name in enumerate(config.phases):
        settings = phase_settings(config, name)
        steps = settings.steps or max(1, round(settings.epochs * steps_per_epoch))
        phases.append(Phase(name, index, start, steps, steps_per_epoch))
        start += steps
    if start > MOST_STEPS:
        raise UserError(f"the run would have {start:,} steps; at most {MOST_STEPS:,} are counted: lower its epochs")
    return tuple(phases)
