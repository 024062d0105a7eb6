"""Matches layers by order and shape, for files in which only the names differ."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]
_LEAF = re.compile(
    r"^(?P<module>.*?)[._/]?(?P<leaf>weight|kernel|bias|running_mean|running_var|gamma|beta|moving_mean|"
    r"moving_variance|scale|mean|var)$"
)
_NORM_LEAVES = {
    "scale": ("weight", "gamma", "scale"),
    "bias": ("bias", "beta"),
    "mean": ("running_mean", "moving_mean", "mean"),
    "var": ("running_var", "moving_variance", "var"),
}


class Wanted(NamedTuple):
    """A layer to be found.

    Attributes:
      ours: its path in our network.
      kernels: the shapes that its kernel may have in the file.
      bias: whether it has a bias.
      norm_channels: channels of its batch norm; 0 if it has none.
    """

    ours: str
    kernels: tuple[Shape, ...]
    bias: bool
    norm_channels: int


class Matched(NamedTuple):
    """The names of a layer's variables in the file.

    Attributes:
      kernel: name of the kernel.
      bias: name of the bias; None if there is none.
      norm: "scale", "bias", "mean", "var" -> name; empty if there is no batch norm.
    """

    kernel: str
    bias: str | None
    norm: dict[str, str]


class Match(NamedTuple):
    """The whole mapping.

    Attributes:
      layers: our path -> names in the file.
      problems: what was not found, in words; empty if everything was.
      left: names in the file that match no layer.
      in_order: whether the file holds the layers in our order.
    """

    layers: dict[str, Matched]
    problems: list[str]
    left: list[str]
    in_order: bool


def match(tensors: Mapping[str, np.ndarray], wanted: Sequence[Wanted]) -> Match:
    """Gives each layer in turn the first kernel of its shape in the file that no earlier layer has taken.

    Batch norms are matched in the same way, by their number of channels.

    Args:
      tensors: name -> array, in the order of the file.
      wanted: the network's layers, in the order in which they are computed.

    Returns:
      The mapping, with what was not found and what is left over.
    """
    modules: dict[str, dict[str, str]] = {}
    for name in tensors:
        found = _LEAF.match(name)
        if found:
            modules.setdefault(found["module"], {})[found["leaf"]] = name
    kernels = {module: leaves for module, leaves in modules.items() if _kernel_of(leaves, tensors) is not None}
    norms = {module: norm for module, leaves in modules.items() if module not in kernels and (norm := _norm(leaves))}
    layers: dict[str, Matched] = {}
    problems, places = [], []
    for layer in wanted:

        def fits(module: str, layer: Wanted = layer) -> bool:
            kernel = _kernel_of(kernels[module], tensors)
            return tensors[kernel or ""].shape in layer.kernels and (not layer.bias or "bias" in kernels[module])

        module = _take(kernels, fits)
        if module is None:
            shape = "x".join(map(str, layer.kernels[0]))
            problems.append(f"{layer.ours} (a kernel of {shape}{' with a bias' if layer.bias else ''})")
            continue
        leaves, places = kernels.pop(module), [*places, list(modules).index(module)]
        norm: dict[str, str] = {}
        if layer.norm_channels:

            def has_channels(module: str, layer: Wanted = layer) -> bool:
                return all(tensors[name].shape == (layer.norm_channels,) for name in norms[module].values())

            normed = _take(norms, has_channels)
            if normed is None:
                problems.append(f"{layer.ours}_norm (a batch norm of {layer.norm_channels} channels)")
                continue
            norm = norms.pop(normed)
        layers[layer.ours] = Matched(
            _kernel_of(leaves, tensors) or "", leaves.get("bias") if layer.bias else None, norm
        )
    used = {name for one in layers.values() for name in (one.kernel, one.bias, *one.norm.values())}
    left = [name for name in tensors if name not in used and not name.endswith("num_batches_tracked")]
    return Match(layers, problems, left, places == sorted(places))


def _kernel_of(leaves: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> str | None:
    return next(
        (leaves[leaf] for leaf in ("weight", "kernel") if leaf in leaves and tensors[leaves[leaf]].ndim > 1), None
    )


def _norm(leaves: Mapping[str, str]) -> dict[str, str]:
    """Returns the names of a batch norm's variables; empty if some are missing."""
    names = {
        ours: next((leaves[leaf] for leaf in theirs if leaf in leaves), None) for ours, theirs in _NORM_LEAVES.items()
    }
    return {ours: name for ours, name in names.items() if name is not None} if None not in names.values() else {}


def _take(modules: Mapping[str, dict[str, str]], fits: Callable[[str], bool]) -> str | None:
    return next((module for module in modules if fits(module)), None)
