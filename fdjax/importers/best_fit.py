"""Which of our networks weights are of, by the shapes of their kernels alone."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from fdjax.zoo import MOBILENETS, RESNETS, MobileNet, ResNet

_WIDTHS = (1.0, 0.25, 0.35, 0.5, 0.75, 1.3, 1.4)
# Any size does: shapes of kernels do not depend on it.
_INPUT = (64, 64, 3)
# Below this share of the kernels in common there is no point in naming a network.
_LEAST = 0.5
# Variants that are looked at more closely.
_TRIED = 3


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
    for variant, multiplier in _candidates(width, theirs.total()):
        if best == 1:
            break
        ours = collections.Counter(_kernels(variant, multiplier))
        shared = (ours & theirs).total()
        score = shared / (ours | theirs).total()
        if score > best:
            best, name, common = score, f"--model.name {variant} --model.width {multiplier:g}", shared
    if best < _LEAST:
        return "No network of fdjax has kernels like these"
    return f"The network that fits best is {name}: {common} of the file's {theirs.total()} kernels have its shapes"


def _candidates(width: float, kernels: int) -> Iterator[tuple[str, float]]:
    """The variants that have the most similar number of kernels, at every width."""
    # The number does not depend on the width; at a small one it is soon told.
    numbers = {variant: len(_kernels(variant, _WIDTHS[1])) for variant in (*MOBILENETS, *RESNETS)}
    nearest = sorted(numbers, key=lambda variant: abs(numbers[variant] - kernels))[:_TRIED]
    for multiplier in dict.fromkeys((1.0, width, *_WIDTHS)):
        for variant in nearest:
            yield variant, multiplier


@functools.cache
def _kernels(variant: str, width: float) -> tuple[tuple[int, ...], ...]:
    """Of all layers but the classifier, whose outputs are anybody's."""
    made = MobileNet if variant in MOBILENETS else ResNet
    network = made(variant=variant, width=width).without_masks()
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, *_INPUT))))
    flat: dict[tuple[str, ...], Any] = flatten_dict(shapes["params"])  # type: ignore[assignment]
    return tuple(_signature(leaf.shape) for path, leaf in flat.items() if leaf.ndim > 1 and path[0] != "classifier")


def _signature(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The same for a kernel in any framework's layout."""
    return tuple(sorted(side for side in shape if side > 1))
