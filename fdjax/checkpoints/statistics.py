"""Measures the statistics of batch norm for a network whose channels or coefficients have been removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fdjax.data import normalize
from fdjax.graph.masks import MaskedGraph

# The collection, nested; each batch norm has `mean` and `var`, float [C].
Statistics = Mapping[str, Any]

_BATCH = 64
# A variance counts as at least this share of the trained one, so that a channel that is silent on the images measured
# keeps its statistics.
_FLOOR = 1e-3


class Trainable(Protocol):
    """What statistics can be measured of: a network whose running averages have momentum 0."""

    def apply(self, variables: Any, x: jax.Array, /, *, train: bool, mutable: Any) -> Any:
        """Computes logits and the updated collections.

        Args:
          variables: the collections.
          x: normalised images, [B, H, W, C].
          train: True.
          mutable: ["batch_stats"].

        Returns:
          Logits, float [B, classes], and the collections that have changed.
        """
        ...


def make_statistics(network: Trainable, graph: MaskedGraph) -> Callable[[Any, np.ndarray], dict[str, Any]]:
    """Makes the function that measures the means and variances that batch norm meets in training.

    Every batch of 64 images is normalised by its own statistics, layer after layer, as in training. Means and variances
    are those of all batches together.

    Args:
      network: the network; the momentum of its running averages is 0, so that they become those of the batch.
      graph: channel graph of the network, with the scaling of images.

    Returns:
      (variables, images uint8 [n, H, W, C]) -> the collection batch_stats, float64.
    """

    @jax.jit
    def of_batch(variables: Any, images: jax.Array) -> Any:
        x = normalize(images, graph.input_mean, graph.input_std)
        return network.apply(variables, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    def measure(variables: Any, images: np.ndarray) -> dict[str, Any]:
        moments: dict[tuple[str, ...], Any] = {}
        # The batches have at most two sizes, so that at most two programs are compiled.
        for batch in np.array_split(images, -(-len(images) // _BATCH)):
            found = {path: np.asarray(value, np.float64) for path, value in _flat(of_batch(variables, batch)).items()}
            for path, value in found.items():
                moment = value if path[-1] == "mean" else value + found[(*path[:-1], "mean")] ** 2
                moments[path] = moments.get(path, 0) + moment * len(batch) / len(images)
        return unflatten_dict(
            {
                path: moment if path[-1] == "mean" else np.maximum(moment - moments[(*path[:-1], "mean")] ** 2, 0)
                for path, moment in moments.items()
            }
        )

    return measure


def corrected_statistics(trained: Statistics, before: Statistics, after: Statistics) -> dict[str, Any]:
    """Corrects trained statistics by how removing channels or coefficients changes those of a few images.

    A variance changes in the ratio of those measured, and how far a trained mean is from the measured one in the ratio
    of the deviations. What is particular to the images measured cancels, and a network from which nothing is removed
    keeps its statistics.

    Args:
      trained: the statistics of training.
      before: those of the unpruned network on the images.
      after: those of the pruned network on the same images.

    Returns:
      The statistics of the pruned network, float32.
    """
    flat_trained, flat_before, flat_after = _flat(trained), _flat(before), _flat(after)
    found: dict[tuple[str, ...], Any] = {}
    for path, values in flat_trained.items():
        if path[-1] != "var":
            continue
        mean_at, var = (*path[:-1], "mean"), np.asarray(values, np.float64)
        floor = np.maximum(_FLOOR * var, np.finfo(np.float32).tiny)
        ratio = (flat_after[path] + floor) / (flat_before[path] + floor)
        shift = np.asarray(flat_trained[mean_at], np.float64) - flat_before[mean_at]
        found[mean_at], found[path] = flat_after[mean_at] + shift * np.sqrt(ratio), var * ratio
    return unflatten_dict({path: values.astype(np.float32) for path, values in found.items()})


def _flat(tree: Statistics) -> dict[tuple[str, ...], Any]:
    return flatten_dict(tree)  # type: ignore[return-value]
