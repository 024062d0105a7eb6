"""Splits of a training set, and its statistics."""

from __future__ import annotations

import dataclasses

import numpy as np

from fdjax.data.batches import seeded_permutation
from fdjax.data.images import StoredImages, take_rows
from fdjax.data.sources import Dataset
from fdjax.errors import UserError

_SPLIT_STREAM, _LIMIT_STREAM, _SAMPLE_STREAM = 2, 3, 5
# Sample size for a set that is not in memory; the mean is then known to about 1 in 255.
_SAMPLE = 2048
_MIN_STD = 1e-3


def channel_statistics(images_uint8: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Computes each channel's mean and standard deviation.

    Args:
      images_uint8: uint8 [n, H, W, C], not empty.

    Returns:
      The mean and standard deviation, C floats each, in units of 0..255; the latter is at least 0.001. The sums are
      exact.

    Raises:
      ValueError: the images are not uint8 of rank 4, or there is none.
    """
    if images_uint8.dtype != np.uint8 or images_uint8.ndim != 4 or images_uint8.size == 0:
        raise ValueError(f"images must be uint8 [n, H, W, C], not empty; got {images_uint8.dtype} {images_uint8.shape}")
    channels = images_uint8.shape[-1]
    size = images_uint8[0].size
    sums = np.zeros(size, np.int64)
    squares = np.zeros(size, np.int64)
    rows = min(max(1, 2**20 // size), 2**16)  # 2**16 squares of 255 sum to less than 2**32.
    for start in range(0, len(images_uint8), rows):
        chunk = images_uint8[start : start + rows].reshape(-1, size)
        sums += chunk.sum(axis=0, dtype=np.uint32)
        squares += np.square(chunk, dtype=np.uint16).sum(axis=0, dtype=np.uint32)
    sums, squares = (total.reshape(-1, channels).sum(axis=0) for total in (sums, squares))
    count = images_uint8.size // channels
    # Python integers, because in float64 the difference of two large sums loses its last digits.
    variances = [(count * int(q) - int(s) ** 2) / count**2 for s, q in zip(sums, squares, strict=True)]
    mean = tuple(int(s) / count for s in sums)
    return mean, tuple(max(variance**0.5, _MIN_STD) for variance in variances)


def training_statistics(dataset: Dataset, seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Computes `channel_statistics` of the training images, or of a seeded sample of 2,048 if they are on disk."""
    images = dataset.train_images
    if isinstance(images, StoredImages):
        images = images[np.sort(seeded_permutation(len(images), seed, _SAMPLE_STREAM)[:_SAMPLE])]
    assert isinstance(images, np.ndarray)
    return channel_statistics(images)


def split_validation(num_examples: int, labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Holds out a share of the training examples, and as nearly as possible the same share of each class.

    Args:
      num_examples: number of training examples.
      labels: int [num_examples], non-negative.
      share: the share to hold out, 0 to below 1.
      seed: any integer.

    Returns:
      (train_indices, validation_indices), int32, each sorted; together they are 0..num_examples - 1. A class's
      validation count is within 1 of `share` of the class, and no class loses all its examples.

    Raises:
      UserError: `share` is out of range, or so small that it holds out nothing.
      ValueError: `labels` does not have `num_examples` entries.
    """
    labels = np.asarray(labels)
    if labels.shape != (num_examples,):
        raise ValueError(f"labels must have shape ({num_examples},); got {labels.shape}")
    if not 0 <= share < 1:
        raise UserError(f"the validation share is {share}; it must be at least 0 and below 1")
    everything = np.arange(num_examples, dtype=np.int32)
    if share == 0:
        return everything, everything[:0]
    order = seeded_permutation(num_examples, seed, _SPLIT_STREAM)
    _, counts = np.unique(labels, return_counts=True)
    wanted = share * counts
    held_out = np.minimum(np.floor(wanted).astype(np.int64), counts - 1)
    # Largest remainders, because rounding class by class could hold out nothing if classes are small.
    missing = round(share * num_examples) - int(held_out.sum())
    by_remainder = np.argsort(held_out - wanted, kind="stable")
    open_classes = by_remainder[(held_out + 1 < counts)[by_remainder] & (held_out < wanted)[by_remainder]]
    held_out[open_classes[: max(missing, 0)]] += 1
    if held_out.sum() == 0:
        raise UserError(f"a validation share of {share} of {num_examples} training examples holds out none of them")
    validation = _first_of_each_class(order, labels, counts, held_out)
    return np.setdiff1d(everything, validation, assume_unique=True), validation


def _first_of_each_class(order: np.ndarray, labels: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the first `wanted` examples of each class in an order, sorted; `counts` is each class's number."""
    by_class = order[np.argsort(labels[order], kind="stable")]
    parts = np.split(by_class, np.cumsum(counts)[:-1])
    return np.sort(np.concatenate([part[:count] for part, count in zip(parts, wanted, strict=True)]))


def limit_training(dataset: Dataset, limit: int | None, seed: int) -> Dataset:
    """Keeps `limit` of the training examples (seeded), the same share of each class; None keeps all.

    Raises:
      UserError: there are fewer examples than `limit`.
    """
    count = len(dataset.train_labels)
    if limit is None or limit == count:
        return dataset
    if limit > count:
        raise UserError(f"data.train_limit is {limit:,}, but {dataset.name} has {count:,} training images")
    order = seeded_permutation(count, seed, _LIMIT_STREAM)
    _, counts = np.unique(dataset.train_labels, return_counts=True)
    # Largest remainders in integers: `limit` is met exactly, and no class needs more examples than it has.
    kept_of_class, remainders = np.divmod(counts * limit, count)
    kept_of_class[np.argsort(-remainders, kind="stable")[: limit - int(kept_of_class.sum())]] += 1
    kept = _first_of_each_class(order, dataset.train_labels, counts, kept_of_class)
    return dataclasses.replace(
        dataset, train_images=take_rows(dataset.train_images, kept), train_labels=dataset.train_labels[kept]
    )
