"""Whether a run's numbers are still numbers: a network that is not finite is never saved and never started from."""

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
    """A run whose numbers are no longer finite."""


def first_nonfinite(tree: Any) -> str | None:
    """Names the first array of a pytree that holds NaN or infinity: its path, by slashes; None where all are finite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        if jax.numpy.issubdtype(array.dtype, jax.numpy.inexact) and not np.isfinite(array).all():
            return jax.tree_util.keystr(path, simple=True, separator="/")
    return None


def nonfinite_network(collections: Mapping[str, Any]) -> str | None:
    """Names the first number of a network that no network can have; None where there is none.

    Args:
      collections: `params`, `batch_stats`, `fcmask` and others that a state has, as far as there are any.

    Returns:
      Such as "the weight stem/conv/kernel is not finite"; a running variance below 0 is named likewise, because its
      root is not finite.
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
    """The end of a run whose numbers are no longer finite.

    Args:
      what: is not finite, as a sentence without its full stop.
      phase: its name.
      step: of the run.
      learning_rate: of the phase.
    """
    return Diverged(
        f"{what} at step {step} of the run, in {phase}: the run has diverged; lower {phase}.learning_rate "
        f"({learning_rate:g}) and begin again in another --workdir"
    )
