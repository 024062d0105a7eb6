"""At which steps of a phase something is looked at, recorded, evaluated or saved."""

from __future__ import annotations

import numpy as np

from fdjax.config import Config
from fdjax.training.phases import Phase

# How many times in a phase the controller looks at the masks, and how many steps lie between records.
_CONTROL_TICKS = 50
_RECORD_EVERY = 20


class Cadence:
    """The steps of one phase at which something is due; steps are counted from 0 to its end.

    Args:
      config: of the run.
      phase: which.
    """

    def __init__(self, config: Config, phase: Phase):
        epochs = config.checkpoint
        self._last = phase.steps
        self._save_every = max(1, round(epochs.every_epochs * phase.steps_per_epoch))
        self._evaluate_every = max(1, round(epochs.evaluate_every_epochs * phase.steps_per_epoch))
        self._is_mask_step = [phase.kind(config, step) == "masks" for step in range(phase.steps)]
        # How many mask steps lie before each step.
        self._mask_steps = np.cumsum([0, *self._is_mask_step])
        self._control_every = max(1, int(self._mask_steps[-1]) // _CONTROL_TICKS)

    def controls(self, step: int) -> bool:
        """Whether the masks are looked at before step `step`."""
        return self._is_mask_step[step] and self._mask_steps[step] % self._control_every == 0

    def control_at(self, step: int) -> tuple[int, int, int]:
        """Mask steps before `step`, those of the phase, and those from one look at the masks to the next."""
        return int(self._mask_steps[step]), int(self._mask_steps[-1]), self._control_every

    def saves(self, step: int) -> bool:
        """Whether the state is saved after `step` steps, the end of the phase left aside."""
        return step % self._save_every == 0

    def evaluates(self, step: int) -> bool:
        """Whether the network is evaluated after `step` steps, the end of the phase left aside."""
        return step % self._evaluate_every == 0

    def records(self, step: int) -> bool:
        """Whether a record is due after `step` steps, whatever else is; so it is at the end."""
        return step % _RECORD_EVERY == 0 or step == self._last

    def ends_dispatch(self, step: int) -> bool:
        """Whether no dispatch may go on beyond `step` steps."""
        return self.records(step) or self.saves(step) or self.evaluates(step) or self.controls(step)
