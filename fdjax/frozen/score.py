"""Accuracy of any function from images to logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fdjax.errors import UserError

BATCH = 250


def all_logits(predict: Callable[[np.ndarray], jax.Array], images: Any, batch: int = BATCH) -> np.ndarray:
    """`predict` on images [n, H, W, C], one batch of one size at a time: logits [n, num_classes].

    `images`: an array, or anything that gives arrays for slices.
    """
    batch, found = max(1, min(batch, len(images))), []
    for start in range(0, len(images), batch):
        chunk = images[start : start + batch]
        filled = np.pad(chunk, ((0, batch - len(chunk)), (0, 0), (0, 0), (0, 0)))
        found.append(np.asarray(predict(filled))[: len(chunk)])
    return np.concatenate(found)


def figures(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """top1, top5 (beyond 10 classes), loss (cross-entropy, nats) and num_examples of logits [n, c]; labels [n].

    Of equal logits the one with the lower index goes first, as `argmax` has it. An image with a logit that is not
    finite is answered wrongly, and the loss is then not a number.
    """
    finite = np.all(np.isfinite(logits), axis=1, keepdims=True)
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    before = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < labels[:, None]))
    rank = np.where(finite[:, 0], before.sum(axis=1), logits.shape[1])
    logits = np.where(finite, logits, np.nan)
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=1))
    losses = log_sums - np.take_along_axis(shifted, labels[:, None], axis=1)[:, 0]
    found = {"loss": float(losses.mean()), "top1": float((rank < 1).mean())}
    if logits.shape[1] > 10:
        found["top5"] = float((rank < 5).mean())
    return {**found, "num_examples": len(labels)}


def check_finite(logits: np.ndarray, what: str) -> None:
    """Raises `UserError` unless all logits [n, c] are finite; `what` is the network that gave them."""
    wrong = int((~np.isfinite(logits).all(axis=1)).sum())
    if wrong:
        raise UserError(
            f"{what} gives logits that are not finite for {wrong:,} of {len(logits):,} images: its training has "
            "diverged; give another one, such as an earlier checkpoint (--which)"
        )


def agreement(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """How near logits [n, c] are to others.

    Returns:
      same_top1: the share of images for which the highest logit is the same; relative_error: the largest difference
      beside the largest logit, infinite where a logit is not finite.
    """
    finite = np.isfinite(found).all(axis=1) & np.isfinite(expected).all(axis=1)
    same = (found.argmax(axis=1) == expected.argmax(axis=1)) & finite
    if not finite.all():
        return {"same_top1": float(same.mean()), "relative_error": float("inf")}
    error = np.abs(found - expected).max() / max(float(np.abs(expected).max()), np.finfo(np.float32).tiny)
    return {"same_top1": float(same.mean()), "relative_error": float(error)}
