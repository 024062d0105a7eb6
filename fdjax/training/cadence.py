"""The steps of a phase at which masks are measured, metrics recorded, the network evaluated or a checkpoint saved."""

from __future__ import annotations

import numpy as np

from fdjax.config import Config
from fdjax.training.phases import Phase

# The number of times in a phase that the controller measures the masks, and the number of steps between records.
_CONTROL_TICKS = 50
_RECORD_EVERY = 20


class Cadence:
    """Says what is due at each step of one phase; steps are counted from the phase's beginning.

    Args:
      config: the run's config.
      phase: the phase.
    """

    def __init__(self, config: Config, phase: Phase):
        epochs = config.checkpoint
        self._last = phase.steps
        self._save_every = max(1, round(epochs.every_epochs * phase.steps_per_epoch))
        self._evaluate_every = max(1, round(epochs.evaluate_every_epochs * phase.steps_per_epoch))
        self._is_mask_step = [phase.kind(config, step) == "masks" for step in range(phase.steps)]
        # The number of mask steps before each step.
        self._mask_steps = np.cumsum([0, *self._is_mask_step])
        self._control_every = max(1, int(self._mask_steps[-1]) // _CONTROL_TICKS)

    def controls(self, step: int) -> bool:
        """Whether the controller measures the masks before step `step`."""
        return self._is_mask_step[step] and self._mask_steps[step] % self._control_every == 0

    def control_at(self, step: int) -> tuple[int, int, int]:
        """Returns numbers of mask steps: before `step`, in the phase, and between two measurements of the masks."""
        return int(self._mask_steps[step]), int(self._mask_steps[-1]), self._control_every

    def saves(self, step: int) -> bool:
        """Whether the state is saved after `step` steps; it is always saved at the end of the phase."""
        return step % self._save_every == 0

    def evaluates(self, step: int) -> bool:
        """Whether the network is evaluated after `step` steps; it is always evaluated at the end of the phase."""
        return step % self._evaluate_every == 0

    def records(self, step: int) -> bool:
        """Whether metrics are recorded after `step` steps, or at the end of the phase."""
        return step % _RECORD_EVERY == 0 or step == self._last

    def ends_dispatch(self, step: int) -> bool:
        """Whether a dispatch of several steps has to end after `step` steps."""
        return self.records(step) or self.saves(step) or self.evaluates(step) or self.controls(step)
