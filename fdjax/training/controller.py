"""The controller on lambda: it brings the masks to the target by `learn.ramp` of the phase, and holds them there.

What it measures is the offset from the target: (target - MAC ratio) / (1 - target), -1 for the dense network and 0 at
the target. On the way down the ratio is that of expected MACs, which moves with every mask; the count of rounded masks
stays where it is while masks come down from 1 to where they are rounded down. From the ramp on it is that count, after
the gate: what is to meet the target. The controller asks the offset to follow a parabola that comes to rest there (what
is left last is missed most), and scales lambda by how the measured speed compares with the speed asked for.
"""

from __future__ import annotations

import math

import numpy as np

from fdjax.config import LearnConfig
from fdjax.graph.masks import MaskedGraph

# The share of the speed by which lambda's logarithm answers an error, and the most it moves at once.
_GAIN = 0.5
_LARGEST_MOVE = math.log(1.5)
# Where the way to go is shorter, speeds are compared with that of this one.
_LEAST_WAY = 0.2
# An error of the offset is to be made good within this many intervals.
_CATCH_UP = 4
# Lambda begins low: masks that it moves too early it moves all at once.
_FIRST = 0.2


def first_lambda(learn: LearnConfig, graph: MaskedGraph, mask_steps: int) -> float:
    """A fifth of the lambda whose push alone would bring a middling channel's mask down by 0.5 in time.

    With sgd the speed of a mask is lr / (1 - momentum) * lambda * d penalty / d mask.
    """
    if learn.lambda_ is not None:
        return learn.lambda_
    if learn.penalty == "fcmask":
        slopes = np.concatenate([np.full(channels, 1 / channels) for channels, _ in graph.mask_sizes.values()])
    else:
        dense = sum(layer.dense_macs for layer in graph.counted_layers.values())
        wrapped = graph.wrapped_layers.values()
        slopes = np.concatenate([np.full(layer.in_channels, layer.dense_macs / dense / layer.in_channels)
                                 for layer in wrapped])  # fmt: skip
    speed = 0.5 / max(1.0, learn.ramp * mask_steps)
    rate = learn.learning_rate / (1 - learn.momentum if learn.optimizer == "sgd" else 1.0)
    return float(_FIRST * speed / (rate * np.median(slopes)))


def next_lambda(
    lambda_: float, offset: float, previous: float, start: float, progress: float, interval: float, ramp: float
) -> float:
    """Scales lambda after one interval of mask learning.

    Args:
      lambda_: in force.
      offset: measured now.
      previous: measured one interval ago.
      start: measured when the phase began: about -1, or near 0 where masks have been learned before.
      progress: share of the phase's mask steps that are done, 0 to 1.
      interval: share of them since `previous`.
      ramp: share of them by which the offset should be 0.
    """
    left = max(0.0, 1 - progress / ramp)
    line, speed = start * left**2, -2 * start * left / ramp
    wanted = speed + (line - offset) / (_CATCH_UP * interval)
    measured = (offset - previous) / interval
    error = (wanted - measured) / (max(abs(start), _LEAST_WAY) / ramp)
    return lambda_ * math.exp(max(-_LARGEST_MOVE, min(_LARGEST_MOVE, _GAIN * error)))
