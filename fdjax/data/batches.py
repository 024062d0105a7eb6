"""The examples of each batch, as pure functions of the seed, the epoch and the step, so that a run can resume."""

from __future__ import annotations

import functools

import numpy as np

from fdjax.errors import UserError

_EPOCH_STREAM = 1


def seeded_permutation(num_examples: int, seed: int, *stream: int) -> np.ndarray:
    """Returns a random order of 0..num_examples - 1.

    Args:
      num_examples: number of examples, 0 or more.
      seed: any integer (taken modulo 2**64).
      *stream: non-negative numbers that distinguish the uses of one seed.

    Returns:
      int32 [num_examples], the same for the same arguments on every machine and with every version of NumPy.
    """
    # NumPy guarantees the raw streams of its bit generators across versions, but not its shuffles.
    bits = np.random.Philox(np.random.SeedSequence(seed % 2**64, spawn_key=stream))
    return np.argsort(bits.random_raw(num_examples), kind="stable").astype(np.int32)


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """Returns the order in which an epoch visits the training examples.

    Args:
      seed: any integer.
      epoch: number of the epoch, 0 or more.
      num_examples: number of training examples.

    Returns:
      int32 [num_examples], a permutation of 0..num_examples - 1 that depends on the arguments only.

    Raises:
      ValueError: `epoch` is negative.
    """
    if epoch < 0:
        raise ValueError(f"epoch is {epoch}; it must be 0 or more")
    return seeded_permutation(num_examples, seed, _EPOCH_STREAM, epoch)


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Returns the number of whole batches in an epoch; training drops an incomplete last batch.

    Raises:
      UserError: `batch_size` is below 1 or above `num_examples`.
    """
    if batch_size < 1:
        raise UserError(f"the batch size is {batch_size}; it must be at least 1")
    if batch_size > num_examples:
        raise UserError(f"the batch size is {batch_size}, but there are only {num_examples} training examples")
    return num_examples // batch_size


def batch_indices(order: np.ndarray, step: int, batch_size: int) -> np.ndarray:
    """Returns the examples of one training step.

    Args:
      order: int [n], from `epoch_order`.
      step: the step within the epoch, 0..steps_per_epoch - 1.
      batch_size: number of examples per step.

    Returns:
      int [batch_size], a slice of `order`.

    Raises:
      ValueError: the epoch has no such step.
    """
    start = step * batch_size
    if batch_size < 1 or step < 0 or start + batch_size > len(order):
        raise ValueError(f"an epoch of {len(order)} examples has no step {step} of {batch_size} examples")
    return order[start : start + batch_size]


class TrainingOrder:
    """The training examples of each step of a run.

    Args:
      seed: any integer.
      indices: int [n], the examples to train on.
      batch_size: number of examples per step.

    Raises:
      UserError: there are fewer examples than a batch has.
    """

    def __init__(self, seed: int, indices: np.ndarray, batch_size: int):
        self.per_epoch = steps_per_epoch(len(indices), batch_size)
        self._batch_size = batch_size

        # Threads that prefetch need the next epoch's order while the last steps of this epoch are still requested.
        @functools.lru_cache(2)
        def order(epoch: int) -> np.ndarray:
            return indices[epoch_order(seed, epoch, len(indices))]

        self._order = order

    def rows(self, step: int) -> np.ndarray:
        """Returns the examples of a step.

        Args:
          step: number of the step in the run, 0 or more.

        Returns:
          int [batch_size].
        """
        epoch, at = divmod(step, self.per_epoch)
        return batch_indices(self._order(epoch), at, self._batch_size)
