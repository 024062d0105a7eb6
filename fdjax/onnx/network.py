"""Computes the network of an ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdjax.errors import UserError, first_line
from fdjax.graph.trace import NODE_SCOPE
from fdjax.onnx.graph import STATS, Node, OnnxGraph, read_onnx_graph
from fdjax.onnx.operators import OPERATORS
from fdjax.onnx.values import Call, Tensor, Unsupported, Value, as_in_onnx, with_channels_last

_MOMENTUM = 0.9  # ONNX's own, where a batch norm names none.


def compute(
    graph: OnnxGraph, variables: Mapping[str, Any], images: jax.Array, train: bool = False, key: jax.Array | None = None
) -> tuple[Any, dict[str, Any]]:
    """Computes the network of an ONNX file.

    Args:
      graph: what the file holds.
      variables: the collections params and batch_stats, with the layers of `graph`.
      images: [B, H, W, C], scaled as the file takes them.
      train: whether batch norms take the statistics of the batch, and dropout drops.
      key: with `train`, a PRNG key for dropout; None: nothing is dropped.

    Returns:
      The result of the file, or a tuple of several, of which those of four dimensions have their channels last, as
      images have; and the averages of the batch norms, with `train` the moved ones.

    Raises:
      UserError: an operation cannot be computed, or not on such images.
    """
    params, stats = variables["params"], variables.get("batch_stats", {})
    moved = dict(stats)
    values: dict[str, Value] = {**graph.constants, graph.input: Tensor(images, not graph.channels_last)}
    for number, node in enumerate(graph.nodes):
        given: list[Value] = []
        weights = {}
        for at, name in enumerate(node.inputs):
            if at not in node.weights:
                given.append(values[name] if name else None)
                continue
            layer, leaf = node.weights[at]
            weights[leaf] = (stats if leaf in STATS else params)[layer][leaf]
            given.append(Tensor(weights[leaf]) if leaf == "value" else None)
        if node.op == "Shape":
            made = _shape(node, given[0])
        elif not node.weights and not any(isinstance(value, Tensor) for value in given):
            made = _computed(node, given, graph.opset)
        else:
            own_key = None if key is None or not train else jax.random.fold_in(key, number)
            batch = (graph.input_dims[0], images.shape[0])
            call = Call(given, node.attributes, weights, graph.opset, batch, len(node.outputs), train, own_key)
            with jax.named_scope(f"{NODE_SCOPE}<{node.name}>"):
                made = _called(graph, node, call)
            if call.batch_stats:
                layer = node.weights[3][0]
                moved[layer] = _moved(node, moved[layer], call.batch_stats)
        values |= dict(zip(node.outputs, made, strict=False))
    results = [_result(values[name], graph.channels_last) for name in graph.outputs]
    return (results[0] if len(results) == 1 else tuple(results)), moved


def from_onnx(file: str | Path) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Reads the network of an ONNX file, from PyTorch, TensorFlow or any other framework.

    Args:
      file: path of the file.

    Returns:
      A function `apply(variables, images)`, for images [B, H, W, C] that are scaled as the file takes them; and the
      variables with the file's weights: the collections params and batch_stats. `apply(variables, images, train=True,
      key=None)` takes the statistics of the batch, drops with a key what dropout drops, and returns the results and the
      moved batch_stats.

    Raises:
      UserError: as `read_onnx_graph`.
    """
    graph = read_onnx_graph(file)

    def apply(
        variables: Mapping[str, Any], images: jax.Array, train: bool = False, key: jax.Array | None = None
    ) -> Any:
        result, moved = compute(graph, variables, images, train, key)
        return (result, moved) if train else result

    return apply, initial_variables(graph)


def initial_variables(graph: OnnxGraph) -> dict[str, Any]:
    """Returns the collections params and batch_stats with the file's weights."""
    return jax.tree.map(jnp.asarray, {"params": _dicts(graph.params), "batch_stats": _dicts(graph.stats)})


def _dicts(layers: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    return {layer: dict(leaves) for layer, leaves in layers.items()}


def _called(graph: OnnxGraph, node: Node, call: Call) -> tuple[Value, ...]:
    where = f"{graph.file}: the node {node.name} ({node.op})"
    if node.op not in OPERATORS:
        raise UserError(
            f"{where} cannot be read; operators that can are {', '.join(sorted(OPERATORS))}, and any of constants"
        )
    try:
        made = OPERATORS[node.op](call)
    except Unsupported as error:
        raise UserError(f"{where} cannot be read: {error}") from error
    except (TypeError, ValueError, KeyError, IndexError) as error:
        shapes = ["x".join(map(str, value.shape)) for value in call.inputs if value is not None]
        raise UserError(
            f"{where} does not take values of {', '.join(shapes) or 'no shape'}: {first_line(error)}; was the file "
            "exported for images of another size, or for one image at a time?"
        ) from error
    return made if isinstance(made, tuple) else (made,)


def _moved(node: Node, old: Mapping[str, jax.Array], batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    kept = node.attributes.get("momentum", _MOMENTUM)
    return {leaf: kept * old[leaf] + (1 - kept) * batch[leaf] for leaf in STATS}


def _shape(node: Node, value: Value) -> tuple[np.ndarray]:
    assert value is not None
    return (np.asarray(value.shape, np.int64)[slice(node.attributes.get("start", 0), node.attributes.get("end"))],)


def _computed(node: Node, inputs: list[Value], opset: int) -> tuple[np.ndarray, ...]:
    """Computes a node whose inputs are constants and shapes."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    names = [name for name in node.inputs if name]
    proto = helper.make_node(node.op, node.inputs, node.outputs, **node.attributes)
    feeds = dict(zip(names, (value for value in inputs if value is not None), strict=True))
    return tuple(map(np.asarray, ReferenceEvaluator(proto, opsets={"": opset}).run(None, feeds)))


def _result(value: Value, channels_last: bool) -> jax.Array:
    """Returns a result; one of four dimensions has its channels last, as it has in a file with such images."""
    assert value is not None
    tensor = value if isinstance(value, Tensor) else Tensor(jnp.asarray(value))
    return as_in_onnx(tensor) if channels_last or tensor.ndim != 4 else with_channels_last(tensor)
