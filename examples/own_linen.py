"""A Flax Linen network of your own with fewer MACs: python examples/own_linen.py (less than a minute on two cores)"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fdjax
from fdjax.data import open_dataset


class Net(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(12, (4, 4), strides=4, name="stem")(images / 255))
        for name in ("unit1", "unit2"):
            y = nn.gelu(nn.Conv(48, (1, 1), name=f"{name}/expand")(nn.Conv(12, (3, 3), name=f"{name}/mix")(x)))
            x = x + nn.Conv(12, (1, 1), name=f"{name}/project")(y)
        return nn.Dense(10, name="classifier")(x.mean(axis=(1, 2)))


data, net = open_dataset("fashion_mnist_subset"), Net()
one = jnp.ones((1, 28, 28, 1))


def loss(variables, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(net.apply(variables, images), labels).mean()


def fit(value, function, steps, rate, project=lambda value: value):
    optimizer, rng, step = optax.adam(rate), np.random.default_rng(0), jax.jit(jax.grad(function))
    state = optimizer.init(value)
    for _ in range(steps):
        rows = rng.integers(0, len(data.train_labels), 128)
        gradient = step(value, data.train_images[rows].astype(np.float32), data.train_labels[rows])
        updates, state = optimizer.update(gradient, state)
        value = project(optax.apply_updates(value, updates))
    return value


def accuracy(apply):
    return f"{(apply(data.test_images.astype(np.float32)).argmax(-1) == data.test_labels).mean():.1%}"


variables = fit(net.init(jax.random.key(0), one), loss, 400, 3e-3)
print("dense:", accuracy(lambda images: net.apply(variables, images)))

graph = fdjax.with_masks(fdjax.trace(net.apply, variables, one), block=1)
print(graph)
masked, ratio = fdjax.masked(loss, graph), fdjax.expected_ratio
fcmask = fit(
    fdjax.init_fcmask(graph),
    lambda fcmask, *batch: masked(fcmask, variables, *batch) + ratio(graph, fcmask),
    steps=100,
    rate=1e-2,
    project=lambda fcmask: {path: mask.clip(0, 1) for path, mask in fcmask.items()},
)
hard = fdjax.harden(graph, fcmask, target_macs=0.75)
variables = fit(variables, lambda variables, *batch: masked(hard.counts, variables, *batch), 200, 1e-3)
frozen = fdjax.freeze(graph, variables, hard.counts)
print(f"pruned: {accuracy(frozen)} at {hard.macs.ratio:.2f}x MACs")
