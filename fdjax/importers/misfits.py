"""The messages for weights that do not fit a network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from fdjax.errors import UserError
from fdjax.graph.masks import MaskedGraph
from fdjax.importers.best_fit import best_fit
from fdjax.importers.by_order import Match
from fdjax.importers.formats import FORMATS
from fdjax.importers.layouts import CLASSIFIER, SUFFIXES, Variable
from fdjax.importers.names import layers_of
from fdjax.zoo import FrequencyNetwork

# Counters that do not affect what a network computes.
_IGNORED = ("num_batches_tracked",)
# Names of classifiers in the sources, for weights whose classifier is replaced.
CLASSIFIERS = re.compile(
    r"(^|[./])(classifier|fc|_fc|linear|head|last_linear|logits|predictions|conv_preds|output)([./]|$)", re.IGNORECASE
)


def order_message(
    found: Match, tensors: Mapping[str, np.ndarray], graph: MaskedGraph, width: float, left: Sequence[str]
) -> str:
    """Describes how weights fail to fit a network by order and shape.

    Args:
      found: the mapping that was found.
      tensors: name -> array, from the file.
      graph: the network's graph.
      width: the config's width multiplier.
      left: names in the file that match no layer.

    Returns:
      The message.
    """
    parts = {"not found": found.problems, "left over": [f"{name} {list(tensors[name].shape)}" for name in left]}
    head = (
        f"the weights do not fit {graph.name} (width {width:g}, {graph.num_classes} classes) by order and shape: "
        f"{len(found.problems)} layers are not found and {len(left)} tensors are left over"
    )
    hint = best_fit(tensors, width)
    if all(CLASSIFIERS.search(text.split()[0]) for text in (*found.problems, *left)):
        hint = "Only the classifier differs: give --new-classifier to start with a new one for the config's classes"
    return "\n".join([f"{head}. {hint}", *(f"  {kind}: {', '.join(names)}" for kind, names in parts.items() if names)])


def problems_of(
    tensors: Mapping[str, np.ndarray], variables: list[Variable], ignore_others: bool = False
) -> dict[str, list[str]]:
    """Finds what does not fit.

    Args:
      tensors: name -> array, from the file.
      variables: our variables.
      ignore_others: whether to ignore tensors that belong to no variable.

    Returns:
      Kind of misfit -> descriptions; empty if everything fits.
    """
    wanted = {variable.name: variable for variable in variables}
    found: dict[str, list[str]] = {"missing": [], "unmapped": [], "misshapen": [], "no finite floats": []}
    found["missing"] = [name for name in wanted if name not in tensors]
    for name, tensor in tensors.items():
        if name.endswith(_IGNORED):
            continue
        if name not in wanted:
            if not ignore_others:
                found["unmapped"].append(f"{name} {list(tensor.shape)}")
            continue
        shape = wanted[name].layout.shape(wanted[name].shape)
        if tensor.shape != shape:
            found["misshapen"].append(f"{name} is {list(tensor.shape)}, wanted {list(shape)}")
        elif tensor.dtype.kind in "iub" or not np.isfinite(tensor.astype(np.float32)).all():
            found["no finite floats"].append(f"{name} ({tensor.dtype})")
    return {kind: names for kind, names in found.items() if names}


def message_of(
    problems: Mapping[str, list[str]],
    tensors: Mapping[str, np.ndarray],
    variables: list[Variable],
    source: str,
    network: FrequencyNetwork,
    graph: MaskedGraph,
    width: float,
) -> str:
    """Describes how weights fail to fit a network by names.

    Args:
      problems: from `problems_of`.
      tensors: name -> array, from the file.
      variables: our variables.
      source: a key of `FORMATS`.
      network: the network.
      graph: the network's graph.
      width: the config's width multiplier.

    Returns:
      The message, with a hint at the probable cause.
    """
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in problems.items())
    head = (
        f"the weights do not fit {graph.name} (width {width:g}, {graph.num_classes} classes, "
        f"{graph.input_shape[2]} input channels) by the names of {source}: of {len(variables)} tensors wanted and "
        f"{len(tensors)} in the file, {counts}"
    )
    hint = _hint(problems, tensors, variables, source, network, width)
    return "\n".join([head + hint, *(f"  {kind}: {', '.join(names)}" for kind, names in problems.items())])


def _hint(
    problems: Mapping[str, list[str]],
    tensors: Mapping[str, np.ndarray],
    variables: list[Variable],
    source: str,
    network: FrequencyNetwork,
    width: float,
) -> str:
    """Returns the probable cause, or ""."""
    names = {kind: {text.partition(" ")[0] for text in found} for kind, found in problems.items()}
    classifier = {variable.name for variable in variables if variable.path.startswith(f"params/{CLASSIFIER}/")}
    if set().union(*names.values()) <= classifier and "no finite floats" not in names:
        what = "the weights have no classifier" if "missing" in names else (
            "Only the classifier differs: the config's data have another number of classes than the weights"
        )  # fmt: skip
        return f". {what[0].upper()}{what[1:]}; --new-classifier starts with a new one for the config's classes"
    if "missing" in problems:
        fits = {other: _named_alike(tensors, network, other) for other in FORMATS}
        best = max(fits, key=lambda other: fits[other])
        if fits[best] > fits[source]:
            return f". The names are those of --format {best}"
    misshapen = names.get("misshapen", set())
    if "missing" not in problems and len(misshapen) > len(variables) // 2:
        return (
            f". They are probably of another width: the config's model.width is {width:g}. {best_fit(tensors, width)}"
        )
    if len(misshapen) + len(names.get("missing", ())) > len(variables) // 10:
        only_names = f"--model.name {network.variant} --model.width {width:g}:" in (best := best_fit(tensors, width))
        return f". {best}" + (". If only names differ, give --by-order" if only_names else "")
    return ""


def _named_alike(tensors: Mapping[str, np.ndarray], network: FrequencyNetwork, source: str) -> int:
    """Returns how many layers of the network the file has under the names of a source."""
    suffix = SUFFIXES[FORMATS[source].framework]["kernel"]
    try:
        return sum(layer.theirs + suffix in tensors for layer in layers_of(network, source))
    except UserError:
        return 0
