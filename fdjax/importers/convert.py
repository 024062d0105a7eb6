"""Converts foreign tensors to variables of our networks: maps names, converts layouts, reports all misfits at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fdjax.errors import UserError
from fdjax.graph.masks import MaskedGraph
from fdjax.importers.by_order import Match, Wanted, match
from fdjax.importers.formats import FORMATS, Framework
from fdjax.importers.layouts import CLASSIFIER, KERNELS, SUFFIXES, VECTOR, Shape, Variable
from fdjax.importers.misfits import CLASSIFIERS, message_of, order_message, problems_of
from fdjax.importers.names import Layer, layers_of, schemes_of
from fdjax.importers.state_dicts import without_prefix
from fdjax.onnx.module import new_classifier
from fdjax.zoo import FrequencyNetwork

_NORM_COLLECTIONS = {"scale": "params", "bias": "params", "mean": "batch_stats", "var": "batch_stats"}


class Fitted(NamedTuple):
    """A network's variables with the weights of a file.

    Attributes:
      variables: the collections params and batch_stats, float32.
      notes: what a user should know about how they were found, in whole sentences.
      mapping: with `by_order`, pairs of a name in the file and our path; otherwise empty.
    """

    variables: dict[str, Any]
    notes: list[str]
    mapping: list[tuple[str, str]]


def convert(
    tensors: Mapping[str, np.ndarray], source: str, network: FrequencyNetwork, graph: MaskedGraph, width: float
) -> dict[str, Any]:
    """Makes the variables of a network from the weights of a file, by names.

    Args:
      tensors: name -> array, from `read_weights`.
      source: a key of `FORMATS`.
      network: the network.
      graph: the network's graph.
      width: the config's width multiplier, for messages.

    Returns:
      The collections params and batch_stats, float32.

    Raises:
      UserError: as in `fit`.
    """
    return fit(tensors, source, network, graph, width).variables


def fit(
    tensors: Mapping[str, np.ndarray],
    source: str,
    network: FrequencyNetwork,
    graph: MaskedGraph,
    width: float,
    *,
    by_order: bool = False,
    new_classifier: int | None = None,
    averaged: bool = False,
) -> Fitted:
    """Makes the variables of a network from the weights of a file.

    Args:
      tensors: name -> array, from `read_weights`.
      source: a key of `FORMATS`.
      network: the network.
      graph: the network's graph.
      width: the config's width multiplier, for messages.
      by_order: whether to match by order and shape, whatever the names.
      new_classifier: seed of a new classifier, which replaces the file's; None uses the file's.
      averaged: whether to prefer averaged weights if names occur twice behind different prefixes.

    Returns:
      The variables, and how they were found.

    Raises:
      UserError: the source has no such network; or tensors are missing, left over, not finite, or of other shapes or
        types. One message lists all problems.
    """
    shapes, framework = _shapes(network, graph.input_shape), FORMATS[source].framework
    schemes = schemes_of(network, source)
    if new_classifier is not None:
        schemes = {name: layers[:-1] for name, layers in schemes.items()}
    if by_order:
        found = _match(tensors, schemes[source], shapes, framework)
        foreign = [name for name in found.left if new_classifier is None or not CLASSIFIERS.search(name)]
        if found.problems or foreign:
            raise UserError(order_message(found, tensors, graph, width, foreign))
        chosen, variables = tensors, list(_ordered(found, schemes[source], shapes, framework, tensors))
        notes = (
            []
            if found.in_order
            else ["some layers are in another order in the file than in the network; see the mapping"]
        )
    else:
        chosen, variables, notes = _by_names(tensors, schemes, shapes, framework, averaged)
    if new_classifier is not None:
        wanted = {variable.name for variable in variables}
        dropped = [name for name in chosen if name not in wanted and CLASSIFIERS.search(name)]
        chosen = {name: tensor for name, tensor in chosen.items() if name not in dropped}
        notes.append("the classifier is new" + (f"; the file's is left out ({', '.join(dropped)})" if dropped else ""))
    problems = problems_of(chosen, variables, ignore_others=by_order)
    if problems:
        raise UserError(message_of(problems, chosen, variables, source, network, graph, width))
    flat = {
        variable.path: np.ascontiguousarray(variable.layout.to_ours(chosen[variable.name]), np.float32)
        for variable in variables
    }
    if new_classifier is not None:
        flat |= _new_classifier(shapes, new_classifier)
    mapping = [(variable.name, variable.path) for variable in variables] if by_order else []
    return Fitted(unflatten_dict(flat, sep="/"), notes, mapping)


def count_classes(tensors: Mapping[str, np.ndarray], source: str, network: FrequencyNetwork) -> int:
    """Returns the number of classes of the classifier in a file.

    Args:
      tensors: as in `convert`.
      source: as in `convert`.
      network: the network, with any number of classes.

    Returns:
      The number of classes.

    Raises:
      UserError: the source has no such network, or the file has no classifier.
    """
    framework = FORMATS[source].framework
    suffix = SUFFIXES[framework]["kernel"]
    for layers in schemes_of(network, source).values():
        inside, _ = without_prefix(tensors, {layer.theirs + suffix for layer in layers})
        name = _name_of(layers[-1], suffix, inside) + suffix
        if name in inside and inside[name].ndim:
            return inside[name].shape[0 if framework == "torch" else -1]
    name = layers_of(network, source)[-1].theirs + suffix
    raise UserError(
        f"the file has no classifier {name}, as weights of {source} have, so the number of classes is unknown; give "
        "weights with a classifier and their --format, or --new-classifier with --classes or data.path"
    )


def _name_of(layer: Layer, suffix: str, tensors: Mapping[str, np.ndarray]) -> str:
    return layer.alias if layer.alias is not None and layer.alias + suffix in tensors else layer.theirs


# -- our variables


def _shapes(network: FrequencyNetwork, input_shape: Shape) -> dict[str, Shape]:
    """Returns path -> shape."""
    images = np.zeros((1, *input_shape), np.float32)
    leaves: Any = flatten_dict(jax.eval_shape(lambda: network.init(jax.random.key(0), images)), sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}


def _kernel(layer: Layer, shapes: Mapping[str, Shape]) -> tuple[str, str]:
    """Returns the path and the kind of a layer's kernel."""
    path = f"params/{layer.ours}/kernel"
    if path not in shapes:
        return f"params/{layer.ours}", "depthwise"
    if layer.ours == CLASSIFIER:
        return path, "dense"
    return path, "conv" if len(shapes[path]) == 4 else "pointwise"


def _new_classifier(shapes: Mapping[str, Shape], seed: int) -> dict[str, np.ndarray]:
    made = new_classifier(jax.random.key(seed % 2**32), shapes[f"params/{CLASSIFIER}/kernel"], bias=True)
    return {f"params/{CLASSIFIER}/{leaf}": np.asarray(value) for leaf, value in made.items()}


# -- by names


def _by_names(
    tensors: Mapping[str, np.ndarray],
    schemes: Mapping[str, Sequence[Layer]],
    shapes: Mapping[str, Shape],
    framework: Framework,
    averaged: bool,
) -> tuple[Mapping[str, np.ndarray], list[Variable], list[str]]:
    """Returns the tensors without a prefix, the variables by the naming scheme that finds most of them, and notes."""
    best: tuple[int, Mapping[str, np.ndarray], list[Variable], list[str]] | None = None
    for scheme, layers in schemes.items():
        wanted = {variable.name for variable in _variables(tensors, layers, shapes, framework)}
        inside, prefix = without_prefix(tensors, wanted, averaged)
        variables = list(_variables(inside, layers, shapes, framework))
        found = sum(variable.name in inside for variable in variables)
        if best is None or (found > best[0] and 2 * found > len(variables)):
            notes = [f"all names begin with {prefix!r}, which was removed"] if prefix else []
            if scheme not in FORMATS:
                notes.append(f"the names are those of {scheme}")
            best = found, inside, variables, notes
    assert best is not None
    return best[1:]


def _variables(
    tensors: Mapping[str, np.ndarray], layers: Sequence[Layer], shapes: Mapping[str, Shape], framework: Framework
) -> Iterator[Variable]:
    suffixes = SUFFIXES[framework]
    for layer in layers:
        path, kind = _kernel(layer, shapes)
        theirs = _name_of(layer, suffixes["kernel"], tensors)
        name = theirs + suffixes["kernel"]
        if kind == "dense" and name in tensors and tensors[name].ndim == 4:  # The classifier is a 1x1 convolution.
            kind = "pointwise"
        yield Variable(path, shapes[path], name, KERNELS[framework][kind])
        path = f"params/{layer.ours}/bias"
        if path in shapes:
            yield Variable(path, shapes[path], theirs + suffixes["bias"], VECTOR)
        if layer.norm is None:
            continue
        for leaf, collection in _NORM_COLLECTIONS.items():
            path = f"{collection}/{layer.ours}_norm/{leaf}"
            yield Variable(path, shapes[path], layer.norm + suffixes[f"norm {leaf}"], VECTOR)


# -- by order


def _match(
    tensors: Mapping[str, np.ndarray], layers: Sequence[Layer], shapes: Mapping[str, Shape], framework: Framework
) -> Match:
    wanted = []
    for layer in layers:
        path, kind = _kernel(layer, shapes)
        kinds = ("dense", "pointwise") if kind == "dense" else (kind,)
        kernels = tuple(KERNELS[framework][one].shape(shapes[path]) for one in kinds)
        channels = 0 if layer.norm is None else shapes[f"params/{layer.ours}_norm/scale"][0]
        wanted.append(Wanted(layer.ours, kernels, f"params/{layer.ours}/bias" in shapes, channels))
    return match(tensors, wanted)


def _ordered(
    found: Match,
    layers: Sequence[Layer],
    shapes: Mapping[str, Shape],
    framework: Framework,
    tensors: Mapping[str, np.ndarray],
) -> Iterator[Variable]:
    for layer in layers:
        theirs = found.layers[layer.ours]
        path, kind = _kernel(layer, shapes)
        if kind == "dense" and tensors[theirs.kernel].ndim == 4:
            kind = "pointwise"
        yield Variable(path, shapes[path], theirs.kernel, KERNELS[framework][kind])
        if theirs.bias is not None:
            path = f"params/{layer.ours}/bias"
            yield Variable(path, shapes[path], theirs.bias, VECTOR)
        for leaf, name in theirs.norm.items():
            path = f"{_NORM_COLLECTIONS[leaf]}/{layer.ours}_norm/{leaf}"
            yield Variable(path, shapes[path], name, VECTOR)
