"""Rounding the masks of a run when they have been learned, by its gate."""

from __future__ import annotations

from typing import Any

from fdjax import runtime
from fdjax.config import LearnConfig
from fdjax.frozen.choice import Stopwatch
from fdjax.graph.masks import MaskedGraph
from fdjax.pruning import HardMasks
from fdjax.training.build import hard_masks, hard_masks_by_time


def gated_masks(learn: LearnConfig, graph: MaskedGraph, fcmask: Any, *, learned: bool) -> HardMasks:
    """The masks that a hard phase begins with; prints what was released for its time.

    Args:
      learn: levels, gate and target.
      graph: channel graph of the network.
      fcmask: the collection.
      learned: False: the masks are all 1 still, with no target to meet and nothing to time.
    """
    by_macs = hard_masks(learn, graph, fcmask, to_target=learned)
    if learn.gate != "time" or not learned:
        return by_macs
    # Times are kept on disk: a run that is resumed from before this point comes to the same.
    stopwatch = Stopwatch(learn.engine_batch, runtime.times_cache_dir(), learn.engine)
    hard = hard_masks_by_time(learn, graph, fcmask, stopwatch)
    slower = ", ".join(name for name in hard.released if name not in by_macs.released) or "nothing"
    print(f"gate: {slower} released for being slower pruned; {hard.macs.ratio:.3f}x MACs", flush=True)
    return hard
