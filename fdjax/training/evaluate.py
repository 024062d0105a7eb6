"""Evaluates a network on a whole split."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fdjax.data import Images, normalize
from fdjax.frozen.score import CONFUSION_CLASSES
from fdjax.graph.masks import MaskedGraph
from fdjax.training.devices import Devices

EVAL_BATCH = 250
Evaluator = Callable[[dict[str, Any], Images, np.ndarray], dict[str, Any]]


class Applied(Protocol):
    """What can be evaluated: a network, or an object with the same `apply`."""

    def apply(self, variables: Any, x: jax.Array, /, *, train: bool) -> Any:
        """Computes logits.

        Args:
          variables: the collections.
          x: normalised images, [B, H, W, C].
          train: False in evaluation.

        Returns:
          Logits, float [B, classes].
        """
        ...


def make_evaluator(
    network: Applied,
    graph: MaskedGraph,
    devices: Devices,
    batch_size: int = EVAL_BATCH,
    between_batches: Callable[[], None] = lambda: None,
) -> Evaluator:
    """Makes the function that evaluates a network.

    The network computes in float32, whatever it was trained in. Batches are sharded over the devices; the last one is
    padded, and the padding is left out of the sums.

    Args:
      network: the network.
      graph: channel graph of the network, with the mean and the standard deviation of its inputs.
      devices: the devices to use.
      batch_size: images in a batch; rounded up to a multiple of the number of devices.
      between_batches: is called before each batch; an exception that it raises ends the evaluation.

    Returns:
      (variables, images uint8 [n, H, W, C], labels int [n]) -> `top1` (a share, 0 to 1), `loss`, `num_examples`; for
      more than 10 classes `top5`; for up to 50 classes `confusion`: for each class, the number of its images that were
      classified as each class. An image with logits that are not finite counts as wrong and is left out of `confusion`;
      the loss is then not finite.
    """
    batch_size = -(-batch_size // len(devices)) * len(devices)

    @functools.partial(jax.jit, out_shardings=devices.everywhere)
    def evaluate_batch(variables, images, labels, weights):
        logits = network.apply(
            variables, normalize(images, graph.input_mean, graph.input_std, jnp.float32), train=False
        )
        assert isinstance(logits, jax.Array)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        own = jnp.take_along_axis(logits, labels[:, None], axis=1)
        # The rank of the right class; ties go to the lower index, as in argmax.
        classes = jnp.arange(logits.shape[1])
        before = (logits > own) | ((logits == own) & (classes < labels[:, None]))
        # Comparisons with NaN are false, so without this the right class would have rank 0.
        finite = jnp.isfinite(logits).all(axis=1)
        rank = jnp.where(finite, before.sum(axis=1), logits.shape[1])
        losses = jnp.where(finite, losses, jnp.nan)
        sums = {"loss": losses, "top1": rank < 1, "top5": rank < 5}
        given = jnp.where(finite, jnp.argmax(logits, axis=1), -1)
        return {name: jnp.sum(jnp.where(weights > 0, value, 0)) for name, value in sums.items()}, given

    def evaluate(variables: dict[str, Any], images: Images, labels: np.ndarray) -> dict[str, Any]:
        variables = devices.replicate(variables)
        totals = {"loss": 0.0, "top1": 0.0, "top5": 0.0}
        confusion = np.zeros((graph.num_classes, graph.num_classes), np.int64)
        for start in range(0, len(images), batch_size):
            between_batches()
            batch, target = images[start : start + batch_size], labels[start : start + batch_size]
            missing = batch_size - len(batch)
            weights = np.pad(np.ones(len(batch), np.float32), (0, missing))
            batch = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))
            on_devices = [devices.split(array) for array in (batch, np.pad(target, (0, missing)), weights)]
            sums, given = jax.device_get(evaluate_batch(variables, *on_devices))
            known = given[: len(target)] >= 0
            np.add.at(confusion, (target[known], given[: len(target)][known]), 1)
            totals = {name: totals[name] + float(sums[name]) for name in totals}
        figures: dict[str, Any] = {name: total / len(images) for name, total in totals.items()}
        if graph.num_classes <= 10:
            figures.pop("top5")
        if graph.num_classes <= CONFUSION_CLASSES:
            figures["confusion"] = confusion.tolist()
        return {**figures, "num_examples": len(images)}

    return evaluate
