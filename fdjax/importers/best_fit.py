"""The network of the zoo that weights belong to, found by the shapes of their kernels alone."""

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
# Any size will do, because the shapes of kernels do not depend on it.
_INPUT = (64, 64, 3)
# Below this share of kernels in common, no network is named.
_LEAST = 0.5
# Number of variants to compare in detail.
_TRIED = 3


def best_fit(tensors: Mapping[str, np.ndarray], width: float) -> str:
    """Names the network that has the most kernel shapes in common with a file.

    Args:
      tensors: name -> array.
      width: a width multiplier to try besides the common ones.

    Returns:
      A sentence that names the network, or says that there is none; "" if the file has no kernels.
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
    """Yields the variants with the most similar numbers of kernels, at every width."""
    # The number does not depend on the width, and is found quickest at a small one.
    numbers = {variant: len(_kernels(variant, _WIDTHS[1])) for variant in (*MOBILENETS, *RESNETS)}
    nearest = sorted(numbers, key=lambda variant: abs(numbers[variant] - kernels))[:_TRIED]
    for multiplier in dict.fromkeys((1.0, width, *_WIDTHS)):
        for variant in nearest:
            yield variant, multiplier


@functools.cache
def _kernels(variant: str, width: float) -> tuple[tuple[int, ...], ...]:
    """Returns the kernels of all layers except the classifier, whose number of outputs varies."""
    made = MobileNet if variant in MOBILENETS else ResNet
    network = made(variant=variant, width=width).without_masks()
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, *_INPUT))))
    flat: dict[tuple[str, ...], Any] = flatten_dict(shapes["params"])  # type: ignore[assignment]
    return tuple(_signature(leaf.shape) for path, leaf in flat.items() if leaf.ndim > 1 and path[0] != "classifier")


def _signature(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a key that is the same for a kernel in any framework's layout."""
    return tuple(sorted(side for side in shape if side > 1))
