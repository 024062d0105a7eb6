"""Prunes an Equinox network of your own to half of its MACs: python examples/own_equinox.py (a minute on two cores)"""

import equinox as eqx
import jax
import numpy as np
import optax

import fdjax
from fdjax.data import open_dataset
from fdjax.frozen.bench import bench


def make_net(conv, linear, function, keys):
    layers = [conv(1, 24, 4, 4, key=keys[0]), conv(24, 24, 3, padding=1, key=keys[1]), function(jax.nn.relu)]
    layers += [conv(24, 192, 1, key=keys[2]), function(jax.nn.relu), conv(192, 24, 1, key=keys[3])]
    return eqx.nn.Sequential([*layers, function(lambda x: x.mean(axis=(1, 2))), linear(24, 10, key=keys[4])])


def apply(variables, images):
    return jax.vmap(eqx.combine(variables, static))(images.transpose(0, 3, 1, 2) / 255)


def loss(variables, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(apply(variables, images), labels).mean()


def fit(value, function, steps, rate, low=-np.inf, high=np.inf):
    optimizer, gradient = optax.adam(rate), jax.jit(jax.grad(fdjax.fast_convolutions(function)))
    state, update = optimizer.init(value), jax.jit(optimizer.update)
    for rows in np.random.default_rng(0).integers(0, len(data.train_labels), (steps, 128)):
        updates, state = update(gradient(value, data.train_images[rows] * 1.0, data.train_labels[rows]), state)
        value = jax.tree.map(lambda leaf: leaf.clip(low, high), optax.apply_updates(value, updates))
    return value


net = make_net(eqx.nn.Conv2d, eqx.nn.Linear, eqx.nn.Lambda, jax.random.split(jax.random.key(0), 5))
data, (variables, static) = open_dataset("fashion_mnist_subset"), eqx.partition(net, eqx.is_inexact_array)
variables = fit(variables, loss, 500, 3e-3)
graph = fdjax.with_masks(fdjax.trace(apply, variables, data.test_images[:1] * 1.0))
masked, dense = fdjax.masked(loss, graph), fdjax.freeze(graph, variables, graph.full_counts())
with_penalty = lambda fcmask, *batch: masked(fcmask, variables, *batch) + fdjax.expected_ratio(graph, fcmask)  # noqa: E731
hard = fdjax.harden(graph, fit(fdjax.init_fcmask(graph), with_penalty, 100, 1e-2, 0, 1), target_macs=0.5)
frozen = fdjax.freeze(graph, fit(variables, lambda *given: masked(hard.counts, *given), 300, 1e-3), hard.counts)
before, after = ((net(data.test_images * 1.0).argmax(-1) == data.test_labels).mean() for net in (dense, frozen))
time = bench(frozen.frozen, dense.frozen, {}, batch=64)["time_ratio"]
print(f"{graph}\ndense {before:.1%}, pruned {after:.1%} at {hard.macs.ratio:.2f}x MACs and {time:.2f}x the time")
