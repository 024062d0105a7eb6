"""Removes filters of a trained network by measurements on training images; the result is a smaller network."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fdjax.checkpoints.calibrate import check_counts, evaluation_sample, training_sample
from fdjax.checkpoints.statistics import corrected_statistics, make_statistics
from fdjax.config import Config
from fdjax.data import normalize, take_rows
from fdjax.errors import UserError, suggestion
from fdjax.frozen.kernels_of_layers import window_of
from fdjax.frozen.products import Window
from fdjax.graph.counting import network_macs
from fdjax.graph.masks import MaskedGraph
from fdjax.graph.network import Layer
from fdjax.pruning.filters import (
    METHODS,
    Measured,
    choose_rates,
    keep_filters,
    one_share,
    prunable,
    rates,
    reader_of,
    strongest,
)
from fdjax.training.build import build_network, collection_of, flat_masks
from fdjax.training.devices import Devices
from fdjax.training.evaluate import make_evaluator
from fdjax.training.own_network import zoo_network
from fdjax.training.restore import Restored, load_restored_data
from fdjax.zoo import FCMASK, FrequencyNetwork
from fdjax.zoo.normalization import BatchNorm

Rates = Literal["one", "search"]

_BATCH = 64
# Outputs of the next layer that are sampled for each calibration image; ten, as in ThiNet.
_SAMPLES = 10


def inner_maps(network: FrequencyNetwork, graph: MaskedGraph, variables: Any, images: np.ndarray) -> dict[str, Any]:
    """Computes the maps inside residual blocks whose filters can be removed.

    Args:
      network: the network.
      graph: channel graph of the network, with the scaling of images.
      variables: the network's collections.
      images: uint8 [n, H, W, C].

    Returns:
      The name of each convolution -> its output after batch norm and ReLU, float32 [n, H, W, D].
    """
    wanted = {f"{layer.name}_norm": layer.name for layers in prunable(graph).values() for layer in layers}

    @jax.jit
    def measure(variables: Any, images: jax.Array):
        found = {}

        def look(call, args, kwargs, context):
            y = call(*args, **kwargs)
            if isinstance(context.module, BatchNorm) and "/".join(context.module.path) in wanted:
                found[wanted["/".join(context.module.path)]] = jax.nn.relu(y)
            return y

        with nn.intercept_methods(look):
            network.apply(variables, normalize(images, graph.input_mean, graph.input_std), train=False)
        return found

    parts = [jax.device_get(measure(variables, batch)) for batch in np.array_split(images, -(-len(images) // _BATCH))]
    return {name: np.concatenate([part[name] for part in parts]) for name in wanted.values()}


def contributions(maps: np.ndarray, kernel: np.ndarray, window: Window, rng: np.random.Generator) -> np.ndarray:
    """Computes what each input channel contributes to sampled outputs of a convolution (ThiNet).

    Args:
      maps: the convolution's input, [n, H, W, C].
      kernel: [window, window, C, D], or [C, D].
      window: the convolution's window, strides and padding.
      rng: draws the places and output channels.

    Returns:
      float32 [n * samples, C]; the sum over C is the output without bias.
    """
    kernel = kernel if kernel.ndim == 4 else kernel[None, None]
    padded = np.pad(maps, ((0, 0), *window.pads, (0, 0)))
    count = len(maps) * _SAMPLES
    image = np.repeat(np.arange(len(maps)), _SAMPLES)
    row, column = (
        stride * rng.integers(0, length, count) for stride, length in zip(window.stride, window.out_size, strict=True)
    )
    output = rng.integers(0, kernel.shape[-1], count)
    found = np.zeros((count, maps.shape[-1]), np.float32)
    for i, j in np.ndindex(*kernel.shape[:2]):
        found += padded[image, row + i, column + j] * kernel[i, j][:, output].T
    return found


def measure_filters(
    network: FrequencyNetwork, graph: MaskedGraph, variables: Any, images: np.ndarray, seed: int
) -> dict[str, Measured]:
    """Measures what the methods of filter pruning score, for each convolution whose filters can be removed.

    Args:
      network: the checkpoint's network.
      graph: channel graph of the network, with the scaling of images.
      variables: the network's collections.
      images: calibration images, uint8 [n, H, W, C].
      seed: the seed of ThiNet's samples.

    Returns:
      The measurements by the convolution's name.
    """
    maps, rng = inner_maps(network, graph, variables, images), np.random.default_rng(seed)
    found = {}
    for layers in prunable(graph).values():
        for layer in layers:
            following = reader_of(graph, layer)
            kernel, after = (np.asarray(_parameters(variables, of.name)["kernel"]) for of in (layer, following))
            contributed = contributions(maps[layer.name], after, layer_window(graph, following), rng)
            kernel = kernel if kernel.ndim == 4 else kernel[None, None]
            found[layer.name] = Measured(kernel, maps[layer.name], contributed)
    return found


def block_losses(
    network: FrequencyNetwork,
    graph: MaskedGraph,
    variables: Any,
    scores: Mapping[str, np.ndarray],
    images: np.ndarray,
    labels: np.ndarray,
) -> dict[str, list[float]]:
    """Measures how much the cross entropy rises when one block alone is pruned.

    Args:
      network: the checkpoint's network.
      graph: channel graph of the network, with the scaling of images.
      variables: the network's collections.
      scores: a score of each filter, by the convolution's name, float [D].
      images: uint8 [n, H, W, C].
      labels: int [n].

    Returns:
      The rise for each block, at each of its `rates`.
    """

    @jax.jit
    def entropy(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        x = normalize(images, graph.input_mean, graph.input_std)
        logits: Any = network.apply(variables, x, train=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    def loss(params: Any) -> float:
        batches = zip(*(np.array_split(part, -(-len(images) // _BATCH)) for part in (images, labels)), strict=True)
        return sum(float(entropy({**variables, "params": params}, *batch)) for batch in batches) / len(images)

    dense, found = loss(variables["params"]), {}
    for name, layers in prunable(graph).items():
        found[name] = []
        for count in rates(layers[0].out_channels):
            params = variables["params"]
            for layer in layers:
                kept = np.zeros(layer.out_channels, np.float32)
                kept[strongest(scores[layer.name], count)] = 1
                norm = {key: value * kept for key, value in _parameters(variables, f"{layer.name}_norm").items()}
                params = _with_parameters(params, f"{layer.name}_norm".split("/"), norm)
            found[name].append(loss(params) - dense)
    return found


def layer_window(graph: MaskedGraph, layer: Layer) -> Window:
    """Returns the window of a convolution; that of a pointwise layer is 1x1."""
    window = window_of(layer, graph.operations.operations[layer.operation])
    size = (layer.in_size[0], layer.in_size[1])
    return window or Window((1, 1), (1, 1), ((0, 0), (0, 0)), size, size)


def _parameters(variables: Any, name: str) -> Any:
    """Returns the parameters of a module by its path."""
    return functools.reduce(lambda tree, part: tree[part], name.split("/"), variables["params"])


def _with_parameters(tree: Any, path: Sequence[str], values: Any) -> Any:
    """Returns a copy of a tree with other values at a path."""
    return values if not path else {**tree, path[0]: _with_parameters(tree[path[0]], path[1:], values)}


@dataclasses.dataclass(frozen=True)
class FilterPruned:
    """A network from which filters have been removed.

    Attributes:
      config: the run's config, with `model.inner_channels` of the smaller network.
      graph: channel graph of the smaller network.
      variables: the smaller network's collections; all masks are 1.
      report: the report of `fdjax prune`, JSON types.
    """

    config: Config
    graph: MaskedGraph
    variables: dict[str, Any]
    report: dict[str, Any]


def prune_filters(
    restored: Restored,
    method: str,
    target: float,
    *,
    per_block: Rates = "one",
    num_images: int = 256,
    eval_limit: int | None = None,
    data_path: str | None = None,
    recalibrate: bool = True,
) -> FilterPruned:
    """Removes filters of a trained network until a MAC ratio is met.

    Args:
      restored: the checkpoint.
      method: one of `fdjax.pruning.filters.METHODS`.
      target: MACs over the unpruned network's, above 0 to 1.
      per_block: "one": all blocks lose the same share of filters; "search": shares are found from each block's loss
        when it is pruned alone.
      num_images: number of training images to measure on.
      eval_limit: number of test images to evaluate on; None: all.
      data_path: directory of the data set; None: the run's own `data.path`.
      recalibrate: whether batch norm's statistics are corrected for the smaller network, on the images measured.

    Returns:
      The smaller network, and the report.

    Raises:
      UserError: if the method does not exist, the network has no filters that can be removed, its weights have been
        trained under masks, the target cannot be reached, a number is below 1, or the data set is missing.
    """
    if method not in METHODS:
        raise UserError(
            f"no filter pruning method {method!r}{suggestion(method, METHODS)}; accepted are {', '.join(METHODS)}"
        )
    check_counts(num_images, eval_limit)
    if restored.weights_adapted and any((mask < 1).any() for mask in flat_masks(restored.state.fcmask).values()):
        raise UserError(
            "the weights of the checkpoint have been trained under masks, and a network with fewer filters has no "
            "masks: give a checkpoint that has done no more than pretrain and learn"
        )
    network = dataclasses.replace(zoo_network(restored.network, "removing filters"), mode="off")
    graph, config = restored.graph, restored.config
    variables = restored.state.variables()
    try:
        prunable(graph)
        dataset = load_restored_data(restored, data_path)
        images, labels = training_sample(config, dataset, num_images)
        measured = measure_filters(network, graph, variables, images, config.seed)
        scores = {name: METHODS[method](layer) for name, layer in measured.items()}
        if per_block == "one":
            left = one_share(graph, target)
        else:
            left = choose_rates(graph, block_losses(network, graph, variables, scores, images, labels), target)
    except ValueError as error:
        raise UserError(str(error)) from error
    kept = {
        layer.name: strongest(scores[layer.name], left[name])
        for name, layers in prunable(graph).items()
        for layer in layers
    }
    smaller: dict[str, Any] = keep_filters(graph, jax.device_get(variables), kept)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, inner_channels=tuple(left.values())))
    new_network, new_graph = build_network(config, graph.input_shape, graph.num_classes)
    new_graph = dataclasses.replace(
        new_graph, input_mean=graph.input_mean, input_std=graph.input_std, class_names=graph.class_names
    )
    smaller[FCMASK] = collection_of(new_graph, new_graph.full_counts())
    if recalibrate:
        before = _statistics(network, graph, variables, images)
        matching = keep_filters(graph, {**jax.device_get(variables), "batch_stats": before}, kept)["batch_stats"]
        after = _statistics(zoo_network(new_network, "removing filters"), new_graph, smaller, images)
        smaller["batch_stats"] = corrected_statistics(smaller["batch_stats"], matching, after)
    evaluate = make_evaluator(dataclasses.replace(new_network, mode="off"), new_graph, Devices())
    rows = evaluation_sample(len(dataset.test_labels), config.seed, eval_limit)
    tested = take_rows(dataset.test_images, rows), dataset.test_labels[rows]
    figures = evaluate(jax.tree.map(jnp.asarray, smaller), *tested)
    report = {
        "method": method,
        "per_block": per_block,
        "target_macs": target,
        "num_images": len(images),
        "recalibrated": recalibrate,
        # Measured on all test images, so it is comparable only with all of them.
        "dense_top1": restored.done.dense_top1 if eval_limit is None else None,
        **figures,
        **_sizes(graph, new_graph),
        "parameters": {"before": optax.tree.size(variables["params"]), "after": optax.tree.size(smaller["params"])},
        "filters": {
            name: {"before": prunable(graph)[name][0].out_channels, "after": count} for name, count in left.items()
        },
        "flags": ["--model.inner-channels", *map(str, left.values())],
    }
    return FilterPruned(config, new_graph, smaller, report)


def _statistics(network: FrequencyNetwork, graph: MaskedGraph, variables: Any, images: np.ndarray) -> dict[str, Any]:
    measured = dataclasses.replace(network, mode="off", batch_norm_momentum=0.0)
    return make_statistics(measured, graph)(variables, images)


def _sizes(before: MaskedGraph, after: MaskedGraph) -> dict[str, Any]:
    """Returns the dense MACs of two networks, and their ratio."""
    macs = [network_macs(graph, graph.full_counts()).to_dict()["dense"] for graph in (before, after)]
    return {"macs": {"before": macs[0], "after": macs[1]}, "ratio": macs[1] / macs[0]}
