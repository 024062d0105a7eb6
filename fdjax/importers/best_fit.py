"""Which of our networks weights are of, by the shapes of their kernels alone."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping

import numpy as np

from fdjax.zoo import MOBILENETS, RESNETS, FrequencyNetwork, MobileNet, ResNet

_WIDTHS = (1.0, 0.25, 0.35, 0.5, 0.75, 1.3, 1.4)
# Any size does: shapes of kernels do not depend on it.
_INPUT = (64, 64, 3)
# Below this share of the kernels in common there is no point in naming a network.
_LEAST = 0.5


def best_fit(tensors: Mapping[str, np.ndarray], width: float) -> str:
    """A sentence that names the network whose kernels have most shapes in common with a file's; "" where none has half.

    Args:
      tensors: by name.
      width: to try beside the common ones.
    """
    theirs = collections.Counter(_signature(tensor.shape) for tensor in tensors.values() if tensor.ndim > 1)
    if not theirs:
        return ""
    best, name, common = 0.0, "", 0
    for variant, multiplier, network in _candidates(width):
        ours = collections.Counter(_kernels(network))
        shared = (ours & theirs).total()
        score = shared / (ours | theirs).total()
        if score > best:
            best, name, common = score, f"--model.name {variant} --model.width {multiplier:g}", shared
    if best < _LEAST:
        return "No network of fdjax has kernels like these"
    return f"The network that fits best is {name}: {common} of the file's {theirs.total()} kernels have its shapes"


def _candidates(width: float) -> Iterator[tuple[str, float, FrequencyNetwork]]:
    for multiplier in dict.fromkeys((1.0, width, *_WIDTHS)):
        for variant in MOBILENETS:
            yield variant, multiplier, MobileNet(variant=variant, width=multiplier).without_masks()
        for variant in RESNETS:
            yield variant, multiplier, ResNet(variant=variant, width=multiplier).without_masks()


def _kernels(network: FrequencyNetwork) -> Iterator[tuple[int, ...]]:
    """Of all layers but the classifier, whose outputs are anybody's."""
    for layer in network.spec(_INPUT).layers[:-1]:
        window = (layer.window, layer.window)
        if layer.kind == "depthwise":
            yield _signature((*window, layer.in_channels))
        else:
            yield _signature((*window, layer.in_channels // layer.groups, layer.out_channels))


def _signature(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The same for a kernel in any framework's layout."""
    return tuple(sorted(side for side in shape if side > 1))
