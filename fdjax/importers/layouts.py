"""How frameworks store the variables of a network: shapes, layouts and suffixes of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from fdjax.importers.formats import Framework

Shape = tuple[int, ...]
CLASSIFIER = "classifier"


class Layout(NamedTuple):
    """How a framework stores a variable: its shape there, and the conversion to our layout."""

    shape: Callable[[Shape], Shape]
    to_ours: Callable[[np.ndarray], np.ndarray]


# By kind of layer. Our layouts: conv [h, w, C, D], pointwise and dense [C, D], depthwise [h, w, C].
KERNELS: Mapping[Framework, Mapping[str, Layout]] = {
    "torch": {
        "conv": Layout(lambda s: (s[3], s[2], s[0], s[1]), lambda k: k.transpose(2, 3, 1, 0)),
        "pointwise": Layout(lambda s: (s[1], s[0], 1, 1), lambda k: k[:, :, 0, 0].T),
        "depthwise": Layout(lambda s: (s[2], 1, s[0], s[1]), lambda k: k[:, 0].transpose(1, 2, 0)),
        "dense": Layout(lambda s: (s[1], s[0]), lambda k: k.T),
    },
    "keras": {
        "conv": Layout(lambda s: s, lambda k: k),
        "pointwise": Layout(lambda s: (1, 1, *s), lambda k: k[0, 0]),
        "depthwise": Layout(lambda s: (*s, 1), lambda k: k[..., 0]),
        "dense": Layout(lambda s: s, lambda k: k),
    },
}
VECTOR = Layout(lambda s: s, lambda v: v)
SUFFIXES: Mapping[Framework, Mapping[str, str]] = {
    "torch": {
        "kernel": ".weight", "bias": ".bias",
        "norm scale": ".weight", "norm bias": ".bias", "norm mean": ".running_mean", "norm var": ".running_var",
    },
    "keras": {
        "kernel": "/kernel", "bias": "/bias",
        "norm scale": "/gamma", "norm bias": "/beta", "norm mean": "/moving_mean", "norm var": "/moving_variance",
    },
}  # fmt: skip


class Variable(NamedTuple):
    """One of our variables: its path and shape here, and its name and layout in the file."""

    path: str
    shape: Shape
    name: str
    layout: Layout
