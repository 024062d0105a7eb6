"""Evaluates the part of a network that does not depend on the image, in float64 with numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from fdjax.graph.network import Graph
from fdjax.graph.operations import Operation
from fdjax.graph.primitives import bind

Constants = dict[int, np.ndarray]


def evaluate_constants(graph: Graph, variables: Any) -> Constants:
    """Evaluates every value that does not depend on the image.

    Args:
      graph: channel graph of the network.
      variables: the variables, a tree of arrays with the structure and shapes that were traced.

    Returns:
      Value -> array; floats are float64, other types stay.

    Raises:
      ValueError: if the variables have another structure or other shapes, or an operation reads a random key.
    """
    operations = graph.operations
    paths, leaves = list(operations.variables.items()), jax.tree.leaves(variables)
    if len(leaves) != len(paths):
        raise ValueError(f"the network has {len(paths)} arrays, and {len(leaves)} are given")
    found: Constants = {value: _wide(array) for value, array in operations.constants.items()}
    for (value, path), leaf in zip(paths, leaves, strict=True):
        if np.shape(leaf) != operations.shapes[value]:
            raise ValueError(f"{path} must have shape {operations.shapes[value]}, got {np.shape(leaf)}")
        if not _is_key(leaf):  # An NNX model with dropout holds keys, which nothing reads at inference.
            found[value] = _wide(np.asarray(leaf))
    keys = {value: path for value, path in paths if value not in found}
    for operation in operations.operations:
        read = [keys[value] for value in operation.inputs if value in keys]
        if read:
            where = f" ({operation.source})" if operation.source else ""
            raise ValueError(
                f"{operation.kind}{where} reads the random key {read[0]}, and a frozen network draws no random "
                "numbers; trace the network as it is at inference"
            )
        if not any(value in graph.walk.live for value in operation.inputs):
            found.update(zip(operation.outputs, _evaluate(operation, found, operations.dtypes), strict=True))
    return found


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64) if np.issubdtype(array.dtype, np.floating) or array.dtype == "bfloat16" else array


def _evaluate(operation: Operation, known: Mapping[int, np.ndarray], dtypes: tuple[str, ...]) -> list[np.ndarray]:
    inputs = [known[value] for value in operation.inputs]
    rule = _RULES.get(operation.kind)
    if rule is not None:
        return [_wide(np.asarray(rule(operation.params, *inputs)))]
    typed = [np.asarray(array, dtypes[value]) for value, array in zip(operation.inputs, inputs, strict=True)]
    return [_wide(np.asarray(made)) for made in bind(operation.kind, operation.params, typed)]


def _broadcast(params: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    sides = [1] * len(params["shape"])
    for axis, at in enumerate(params["broadcast_dimensions"]):
        sides[at] = x.shape[axis]
    return np.broadcast_to(x.reshape(sides), params["shape"])


def _convert(params: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    kept_wide = np.issubdtype(params["new_dtype"], np.floating) and np.issubdtype(x.dtype, np.floating)
    return x if kept_wide else x.astype(params["new_dtype"])


_RULES: Mapping[str, Callable[..., Any]] = {
    "add": lambda _, x, y: x + y,
    "sub": lambda _, x, y: x - y,
    "mul": lambda _, x, y: x * y,
    "div": lambda _, x, y: x / y if np.issubdtype(np.result_type(x, y), np.floating) else x // y,
    "max": lambda _, x, y: np.maximum(x, y),
    "min": lambda _, x, y: np.minimum(x, y),
    "neg": lambda _, x: -x,
    "rsqrt": lambda _, x: 1 / np.sqrt(x),
    "sqrt": lambda _, x: np.sqrt(x),
    "square": lambda _, x: np.square(x),
    "exp": lambda _, x: np.exp(x),
    "log": lambda _, x: np.log(x),
    "integer_pow": lambda params, x: x ** params["y"],
    "copy": lambda _, x: x,
    "stop_gradient": lambda _, x: x,
    "convert_element_type": _convert,
    "broadcast_in_dim": _broadcast,
    "reshape": lambda params, x: x.reshape(params["new_sizes"]),
    "squeeze": lambda params, x: x.squeeze(tuple(params["dimensions"])),
    "expand_dims": lambda params, x: np.expand_dims(x, tuple(params["dimensions"])),
    "transpose": lambda params, x: x.transpose(params["permutation"]),
    "reduce_sum": lambda params, x: x.sum(axis=tuple(params["axes"])),
    "reduce_max": lambda params, x: x.max(axis=tuple(params["axes"])),
}
