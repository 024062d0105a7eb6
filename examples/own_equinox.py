"""An Equinox network of your own with half of its MACs: python examples/own_equinox.py (a minute on two cores)"""

import equinox as eqx
import jax
import numpy as np
import optax

import fdjax
from fdjax.data import open_dataset
from fdjax.frozen.bench import bench


class Net(eqx.Module):
    layers: dict

    def __init__(self, key):
        sizes = {
            "stem": (1, 24, 4, 4),
            "mix": (24, 24, 3, 1, 1, 1, 24),
            "expand": (24, 192, 1),
            "project": (192, 24, 1),
        }
        keys = jax.random.split(key, 5)
        self.layers = {name: eqx.nn.Conv2d(*size, key=k) for k, (name, size) in zip(keys, sizes.items(), strict=False)}
        self.layers["classifier"] = eqx.nn.Linear(24, 10, key=keys[4])

    def __call__(self, image):
        at = self.layers
        x = at["stem"](image.transpose(2, 0, 1) / 255)
        x = x + at["project"](jax.nn.gelu(at["expand"](at["mix"](x))))
        return at["classifier"](x.mean(axis=(1, 2)))


def apply(variables, images):
    return jax.vmap(eqx.combine(variables, static))(images)


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


data, images = open_dataset("fashion_mnist_subset"), np.ones((1, 28, 28, 1))
start, static = eqx.partition(Net(jax.random.key(0)), eqx.is_inexact_array)
variables = fit(start, loss, 500, 3e-3)
graph = fdjax.with_masks(fdjax.trace(apply, variables, images))
masked, dense = fdjax.masked(loss, graph), fdjax.freeze(graph, variables, graph.full_counts())
with_penalty = lambda fcmask, *batch: masked(fcmask, variables, *batch) + fdjax.expected_ratio(graph, fcmask)  # noqa: E731
fcmask = fit(fdjax.init_fcmask(graph), with_penalty, 100, 1e-2, lambda m: jax.tree.map(lambda m: m.clip(0, 1), m))
hard = fdjax.harden(graph, fcmask, target_macs=0.5)
frozen = fdjax.freeze(graph, fit(variables, lambda *given: masked(hard.counts, *given), 300, 1e-3), hard.counts)
before, after = ((net(data.test_images * 1.0).argmax(-1) == data.test_labels).mean() for net in (dense, frozen))
time = bench(frozen.frozen, dense.frozen, {}, batch=64)["time_ratio"]
print(f"{graph}\ndense {before:.1%}, pruned {after:.1%} at {hard.macs.ratio:.2f}x MACs and {time:.2f}x the time")
