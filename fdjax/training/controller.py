"""The controller of lambda. It brings the masks to the target when `learn.ramp` of the phase is done, and holds them.

It measures the offset from the target, (target - MAC ratio) / (1 - target): -1 for the dense network, 0 at the target.
Until the ramp ends, the MAC ratio is that of expected MACs, which responds to every mask; the MACs of rounded masks do
not change until masks fall below the value where they are rounded down. After the ramp, the ratio is that of rounded
masks after the gate, which has to meet the target. The offset should follow a parabola that reaches 0 with zero slope,
because the channels that are pruned last cost the most accuracy. The controller compares the speed of the offset with
the speed that the parabola asks for, and scales lambda accordingly.

With `approach="aim"` there is no memory: the penalty is a constant times the squared excess of the expected cost over
an aim (`wanted_offset`), so its gradient grows with the excess in every step. Nothing lags behind the masks, and short
phases reach the target without overshooting it.
"""

from __future__ import annotations

import math
from typing import TypeVar

import jax
import numpy as np

from fdjax.config import LearnConfig
from fdjax.graph.masks import MaskedGraph

_Scalar = TypeVar("_Scalar", float, jax.Array)
# The change of log(lambda) for an error of 1 in the (relative) speed, and the largest change in one interval.
_GAIN = 0.5
_LARGEST_MOVE = math.log(1.5)
# Errors of the speed are relative to the mean speed over the whole way; a way counts as at least this long.
_LEAST_WAY = 0.2
# An error of the offset should be corrected within this many intervals.
_CATCH_UP = 4
# The offset is divided by 1 - target; the target counts as at most this, so that the divisor does not vanish.
_HIGHEST_TARGET = 0.95
# Lambda starts low: if it starts too high, all masks fall at once, before the controller can respond.
_FIRST = 0.2
# With an aim, the weight of the squared excess over it: an excess of 5% of the dense cost pulls like a lambda of 20.
_EXCESS = 200.0


def first_lambda(learn: LearnConfig, graph: MaskedGraph, mask_steps: int) -> float:
    """Returns the lambda that a mask phase starts with: `learn.lambda_`, or an estimate.

    With `approach="aim"` it is a constant. Otherwise the estimate is a fifth of the lambda that, by the penalty alone,
    would lower the mask of a median channel by 0.5 within the ramp. With sgd a mask moves by lr / (1 - momentum) *
    lambda * d penalty / d mask in a step.
    """
    if learn.lambda_ is not None:
        return learn.lambda_
    if learn.approach == "aim":
        return _EXCESS
    if learn.penalty == "fcmask":
        slopes = np.concatenate([np.full(channels, 1 / channels) for channels, _ in graph.mask_sizes.values()])
    else:
        dense = graph.dense_macs
        # A network without pointwise layers can have masks on whole channels.
        masked = (graph.wrapped_layers or graph.counted_layers).values()
        slopes = np.concatenate([np.full(layer.in_channels, layer.dense_macs / dense / layer.in_channels)
                                 for layer in masked])  # fmt: skip
    speed = 0.5 / max(1.0, learn.ramp * mask_steps)
    rate = learn.learning_rate / (1 - learn.momentum if learn.optimizer == "sgd" else 1.0)
    return float(_FIRST * speed / (rate * np.median(slopes)))


def offset_of(ratio: float, target: float) -> float:
    """Returns how far a ratio of costs is from the target: -1 for the dense network, 0 at the target."""
    return (target - ratio) / (1 - min(target, _HIGHEST_TARGET))


def ratio_at(offset: _Scalar, target: float) -> _Scalar:
    """Returns the ratio of costs at an offset, the inverse of `offset_of`."""
    return target - offset * (1 - min(target, _HIGHEST_TARGET))


def next_lambda(
    lambda_: float, offset: float, previous: float, start: float, progress: float, interval: float, ramp: float
) -> float:
    """Scales lambda after one interval of mask learning.

    Args:
      lambda_: the present lambda.
      offset: the offset now.
      previous: the offset one interval ago.
      start: the offset at the beginning of the phase: about -1, or near 0 if masks have been learned before.
      progress: share of the phase's mask steps that are done, 0 to 1.
      interval: share of the mask steps since `previous` was measured.
      ramp: share of the mask steps after which the offset should be 0.

    Returns:
      The lambda of the next interval.
    """
    left = max(0.0, 1 - progress / ramp)
    line, speed = start * left**2, -2 * start * left / ramp
    wanted = speed + (line - offset) / (_CATCH_UP * interval)
    measured = (offset - previous) / interval
    error = (wanted - measured) / (max(abs(start), _LEAST_WAY) / ramp)
    return lambda_ * math.exp(max(-_LARGEST_MOVE, min(_LARGEST_MOVE, _GAIN * error)))


def wanted_offset(start: float, progress: float, ramp: float) -> float:
    """Returns the offset that the aim allows, which rises linearly to 0.

    Args:
      start: the offset at the beginning of the phase.
      progress: share of the phase's mask steps that are done, 0 to 1.
      ramp: share of the mask steps after which the offset is 0.

    Returns:
      The offset; 0 if the masks were at the target from the beginning.
    """
    return min(0.0, start) * max(0.0, 1 - progress / ramp)
