"""Warnings about learned masks: a target that was missed, layers without any channel left."""

from __future__ import annotations

from fdjax.config import LearnConfig
from fdjax.graph.counting import NetworkMacs
from fdjax.pruning import mac_ratio

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
            said += "; if the masks were learned below the target, give more learn.epochs, or learn.approach aim"
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
