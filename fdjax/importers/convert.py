"""Foreign tensors as variables of our networks: names mapped, layouts turned, all that does not fit told at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fdjax.errors import UserError
from fdjax.importers.formats import FORMATS, Format, Framework
from fdjax.importers.names import Layer, layers_of
from fdjax.spec import NetworkSpec
from fdjax.zoo import FrequencyNetwork

Shape = tuple[int, ...]


class _Layout(NamedTuple):
    """How a framework stores a variable: the shape that it has there, and the way from there to ours."""

    shape: Callable[[Shape], Shape]
    to_ours: Callable[[np.ndarray], np.ndarray]


# By kind of layer (`LayerSpec.kind`). Ours: conv [h, w, C, D], pointwise and dense [C, D], depthwise [h, w, C].
_KERNELS: Mapping[Framework, Mapping[str, _Layout]] = {
    "torch": {
        "conv": _Layout(lambda s: (s[3], s[2], s[0], s[1]), lambda k: k.transpose(2, 3, 1, 0)),
        "pointwise": _Layout(lambda s: (s[1], s[0], 1, 1), lambda k: k[:, :, 0, 0].T),
        "depthwise": _Layout(lambda s: (s[2], 1, s[0], s[1]), lambda k: k[:, 0].transpose(1, 2, 0)),
        "dense": _Layout(lambda s: (s[1], s[0]), lambda k: k.T),
    },
    "keras": {
        "conv": _Layout(lambda s: s, lambda k: k),
        "pointwise": _Layout(lambda s: (1, 1, *s), lambda k: k[0, 0]),
        "depthwise": _Layout(lambda s: (*s, 1), lambda k: k[..., 0]),
        "dense": _Layout(lambda s: s, lambda k: k),
    },
}
_VECTOR = _Layout(lambda s: s, lambda v: v)
_SUFFIXES: Mapping[Framework, Mapping[str, str]] = {
    "torch": {
        "kernel": ".weight", "bias": ".bias",
        "norm scale": ".weight", "norm bias": ".bias", "norm mean": ".running_mean", "norm var": ".running_var",
    },
    "keras": {
        "kernel": "/kernel", "bias": "/bias",
        "norm scale": "/gamma", "norm bias": "/beta", "norm mean": "/moving_mean", "norm var": "/moving_variance",
    },
}  # fmt: skip
# Counters that have no part in what a network computes.
_IGNORED = ("num_batches_tracked",)
_NORM_COLLECTIONS = {"scale": "params", "bias": "params", "mean": "batch_stats", "var": "batch_stats"}


class _Variable(NamedTuple):
    """One of our variables: where it goes, its shape here, and what it is called and looks like in the file."""

    path: str
    shape: Shape
    name: str
    layout: _Layout


def convert(
    tensors: Mapping[str, np.ndarray], source: str, network: FrequencyNetwork, spec: NetworkSpec, width: float
) -> dict[str, Any]:
    """The variables of `network` with the weights of a file.

    Args:
      tensors: name -> array, as `read_weights` gives them.
      source: a key of `FORMATS`.
      network: to fill.
      spec: of the network.
      width: the config's width multiplier, for messages.

    Returns:
      The collections params and batch_stats, float32.

    Raises:
      UserError: the source has no such network; or tensors are missing, left over, of other shapes or types, or not
        finite: one message names them all.
    """
    known = FORMATS[source]
    variables = list(_variables(tensors, network, spec, known))
    problems = _problems(tensors, variables)
    if problems:
        raise UserError(_message(problems, tensors, variables, source, network, spec, width))
    flat = {
        variable.path: np.ascontiguousarray(variable.layout.to_ours(tensors[variable.name]), np.float32)
        for variable in variables
    }
    return unflatten_dict(flat, sep="/")


def count_classes(tensors: Mapping[str, np.ndarray], source: str, network: FrequencyNetwork) -> int:
    """How many classes the classifier in a file has.

    Args:
      tensors: as for `convert`.
      source: as for `convert`.
      network: with any number of classes.

    Raises:
      UserError: the source has no such network, or the file no classifier.
    """
    framework = FORMATS[source].framework
    suffix = _SUFFIXES[framework]["kernel"]
    name = _name_of(layers_of(network, source)[-1], suffix, tensors) + suffix
    if name not in tensors or tensors[name].ndim == 0:
        raise UserError(
            f"the file has no classifier {name}, as weights of {source} have, so the number of classes is not known; "
            "give weights with a classifier, and the --format that they have"
        )
    return tensors[name].shape[0 if framework == "torch" else -1]


def _name_of(layer: Layer, suffix: str, tensors: Mapping[str, np.ndarray]) -> str:
    return layer.alias if layer.alias is not None and layer.alias + suffix in tensors else layer.theirs


def _variables(
    tensors: Mapping[str, np.ndarray], network: FrequencyNetwork, spec: NetworkSpec, source: Format
) -> Iterator[_Variable]:
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), np.zeros((1, *spec.input_shape), np.float32)))
    leaves: Any = flatten_dict(shapes, sep="/")
    flat = {path: leaf.shape for path, leaf in leaves.items()}
    kinds = {layer.name: layer.kind for layer in spec.layers}
    suffixes = _SUFFIXES[source.framework]
    for layer in layers_of(network, source.name):
        kind, theirs = kinds[layer.ours], _name_of(layer, suffixes["kernel"], tensors)
        path = f"params/{layer.ours}" if kind == "depthwise" else f"params/{layer.ours}/kernel"
        name = theirs + suffixes["kernel"]
        if kind == "dense" and name in tensors and tensors[name].ndim == 4:  # a classifier that is a 1x1 convolution
            kind = "pointwise"
        yield _Variable(path, flat[path], name, _KERNELS[source.framework][kind])
        path = f"params/{layer.ours}/bias"
        if path in flat:
            yield _Variable(path, flat[path], theirs + suffixes["bias"], _VECTOR)
        yield from _norm_variables(layer, flat, suffixes)


def _norm_variables(layer: Layer, flat: Mapping[str, Shape], suffixes: Mapping[str, str]) -> Iterator[_Variable]:
    if layer.norm is None:
        return
    for leaf, collection in _NORM_COLLECTIONS.items():
        path = f"{collection}/{layer.ours}_norm/{leaf}"
        yield _Variable(path, flat[path], layer.norm + suffixes[f"norm {leaf}"], _VECTOR)


def _problems(tensors: Mapping[str, np.ndarray], variables: list[_Variable]) -> dict[str, list[str]]:
    """What does not fit, by kind of misfit; empty when all is well."""
    wanted = {variable.name: variable for variable in variables}
    found: dict[str, list[str]] = {"missing": [], "unmapped": [], "misshapen": [], "no finite floats": []}
    found["missing"] = [name for name in wanted if name not in tensors]
    for name, tensor in tensors.items():
        if name.endswith(_IGNORED):
            continue
        if name not in wanted:
            found["unmapped"].append(f"{name} {list(tensor.shape)}")
            continue
        shape = wanted[name].layout.shape(wanted[name].shape)
        if tensor.shape != shape:
            found["misshapen"].append(f"{name} is {list(tensor.shape)}, wanted {list(shape)}")
        elif tensor.dtype.kind in "iub" or not np.isfinite(tensor.astype(np.float32)).all():
            found["no finite floats"].append(f"{name} ({tensor.dtype})")
    return {kind: names for kind, names in found.items() if names}


def _message(
    problems: Mapping[str, list[str]],
    tensors: Mapping[str, np.ndarray],
    variables: list[_Variable],
    source: str,
    network: FrequencyNetwork,
    spec: NetworkSpec,
    width: float,
) -> str:
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in problems.items())
    head = (
        f"the weights do not fit {spec.name} (width {width:g}, {spec.num_classes} classes, "
        f"{spec.input_shape[2]} input channels) by the names of {source}: of {len(variables)} tensors wanted and "
        f"{len(tensors)} in the file, {counts}"
    )
    hint = _hint(problems, tensors, variables, source, network, width)
    return "\n".join([head + hint, *(f"  {kind}: {', '.join(names)}" for kind, names in problems.items())])


def _hint(
    problems: Mapping[str, list[str]],
    tensors: Mapping[str, np.ndarray],
    variables: list[_Variable],
    source: str,
    network: FrequencyNetwork,
    width: float,
) -> str:
    """What is probably wrong, if that can be told."""
    if "missing" in problems:
        fits = {other: _named_alike(tensors, network, other) for other in FORMATS}
        best = max(fits, key=lambda other: fits[other])
        if fits[best] > fits[source]:
            return f". The names are those of --format {best}"
        return ""
    misshapen = {text.partition(" ")[0] for text in problems.get("misshapen", ())}
    classifier = {variable.name for variable in variables if variable.path.startswith("params/classifier/")}
    if misshapen and misshapen <= classifier:
        return ". Only the classifier differs: the config's data have another number of classes than the weights"
    if len(misshapen) > len(variables) // 2:
        return f". They are probably of another width: the config's model.width is {width:g}"
    return ""


def _named_alike(tensors: Mapping[str, np.ndarray], network: FrequencyNetwork, source: str) -> int:
    """How many layers of the network the file has under a source's names."""
    suffix = _SUFFIXES[FORMATS[source].framework]["kernel"]
    try:
        return sum(layer.theirs + suffix in tensors for layer in layers_of(network, source))
    except UserError:
        return 0
