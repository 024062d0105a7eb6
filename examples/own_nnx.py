"""Prunes a Flax NNX network of your own to half of its MACs: python examples/own_nnx.py (a minute on two cores)"""

import jax
import numpy as np
import optax
from flax import nnx

import fdjax
from fdjax.data import open_dataset
from fdjax.frozen.bench import bench


class Net(nnx.Module):
    def __init__(self, rngs):
        self.stem, self.mix = nnx.Conv(1, 24, (4, 4), strides=4, rngs=rngs), nnx.Conv(24, 24, (3, 3), rngs=rngs)
        self.expand, self.project, self.top = (nnx.Linear(*n, rngs=rngs) for n in ((24, 256), (256, 24), (24, 10)))

    def __call__(self, images):
        x = nnx.relu(self.stem(images / 255))
        return self.top((x + self.project(nnx.gelu(self.expand(self.mix(x))))).mean(axis=(1, 2)))


def apply(variables, images):
    return nnx.merge(graphdef, nnx.State(variables))(images)


def loss(variables, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(apply(variables, images), labels).mean()


def fit(value, function, steps, rate, low=-np.inf, high=np.inf):
    optimizer, gradient = optax.adam(rate), jax.jit(jax.grad(fdjax.fast_convolutions(function)))
    state, update = optimizer.init(value), jax.jit(optimizer.update)
    for rows in np.random.default_rng(0).integers(0, len(data.train_labels), (steps, 128)):
        updates, state = update(gradient(value, data.train_images[rows] * 1.0, data.train_labels[rows]), state)
        value = jax.tree.map(lambda leaf: leaf.clip(low, high), optax.apply_updates(value, updates))
    return value


data, (graphdef, state) = open_dataset("fashion_mnist_subset"), nnx.split(Net(nnx.Rngs(0)))
variables = fit(nnx.to_pure_dict(state), loss, 500, 3e-3)
graph = fdjax.with_masks(fdjax.trace(apply, variables, data.test_images[:1] * 1.0))
masked, dense = fdjax.masked(loss, graph), fdjax.freeze(graph, variables, graph.full_counts())
with_penalty = lambda fcmask, *batch: masked(fcmask, variables, *batch) + fdjax.expected_ratio(graph, fcmask)  # noqa: E731
hard = fdjax.harden(graph, fit(fdjax.init_fcmask(graph), with_penalty, 100, 1e-2, 0, 1), target_macs=0.5)
frozen = fdjax.freeze(graph, fit(variables, lambda *given: masked(hard.counts, *given), 300, 1e-3), hard.counts)
before, after = ((net(data.test_images * 1.0).argmax(-1) == data.test_labels).mean() for net in (dense, frozen))
time = bench(frozen.frozen, dense.frozen, {}, batch=64)["time_ratio"]
print(f"{graph}\ndense {before:.1%}, pruned {after:.1%} at {hard.macs.ratio:.2f}x MACs and {time:.2f}x the time")
