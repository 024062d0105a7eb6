"""A look at the masks while they are learned: what they cost, and how lambda goes on."""

from __future__ import annotations

import jax
import numpy as np

from fdjax.config import LearnConfig
from fdjax.graph.masks import MaskedGraph
from fdjax.pruning import mac_ratio
from fdjax.pruning.expected import expected_ratio
from fdjax.training.build import flat_masks, hard_masks
from fdjax.training.controller import next_lambda
from fdjax.training.devices import Devices
from fdjax.training.state import TrainState

# Offsets from targets above are told as from this one.
_HIGHEST_TARGET = 0.95


class MaskControl:
    """Measures the masks of a state and moves its lambda."""

    def __init__(self, learn: LearnConfig, graph: MaskedGraph, devices: Devices):
        self._learn, self._spec, self._devices = learn, graph, devices
        self._expected_ratio = jax.jit(
            lambda masks: expected_ratio(graph, masks, learn.counts_below_whole, learn.target_convention)
        )

    def look(
        self, state: TrainState, mask_step: int, mask_steps: int, interval: int
    ) -> tuple[TrainState, dict[str, float]]:
        """Measures the masks, and moves lambda if there is a target.

        Turns of weight learning do not count: neither masks nor the line that they are to follow move in them.

        Args:
          state: of the run.
          mask_step: mask steps of the phase that are done.
          mask_steps: that it has.
          interval: mask steps from one look to the next.

        Returns:
          The state to go on with, and what was measured.
        """
        learn = self._learn
        hard = hard_masks(learn, self._spec, state.fcmask, to_target=False)
        figures = {"macs_ratio": hard.macs.ratio, "macs_paper_ratio": hard.macs.paper_ratio}
        if learn.target_macs is None:
            return state, figures
        figures["expected_ratio"] = float(self._expected_ratio(flat_masks(state.fcmask)))
        on_the_way = mask_step < learn.ramp * mask_steps
        ratio = figures["expected_ratio"] if on_the_way else mac_ratio(hard.macs, learn.target_convention)
        offset = (learn.target_macs - ratio) / (1 - min(learn.target_macs, _HIGHEST_TARGET))
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
