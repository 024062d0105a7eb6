"""Checks that a run's numbers are finite: a network with NaN or infinity is never saved and never restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fdjax.errors import RunStopped
from fdjax.zoo import FCMASK

_WORDS = {
    "params": "weight",
    "batch_stats": "statistic",
    FCMASK: "mask",
    "weight_opt": "optimizer state of the weights",
    "mask_opt": "optimizer state of the masks",
    "teacher": "weight of the teacher",
    "lambda_": "penalty's weight",
}


class Diverged(RunStopped):
    """A run whose numbers are not finite."""


def first_nonfinite(tree: Any) -> str | None:
    """Returns the path, with slashes, of the first array of a pytree that is not finite; None if all are finite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        if jax.numpy.issubdtype(array.dtype, jax.numpy.inexact) and not np.isfinite(array).all():
            return jax.tree_util.keystr(path, simple=True, separator="/")
    return None


def nonfinite_network(collections: Mapping[str, Any]) -> str | None:
    """Finds a number in a network that is not possible: one that is not finite, or a running variance below 0.

    Args:
      collections: `params`, `batch_stats`, `fcmask` and other fields of a state, as far as they are present.

    Returns:
      A sentence such as "the weight stem/conv/kernel is not finite"; None if there is no such number.
    """
    for name, word in _WORDS.items():
        found = first_nonfinite(collections.get(name, {}))
        if found is not None:
            return f"the {word} {found}".rstrip() + " is not finite"
    for path, leaf in jax.tree_util.tree_leaves_with_path(collections.get("batch_stats", {})):
        named = jax.tree_util.keystr(path, simple=True, separator="/")
        if named.split("/")[-1] == "var" and (np.asarray(leaf) < 0).any():
            return f"the statistic {named} is a variance below 0"
    return None


def diverged(what: str, phase: str, step: int, learning_rate: float) -> Diverged:
    """Makes the exception that ends a run whose numbers are not finite.

    Args:
      what: a sentence, without its full stop, that says what is not finite.
      phase: the name of the phase.
      step: the step of the run.
      learning_rate: the learning rate of the phase.
    """
    return Diverged(
        f"{what} at step {step} of the run, in {phase}: the run has diverged; lower {phase}.learning_rate "
        f"({learning_rate:g}) and begin again in another --workdir"
    )
