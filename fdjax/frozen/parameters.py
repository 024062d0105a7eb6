"""A trained network's kernels and batch norms, read by path and ready to be folded, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Variables = Mapping[str, Any]


class Parameters:
    """The collections `params` and `batch_stats`.

    Args:
      variables: the two, nested dicts of arrays.
      epsilon: of every batch norm.
    """

    def __init__(self, variables: Variables, epsilon: float):
        self._params, self._stats, self._epsilon = variables["params"], variables["batch_stats"], epsilon

    def at(self, path: str) -> np.ndarray:
        """The parameter at a path such as "block03/expand/kernel".

        Raises:
          ValueError: there is none.
        """
        return _at(self._params, path)

    def batch_norm(self, path: str) -> tuple[np.ndarray, np.ndarray]:
        """(slope, shift) of a batch norm with its running averages.

        Raises:
          ValueError: there is none.
        """
        scale, bias = (_at(self._params, f"{path}/{name}") for name in ("scale", "bias"))
        mean, var = (_at(self._stats, f"{path}/{name}") for name in ("mean", "var"))
        slope = scale / np.sqrt(var + self._epsilon)
        return slope, bias - mean * slope


def _at(tree: Variables, path: str) -> np.ndarray:
    node: Any = tree
    for key in path.split("/"):
        if not isinstance(node, Mapping) or key not in node:
            raise ValueError(f"the variables have no {path}")
        node = node[key]
    return np.asarray(node, np.float64)
