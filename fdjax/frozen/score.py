"""Accuracy of any function from images to logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

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

    Of equal logits the one with the lower index goes first, as `argmax` has it.
    """
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    before = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < labels[:, None]))
    rank = before.sum(axis=1)
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=1))
    losses = log_sums - np.take_along_axis(shifted, labels[:, None], axis=1)[:, 0]
    found = {"loss": float(losses.mean()), "top1": float((rank < 1).mean())}
    if logits.shape[1] > 10:
        found["top5"] = float((rank < 5).mean())
    return {**found, "num_examples": len(labels)}


def agreement(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """How near logits [n, c] are to others.

    Returns:
      same_top1: the share of images for which the highest logit is the same; relative_error: the largest difference
      beside the largest logit.
    """
    same = found.argmax(axis=1) == expected.argmax(axis=1)
    error = np.abs(found - expected).max() / max(float(np.abs(expected).max()), np.finfo(np.float32).tiny)
    return {"same_top1": float(same.mean()), "relative_error": float(error)}
