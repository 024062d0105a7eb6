"""Networks with random variables and masks, and what the masked network makes of an image: the oracle of freezing."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fdjax.frozen import Frozen, fewest_macs, freeze
from fdjax.frozen.assemble import Choose
from fdjax.frozen.xla import apply
from fdjax.graph.masks import Counts, MaskedGraph
from fdjax.ops.fcmask import counts_to_fcmask, level_counts
from fdjax.training.network import graph_variables
from fdjax.zoo import FCMASK, FrequencyNetwork

# There are as many frozen programs as masks, and each runs once, so that they are compiled with little optimisation.
HASTE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def random_variables(network: FrequencyNetwork, graph: MaskedGraph, seed: int) -> dict:
    """`params` and `batch_stats` of a network that has seen something: no statistic or bias is trivial."""
    rng = np.random.default_rng(seed)
    like = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, *graph.input_shape))))

    def draw(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        match path[-1]:
            case "var":
                return rng.uniform(0.3, 2, shape)
            case "scale":
                return rng.uniform(0.5, 1.5, shape)
            case "mean" | "bias":
                return rng.normal(0, 0.5, shape)
        return rng.normal(0, np.sqrt(2 / max(1, np.prod(shape[:-1]))), shape)

    drawn = {path: draw(path, leaf.shape).astype(np.float32) for path, leaf in flatten_dict(like).items()}
    return {name: tree for name, tree in unflatten_dict(drawn).items() if name != FCMASK}


def random_counts(graph: MaskedGraph, seed: int, levels: tuple[int, ...] | None = None) -> dict[str, np.ndarray]:
    """Kept counts of every FCMask, drawn from the levels (None: all), each as often."""
    rng = np.random.default_rng(seed)
    return {path: rng.choice(level_counts(n, levels), channels) for path, (channels, n) in graph.mask_sizes.items()}


def raw_images(graph: MaskedGraph, batch: int, seed: int) -> np.ndarray:
    """uint8 [batch, H, W, C]."""
    return np.random.default_rng(seed).integers(0, 256, (batch, *graph.input_shape)).astype(np.uint8)


def with_preprocessing(graph: MaskedGraph) -> MaskedGraph:
    """The graph as a run's is: with a mean and a deviation of each input channel."""
    channels = graph.input_shape[2]
    means, deviations = (30.0, 120.0, 80.0)[:channels], (70.0, 55.0, 90.0)[:channels]
    return dataclasses.replace(graph, input_mean=means, input_std=deviations)


@functools.cache
def _masked(network: FrequencyNetwork, mean: tuple[float, ...], std: tuple[float, ...]):
    def logits(variables, images):
        x = (images.astype(jnp.float32) - jnp.asarray(mean)) / jnp.asarray(std)
        return network.apply(variables, x, train=False)

    return jax.jit(logits, compiler_options=HASTE)


def masked_logits(network: FrequencyNetwork, graph: MaskedGraph, variables: dict, counts: dict, images) -> np.ndarray:
    """What the masked network in Flax says; one program for each network, whatever its masks."""
    fcmask = {path: counts_to_fcmask(count, graph.mask_sizes[path][1]) for path, count in counts.items()}
    variables = {**variables, FCMASK: unflatten_dict(fcmask, sep="/")}
    return np.asarray(_masked(network, graph.input_mean, graph.input_std)(variables, images))


def frozen_of(graph: MaskedGraph, variables: dict, counts: Counts, choose: Choose = fewest_macs) -> Frozen:
    """The frozen network of a module's collections."""
    return freeze(graph, graph_variables(graph, variables["params"], variables["batch_stats"]), counts, choose)


def frozen_logits(frozen: Frozen, images: np.ndarray, **how) -> np.ndarray:
    """What the frozen network says."""
    function = functools.partial(apply, frozen.program, **how)
    (logits,) = jax.jit(function, compiler_options=HASTE)(frozen.arrays, images)
    return np.asarray(logits)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference beside the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
