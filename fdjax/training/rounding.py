"""Rounding the masks of a run when they have been learned, by its gate."""

from __future__ import annotations

import numpy as np

from fdjax import runtime
from fdjax.config import Config
from fdjax.data import Images
from fdjax.frozen.choice import Stopwatch
from fdjax.nn import FrequencyNetwork
from fdjax.pruning import HardMasks
from fdjax.spec import NetworkSpec
from fdjax.training.build import hard_masks, hard_masks_by_time
from fdjax.training.calibrate import calibration_sample, measure_level_losses
from fdjax.training.devices import Devices, to_host
from fdjax.training.restore import Past
from fdjax.training.state import TrainState


class Rounding:
    """Rounds masks as a run's config says; `images` and `train_indices` say what losses are measured on."""

    def __init__(
        self,
        config: Config,
        network: FrequencyNetwork,
        spec: NetworkSpec,
        images: Images,
        train_indices: np.ndarray,
        devices: Devices,
    ):
        self._config, self._network, self._spec = config, network, spec
        self._images, self._train_indices, self._devices = images, train_indices, devices

    def level_losses(self, state: TrainState) -> dict[str, list[list[float]]]:
        """As `measure_level_losses`; empty where rounding does not ask for them."""
        learn = self._config.learn
        if learn.rounding == "nearest":
            return {}
        images = self._images[calibration_sample(self._train_indices, self._config.seed)]
        return measure_level_losses(self._network, self._spec, to_host(state), learn.counts_below_whole, images)

    def round(self, state: TrainState, done: Past) -> HardMasks:
        """The masks that a hard phase begins with; `done`: the past of the run."""
        learn, to_target, fcmask = self._config.learn, done.masks_learned, state.fcmask
        # Masks that have not been learned are all 1; those of a run given by --init come without losses.
        losses = (done.level_losses or self.level_losses(state)) if to_target else None
        if learn.gate != "time" or not to_target:
            return hard_masks(learn, self._spec, fcmask, to_target=to_target, losses=losses)
        # Times are kept on disk: a run that is resumed from before this point comes to the same.
        stopwatch = Stopwatch(learn.gate_batch, runtime.times_cache_dir())
        hard = hard_masks_by_time(learn, self._spec, fcmask, stopwatch, to_target=to_target, losses=losses)
        by_macs = hard_masks(learn, self._spec, fcmask, to_target=to_target, losses=losses).released
        slower = ", ".join(name for name in hard.released if name not in by_macs) or "nothing"
        if self._devices.is_writer:
            print(f"gate: {slower} released for being slower pruned; {hard.macs.ratio:.3f}x MACs", flush=True)
        return hard
