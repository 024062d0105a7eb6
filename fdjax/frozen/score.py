"""Measures the accuracy of any function from images to logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fdjax.errors import UserError

BATCH = 250
# With more classes a confusion matrix is too large to read and to store in a summary.
CONFUSION_CLASSES = 50


def all_logits(predict: Callable[[np.ndarray], jax.Array], images: Any, batch: int = BATCH) -> np.ndarray:
    """Computes the logits of images, batch by batch.

    Args:
      predict: images [B, H, W, C] -> logits [B, classes].
      images: uint8 [n, H, W, C]; an array, or an object whose slices are arrays.
      batch: the batch size; the last batch is padded to it.

    Returns:
      Logits, [n, classes].
    """
    batch, found = max(1, min(batch, len(images))), []
    for start in range(0, len(images), batch):
        chunk = images[start : start + batch]
        filled = np.pad(chunk, ((0, batch - len(chunk)), (0, 0), (0, 0), (0, 0)))
        found.append(np.asarray(predict(filled))[: len(chunk)])
    return np.concatenate(found)


def figures(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Computes accuracy and loss.

    Ties go to the class with the lower index, as in `argmax`. An image with logits that are not finite counts as wrong,
    and the loss is then NaN.

    Args:
      logits: [n, classes].
      labels: int [n].

    Returns:
      `top1`, a share, 0 to 1; `top5` for more than 10 classes; `loss`, the mean cross entropy in nats; `num_examples`;
      for up to 50 classes `confusion`, the confusion matrix: rows are the classes of images, columns the predicted
      classes. Images with logits that are not finite are in none of its columns.
    """
    finite = np.all(np.isfinite(logits), axis=1, keepdims=True)
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    before = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < labels[:, None]))
    rank = np.where(finite[:, 0], before.sum(axis=1), logits.shape[1])
    logits = np.where(finite, logits, np.nan)
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=1))
    losses = log_sums - np.take_along_axis(shifted, labels[:, None], axis=1)[:, 0]
    found: dict[str, Any] = {"loss": float(losses.mean()), "top1": float((rank < 1).mean())}
    if logits.shape[1] > 10:
        found["top5"] = float((rank < 5).mean())
    if logits.shape[1] <= CONFUSION_CLASSES:
        confusion = np.zeros((logits.shape[1],) * 2, np.int64)
        np.add.at(confusion, (labels[finite[:, 0]], logits[finite[:, 0]].argmax(axis=1)), 1)
        found["confusion"] = confusion.tolist()
    return {**found, "num_examples": len(labels)}


def check_finite(logits: np.ndarray, what: str) -> None:
    """Checks that all logits are finite.

    Args:
      logits: [n, classes].
      what: the network that computed them, for the message.

    Raises:
      UserError: if a logit is not finite.
    """
    wrong = int((~np.isfinite(logits).all(axis=1)).sum())
    if wrong:
        raise UserError(
            f"{what} gives logits that are not finite for {wrong:,} of {len(logits):,} images: its training has "
            "diverged; give another one, such as an earlier checkpoint (--which)"
        )


def agreement(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Compares logits with others.

    Args:
      found: [n, classes].
      expected: [n, classes].

    Returns:
      `same_top1`, the share of images with the same highest logit; `relative_error`, the largest difference over the
      largest logit, infinite if a logit is not finite.
    """
    finite = np.isfinite(found).all(axis=1) & np.isfinite(expected).all(axis=1)
    same = (found.argmax(axis=1) == expected.argmax(axis=1)) & finite
    if not finite.all():
        return {"same_top1": float(same.mean()), "relative_error": float("inf")}
    error = np.abs(found - expected).max() / max(float(np.abs(expected).max()), np.finfo(np.float32).tiny)
    return {"same_top1": float(same.mean()), "relative_error": float(error)}
