"""A Flax NNX network of your own with half of its MACs: python examples/own_nnx.py (a minute on two cores)"""

import jax
import numpy as np
import optax
from flax import nnx

import fdjax
from fdjax.data import open_dataset
from fdjax.frozen.bench import bench


class Net(nnx.Module):
    def __init__(self, rngs):
        conv = lambda inputs, outputs, side=1, **how: nnx.Conv(inputs, outputs, (side, side), rngs=rngs, **how)  # noqa: E731
        self.stem, self.classifier = conv(1, 24, 4, strides=4), nnx.Linear(24, 10, rngs=rngs)
        self.mix, self.norm = conv(24, 24, 3, feature_group_count=24), nnx.LayerNorm(24, rngs=rngs)
        self.expand, self.project = conv(24, 192), conv(192, 24)

    def __call__(self, images):
        x = self.stem(images / 255)
        x = x + self.project(nnx.gelu(self.expand(self.norm(self.mix(x)))))
        return self.classifier(x.mean(axis=(1, 2)))


def apply(variables, images):
    state = jax.tree.map(lambda leaf: leaf, start)
    nnx.replace_by_pure_dict(state, variables)
    return nnx.merge(graphdef, state)(images)


def loss(variables, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(apply(variables, images), labels).mean()


def fit(value, function, steps, rate, project=lambda value: value):
    optimizer, rng, gradient = optax.adam(rate), np.random.default_rng(0), jax.jit(jax.grad(function))
    state, update = optimizer.init(value), jax.jit(optimizer.update)
    for _ in range(steps):
        rows = rng.integers(0, len(data.train_labels), 128)
        updates, state = update(gradient(value, data.train_images[rows] * 1.0, data.train_labels[rows]), state)
        value = project(optax.apply_updates(value, updates))
    return value


data, images, (graphdef, start) = (
    open_dataset("fashion_mnist_subset"),
    np.ones((1, 28, 28, 1)),
    nnx.split(Net(nnx.Rngs(0))),
)
variables = fit(nnx.to_pure_dict(start), loss, 500, 3e-3)
graph = fdjax.with_masks(fdjax.trace(apply, variables, images))
masked, dense = fdjax.masked(loss, graph), fdjax.freeze(graph, variables, graph.full_counts())
with_penalty = lambda fcmask, *batch: masked(fcmask, variables, *batch) + fdjax.expected_ratio(graph, fcmask)  # noqa: E731
fcmask = fit(fdjax.init_fcmask(graph), with_penalty, 100, 1e-2, lambda m: jax.tree.map(lambda m: m.clip(0, 1), m))
hard = fdjax.harden(graph, fcmask, target_macs=0.5)
frozen = fdjax.freeze(graph, fit(variables, lambda *given: masked(hard.counts, *given), 300, 1e-3), hard.counts)
before, after = ((net(data.test_images * 1.0).argmax(-1) == data.test_labels).mean() for net in (dense, frozen))
time = bench(frozen.frozen, dense.frozen, {}, batch=64)["time_ratio"]
print(f"{graph}\ndense {before:.1%}, pruned {after:.1%} at {hard.macs.ratio:.2f}x MACs and {time:.2f}x the time")
