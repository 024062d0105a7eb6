"""Measures what the masks cost while they are learned, and updates lambda or the aim."""

from __future__ import annotations

import jax
import numpy as np

from fdjax.config import LearnConfig
from fdjax.graph.masks import MaskedGraph
from fdjax.pruning.expected import expected_ratio
from fdjax.pruning.harden import cost_ratio
from fdjax.pruning.timed import TimeTable, expected_parts, expected_time, soft_ratio
from fdjax.training.build import flat_masks, hard_masks
from fdjax.training.controller import next_lambda, offset_of, wanted_offset
from fdjax.training.devices import Devices
from fdjax.training.state import TrainState


class MaskControl:
    """Measures the masks of a state and updates its lambda or its aim."""

    def __init__(self, learn: LearnConfig, graph: MaskedGraph, devices: Devices, table: TimeTable | None = None):
        """Makes a control for the masks of `graph`; `table` has the measured times if the target is a time."""
        self._learn, self._spec, self._devices, self._table = learn, graph, devices, table
        if table is None:
            levels = learn.counts_below_whole
            self._expected = jax.jit(lambda masks: expected_ratio(graph, masks, levels, learn.target_convention))
        else:
            parts = jax.jit(lambda masks: expected_parts(graph, masks, table))
            self._expected = lambda masks: soft_ratio(table, parts(masks))
            self._convex = jax.jit(lambda masks: expected_time(graph, masks, table))

    def look(
        self, state: TrainState, mask_step: int, mask_steps: int, interval: int
    ) -> tuple[TrainState, dict[str, float]]:
        """Measures the masks; if there is a target, updates lambda or the aim, which the step reads as the offset.

        Only mask steps count: in turns that learn weights, neither the masks nor the target offset change.

        Args:
          state: the run's state.
          mask_step: number of the phase's mask steps that are done.
          mask_steps: number of mask steps in the phase.
          interval: number of mask steps between two measurements.

        Returns:
          The state with the new lambda or aim, and the measured figures.
        """
        learn, target = self._learn, self._learn.target
        hard = hard_masks(learn, self._spec, state.fcmask, to_target=False, table=self._table)
        figures = {"macs_ratio": hard.macs.ratio, "macs_paper_ratio": hard.macs.paper_ratio}
        if hard.time is not None:
            figures["time_ratio"] = hard.time
        if target is None:
            return state, figures
        masks = flat_masks(state.fcmask)
        figures["expected_ratio"] = float(self._expected(masks))
        progress, share = mask_step / mask_steps, interval / mask_steps
        lambda_, previous, start = (float(state.lambda_), *(float(state.controller[n]) for n in ("offset", "start")))
        by_lambda = learn.approach == "lambda"
        soft = not by_lambda or mask_step < learn.ramp * mask_steps
        offset = offset_of(figures["expected_ratio"] if soft else cost_ratio(hard, learn.target_convention), target)
        figures["offset"] = offset
        if np.isnan(start):
            start = offset
        elif by_lambda:
            lambda_ = next_lambda(lambda_, offset, previous, start, progress, share, learn.ramp)
        if not by_lambda:
            offset = self._aim(start, progress, masks, figures["expected_ratio"])
        controller = {"offset": np.float32(offset), "start": np.float32(start)}
        moved = self._devices.replicate({"lambda_": np.float32(lambda_), "controller": controller})
        return state.replace(**moved), figures

    def _aim(self, start: float, progress: float, masks: dict[str, np.ndarray], ratio: float) -> float:
        """Returns the offset to allow. The step compares times on convex envelopes, which lie below the table's."""
        wanted = wanted_offset(start, progress, self._learn.ramp)
        if self._table is None:
            return wanted
        target = self._learn.target
        assert target is not None
        return wanted + offset_of(float(self._convex(masks)), target) - offset_of(ratio, target)
