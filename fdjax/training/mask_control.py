"""Measures what the masks cost while they are learned, and updates lambda."""

from __future__ import annotations

import jax
import numpy as np

from fdjax.config import LearnConfig
from fdjax.graph.masks import MaskedGraph
from fdjax.pruning.expected import expected_ratio
from fdjax.pruning.harden import cost_ratio
from fdjax.pruning.timed import TimeTable, expected_parts, soft_ratio
from fdjax.training.build import flat_masks, hard_masks
from fdjax.training.controller import next_lambda
from fdjax.training.devices import Devices
from fdjax.training.state import TrainState

# The offset is divided by 1 - target; the target counts as at most this, so that the divisor does not vanish.
_HIGHEST_TARGET = 0.95


class MaskControl:
    """Measures the masks of a state and updates its lambda."""

    def __init__(self, learn: LearnConfig, graph: MaskedGraph, devices: Devices, table: TimeTable | None = None):
        """Makes a control for the masks of `graph`; `table` has the measured times if the target is a time."""
        self._learn, self._spec, self._devices, self._table = learn, graph, devices, table
        if table is None:
            levels = learn.counts_below_whole
            self._expected = jax.jit(lambda masks: expected_ratio(graph, masks, levels, learn.target_convention))
        else:
            parts = jax.jit(lambda masks: expected_parts(graph, masks, table))
            self._expected = lambda masks: soft_ratio(table, parts(masks))

    def look(
        self, state: TrainState, mask_step: int, mask_steps: int, interval: int
    ) -> tuple[TrainState, dict[str, float]]:
        """Measures the masks, and updates lambda if there is a target.

        Only mask steps count: in turns that learn weights, neither the masks nor the target offset change.

        Args:
          state: the run's state.
          mask_step: number of the phase's mask steps that are done.
          mask_steps: number of mask steps in the phase.
          interval: number of mask steps between two measurements.

        Returns:
          The state with the new lambda, and the measured figures.
        """
        learn = self._learn
        hard, target = hard_masks(learn, self._spec, state.fcmask, to_target=False, table=self._table), learn.target
        figures = {"macs_ratio": hard.macs.ratio, "macs_paper_ratio": hard.macs.paper_ratio}
        if hard.time is not None:
            figures["time_ratio"] = hard.time
        if target is None:
            return state, figures
        figures["expected_ratio"] = float(self._expected(flat_masks(state.fcmask)))
        on_the_way = mask_step < learn.ramp * mask_steps
        ratio = figures["expected_ratio"] if on_the_way else cost_ratio(hard, learn.target_convention)
        offset = (target - ratio) / (1 - min(target, _HIGHEST_TARGET))
        previous, start = (float(state.controller[name]) for name in ("offset", "start"))
        lambda_ = float(state.lambda_)
        if np.isnan(start):
            start = offset
        else:
            progress, share = mask_step / mask_steps, interval / mask_steps
            lambda_ = next_lambda(lambda_, offset, previous, start, progress, share, learn.ramp)
        controller = {"offset": np.float32(offset), "start": np.float32(start)}
        figures["offset"] = offset
        moved = self._devices.replicate({"lambda_": np.float32(lambda_), "controller": controller})
        return state.replace(**moved), figures
