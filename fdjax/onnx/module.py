"""The network of an ONNX file as a Flax Linen module, for train.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fdjax.onnx.graph import CLASSIFIER, OnnxGraph, read_onnx_graph
from fdjax.onnx.network import compute, initial_variables

_NEW_CLASSIFIER_STD = 0.01


class OnnxNetwork(nn.Module):
    """The network of an ONNX file; its variables are initialised with the file's weights.

    Attributes:
      graph: what the file holds.
      num_classes: outputs of the classifier; if the file has another number of them, the classifier is a new one. None:
        the file's.
    """

    graph: OnnxGraph
    num_classes: int | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Any:
        """Computes the network, as `fdjax.onnx.compute` does.

        Args:
          images: [B, H, W, C].
          train: whether batch norms take the statistics of the batch, and dropout drops.

        Returns:
          The result of the file; several as a tuple.
        """
        first = initial_variables(self.graph) if self.is_initializing() else {"params": {}, "batch_stats": {}}
        params = {
            layer: self.param(layer, self._initialiser(layer, first["params"].get(layer)))
            for layer in self.graph.params
        }
        stats = {
            layer: self.variable("batch_stats", layer, lambda layer=layer: first["batch_stats"][layer])
            for layer in self.graph.stats
        }
        values = {layer: variable.value for layer, variable in stats.items()}
        key = self.make_rng("dropout") if train and self.has_rng("dropout") else None
        result, moved = compute(self.graph, {"params": params, "batch_stats": values}, images, train, key)
        if train and not self.is_initializing() and self.is_mutable_collection("batch_stats"):
            for layer, variable in stats.items():
                variable.value = moved[layer]
        return result

    def _initialiser(self, layer: str, weights: Any) -> Callable[[jax.Array], Any]:
        classes = self.num_classes
        if layer == CLASSIFIER and classes is not None and weights is not None:
            *others, outputs = weights["kernel"].shape
            if outputs != classes:
                return lambda key: new_classifier(key, (*others, classes), "bias" in weights)
        return lambda _: weights


def onnx_network(file: str, num_classes: int | None = None) -> OnnxNetwork:
    """Makes the network of an ONNX file, as `train.py --model.factory` takes it.

    Args:
      file: path of the file.
      num_classes: number of classes; if the file has another number of outputs, its last layer is a new one.

    Returns:
      The module, `__call__(images, train)`.

    Raises:
      UserError: as `fdjax.onnx.read_onnx_graph`.
    """
    return OnnxNetwork(read_onnx_graph(file), num_classes)


def new_classifier(key: jax.Array, shape: tuple[int, ...], bias: bool) -> dict[str, jax.Array]:
    """Makes a classifier that nothing has trained.

    Small weights make all classes about equally likely at first, and the body's gradients small.

    Args:
      key: a PRNG key.
      shape: shape of the kernel, [..., classes].
      bias: whether it has a bias.

    Returns:
      "kernel", and "bias" if there is one.
    """
    made = {"kernel": _NEW_CLASSIFIER_STD * jax.random.normal(key, shape)}
    return {**made, "bias": jnp.zeros(shape[-1])} if bias else made
