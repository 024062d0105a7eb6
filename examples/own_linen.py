"""Prunes a Flax Linen network of your own to half of its MACs: python examples/own_linen.py (a minute on two cores)"""

import flax.linen as nn
import jax
import numpy as np
import optax

import fdjax
from fdjax.data import open_dataset
from fdjax.frozen.bench import bench


class Net(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(24, (4, 4), strides=4, name="stem")(images / 255)
        for unit in ("unit1", "unit2"):
            y = nn.LayerNorm(name=f"{unit}/norm")(nn.Conv(24, (3, 3), feature_group_count=24, name=f"{unit}/mix")(x))
            y = nn.gelu(nn.Conv(96, (1, 1), name=f"{unit}/expand")(y))
            x = x + nn.Conv(24, (1, 1), name=f"{unit}/project")(y)
        return nn.Dense(10, name="classifier")(x.mean(axis=(1, 2)))


def loss(variables, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(apply(variables, images), labels).mean()


def fit(value, function, steps, rate, low=-np.inf, high=np.inf):
    optimizer, gradient = optax.adam(rate), jax.jit(jax.grad(fdjax.fast_convolutions(function)))
    state, update = optimizer.init(value), jax.jit(optimizer.update)
    for rows in np.random.default_rng(0).integers(0, len(data.train_labels), (steps, 128)):
        updates, state = update(gradient(value, data.train_images[rows] * 1.0, data.train_labels[rows]), state)
        value = jax.tree.map(lambda leaf: leaf.clip(low, high), optax.apply_updates(value, updates))
    return value


data, apply = open_dataset("fashion_mnist_subset"), Net().apply
variables = fit(Net().init(jax.random.key(0), data.test_images[:1] * 1.0), loss, 500, 3e-3)
graph = fdjax.with_masks(fdjax.trace(apply, variables, data.test_images[:1] * 1.0))
masked, dense = fdjax.masked(loss, graph), fdjax.freeze(graph, variables, graph.full_counts())
with_penalty = lambda fcmask, *batch: masked(fcmask, variables, *batch) + fdjax.expected_ratio(graph, fcmask)  # noqa: E731
hard = fdjax.harden(graph, fit(fdjax.init_fcmask(graph), with_penalty, 100, 1e-2, 0, 1), target_macs=0.5)
frozen = fdjax.freeze(graph, fit(variables, lambda *given: masked(hard.counts, *given), 300, 1e-3), hard.counts)
before, after = ((net(data.test_images * 1.0).argmax(-1) == data.test_labels).mean() for net in (dense, frozen))
time = bench(frozen.frozen, dense.frozen, {}, batch=64)["time_ratio"]
print(f"{graph}\ndense {before:.1%}, pruned {after:.1%} at {hard.macs.ratio:.2f}x MACs and {time:.2f}x the time")
