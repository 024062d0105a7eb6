"""Warnings about learned masks: a target that was missed, layers without any channel left, a network that was lost."""

from __future__ import annotations

from fdjax.config import LearnConfig
from fdjax.graph.counting import NetworkMacs
from fdjax.pruning import mac_ratio
from fdjax.training.phases import Phase

# A network whose accuracy is less than this many times that of guessing knows next to nothing.
CHANCE = 1.5
# The relative distance from the target beyond which there is a warning.
_TOLERANCE = 0.02


def mask_warnings(learn: LearnConfig, macs: NetworkMacs) -> list[str]:
    """Returns the warnings about a network's rounded masks at the end of a mask phase; none if all is as asked."""
    by_time = learn.target_time is not None
    found, target, reached = [], None if by_time else learn.target_macs, mac_ratio(macs, learn.target_convention)
    if target is not None and abs(reached / target - 1) > _TOLERANCE:
        said = f"the target of {target:g}x MACs is out of reach here; the nearest is {reached:.3f}x"
        if reached < target:
            # Masks that were learned down to 0 are equal, so that no rounding brings back only some of them.
            ways = "more learn.epochs" if learn.approach == "aim" else "more learn.epochs, or learn.approach aim"
            said += f"; if the masks were learned below the target, give {ways}"
        found.append(said)
    gone = [
        layer.name
        for layer in macs.layers
        if any(kept and not sum(kept[1:]) for kept in (layer.input_histogram, layer.output_histogram))
    ]
    if gone:
        more = f" and {len(gone) - 3} more" if len(gone) > 3 else ""
        advice = "a smaller learn.lambda_" if learn.target is None else "a higher learn.target_macs"
        advice = "a higher learn.target_time" if by_time else advice
        found.append(f"no channel is left of {', '.join(gone[:3])}{more}; if that was not intended, give {advice}")
    return found


def lost_warnings(phase: Phase, top1: float, dense_top1: float | None, num_classes: int) -> list[str]:
    """Returns a warning if a network that knew something is hardly better than guessing at the end of a phase.

    Args:
      phase: the phase, in which or before which masks were learned.
      top1: accuracy at its end, with soft masks if it learns them, 0 to 1.
      dense_top1: that of the dense network; None if it is not known.
      num_classes: number of classes.

    Returns:
      The warning, if there is one.
    """
    chance = CHANCE / num_classes
    if dense_top1 is None or dense_top1 < chance or top1 >= chance:
        return []
    said = (
        f"at the end of {phase.name} the network has {100 * top1:.2f}%, and guessing would give "
        f"{100 / num_classes:.2f}% (dense: {100 * dense_top1:.2f}%): "
    )
    if phase.learns_masks:
        return [
            f"{said}if refinement does not bring it back, learn masks in more epochs ({phase.steps:,} steps are few)"
        ]
    return [f"{said}it was lost while masks were learned; give that phase more epochs, or a higher target"]
