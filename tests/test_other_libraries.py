"""Models of NNX, Equinox and Keras are traced, masked and frozen as functions of their variables."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdjax

IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


def check(apply: Callable[..., Any], variables: Any, layers: set[str], **settings: Any) -> None:
    """The graph has these layers with masks, and the frozen network is the masked one."""
    graph = fdjax.with_masks(fdjax.trace(apply, variables, IMAGES[:1]), **settings)
    assert set(graph.blocks) == layers
    rng = np.random.default_rng(1)
    counts = {path: rng.integers(0, n + 1, channels) for path, (channels, n) in graph.mask_sizes.items()}
    masked = fdjax.masked(apply, graph)(counts, variables, IMAGES)
    assert float(jnp.abs(masked - apply(variables, IMAGES)).max()) > 1e-3
    frozen = fdjax.freeze(graph, variables, counts)
    np.testing.assert_allclose(frozen(IMAGES), masked, rtol=0, atol=1e-4 * float(jnp.abs(masked).max()))


def test_nnx():
    """With dropout, whose random key and counter are among the variables and read by nothing at inference."""
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.expand = nnx.Conv(8, 16, (1, 1), rngs=rngs)
            self.project = nnx.Conv(16, 8, (1, 1), rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)
            self.classifier = nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            x = jax.nn.relu(self.norm(self.stem(x)))
            x = x + self.project(jax.nn.silu(self.expand(x)))
            return self.classifier(self.dropout(x.mean(axis=(1, 2))))

    model = Net(nnx.Rngs(0))
    model.eval()
    graphdef, state = nnx.split(model)

    variables = nnx.to_pure_dict(state)

    def pure(variables, images):
        replaced = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(replaced, variables)
        return nnx.merge(graphdef, replaced)(images)

    check(pure, variables, {"expand", "project"}, block=2, tied=False)

    # Without the state of random numbers, the variables have gradients.
    graphdef, trained, rest = nnx.split(model, (nnx.Param, nnx.BatchStat), ...)
    variables = nnx.to_pure_dict(trained)

    def without_keys(variables, images):
        return nnx.merge(graphdef, nnx.State(variables), rest)(images)

    np.testing.assert_array_equal(without_keys(variables, IMAGES), model(IMAGES))
    jax.grad(lambda variables: without_keys(variables, IMAGES).sum())(variables)
    check(without_keys, variables, {"expand", "project"}, block=2, tied=False)


def test_random_keys_are_kept_unless_they_are_read(tmp_path):
    variables = {"kernel": jnp.ones((3, 5)), "top": jnp.ones((5, 2)), "key": jax.random.key(0)}

    def dropped(variables, images):
        kept = jax.random.bernoulli(variables["key"], 0.5, (1, 8, 8, 5))
        return (jax.nn.relu(images @ variables["kernel"]) * kept).mean((1, 2)) @ variables["top"]

    def whole(variables, images):
        return jax.nn.relu(images @ variables["kernel"]).mean((1, 2)) @ variables["top"]

    graph = fdjax.with_masks(fdjax.trace(whole, variables, IMAGES[:1]), block=1)
    frozen = fdjax.freeze(graph, variables, graph.full_counts())
    frozen.save(tmp_path / "frozen")
    for network in (frozen, fdjax.load(tmp_path / "frozen")):
        np.testing.assert_allclose(network(IMAGES), whole(variables, IMAGES), rtol=1e-5)
    graph = fdjax.with_masks(fdjax.trace(dropped, variables, IMAGES[:1]), block=1)
    with pytest.raises(ValueError, match=r"reads the random key key, .* trace the network as it is at inference"):
        fdjax.freeze(graph, variables, graph.full_counts())


@pytest.mark.slow
def test_an_nnx_resnet():
    """Bottlenecks with batch norm and a strided shortcut; residual streams are pruned too."""
    from flax import nnx

    class Unit(nnx.Module):
        def __init__(self, inputs: int, wide: int, stride: int, rngs: nnx.Rngs):
            self.convs = nnx.List(
                [
                    nnx.Conv(inputs, wide, (1, 1), use_bias=False, rngs=rngs),
                    nnx.Conv(wide, wide, (3, 3), strides=stride, use_bias=False, rngs=rngs),
                    nnx.Conv(wide, 2 * wide, (1, 1), use_bias=False, rngs=rngs),
                ]
            )
            self.norms = nnx.List([nnx.BatchNorm(n, rngs=rngs) for n in (wide, wide, 2 * wide)])
            changed = stride > 1 or inputs != 2 * wide
            shortcut = nnx.Conv(inputs, 2 * wide, (1, 1), strides=stride, use_bias=False, rngs=rngs)
            self.shortcut = nnx.List([shortcut] if changed else [])

        def __call__(self, x):
            y = x
            for at, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
                y = norm(conv(y))
                y = jax.nn.relu(y) if at < 2 else y
            return jax.nn.relu(y + (self.shortcut[0](x) if len(self.shortcut) else x))

    class ResNet(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.units = nnx.List([Unit(8, 4, 1, rngs), Unit(8, 6, 2, rngs), Unit(12, 6, 1, rngs)])
            self.top = nnx.Linear(12, 4, rngs=rngs)

        def __call__(self, x):
            x = nnx.max_pool(jax.nn.relu(self.stem(x)), (2, 2), strides=(1, 1), padding="SAME")
            for unit in self.units:
                x = unit(x)
            return self.top(x.mean(axis=(1, 2)))

    model = ResNet(nnx.Rngs(0))
    model.eval()
    graphdef, state = nnx.split(model)
    variables = nnx.to_pure_dict(state)

    def pure(variables, images):
        replaced = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(replaced, variables)
        return nnx.merge(graphdef, replaced)(images)

    inner = {f"units/{unit}/convs/{at}" for unit in range(3) for at in (0, 2)}
    check(jax.jit(pure), variables, inner)


def test_equinox_with_channels_first():
    equinox = pytest.importorskip("equinox")

    class Net(equinox.Module):
        layers: list

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            self.layers = [
                equinox.nn.Conv2d(3, 8, 3, padding=1, key=keys[0]),
                equinox.nn.Conv2d(8, 16, 1, key=keys[1]),
                equinox.nn.Conv2d(16, 8, 1, key=keys[2]),
                equinox.nn.Linear(8, 4, key=keys[3]),
            ]

        def __call__(self, x):
            stem, expand, project, classifier = self.layers
            x = jax.nn.relu(stem(x.transpose(2, 0, 1)))
            x = project(jax.nn.relu(expand(x)))
            return classifier(x.mean(axis=(1, 2)))

    variables, static = equinox.partition(Net(jax.random.key(0)), equinox.is_inexact_array)

    def apply(variables, images):
        return jax.vmap(equinox.combine(variables, static))(images)

    check(apply, variables, {"layers/1", "layers/2"}, block=2)


def test_keras(monkeypatch):
    monkeypatch.setitem(os.environ, "KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(0)
    model = keras.applications.MobileNetV3Small(weights=None, input_shape=(32, 32, 3), classes=5, alpha=0.25)
    rng = np.random.default_rng(2)
    # What a new network has is 0 and 1 everywhere; and its classifier looks at nothing.
    variables = {v.path: v.value + 0.2 * rng.uniform(size=v.shape).astype(v.dtype) for v in model.variables}

    def apply(variables, images):
        trainable, others = (
            [variables[v.path] for v in of] for of in (model.trainable_variables, model.non_trainable_variables)
        )
        return model.stateless_call(trainable, others, images, training=False)[0]

    graph = fdjax.trace(apply, variables, np.zeros((1, 32, 32, 3), np.float32))
    # Counted once more from Keras' own list of layers.
    macs = 0
    for layer in model.layers:
        if isinstance(layer, keras.layers.DepthwiseConv2D):
            macs += int(np.prod(layer.output.shape[1:])) * int(np.prod(layer.kernel.shape[:2]))
        elif isinstance(layer, keras.layers.Conv2D):
            macs += int(np.prod(layer.output.shape[1:])) * int(np.prod(layer.kernel.shape[:3]))
    assert sum(layer.dense_macs for layer in graph.layers.values()) == macs
    graph = fdjax.with_masks(graph)
    counts = {path: rng.integers(0, 2, channels) for path, (channels, _) in graph.mask_sizes.items()}
    images = np.random.default_rng(3).uniform(0, 255, (2, 32, 32, 3)).astype(np.float32)
    masked = jax.jit(fdjax.masked(apply, graph))(counts, variables, images)
    np.testing.assert_allclose(fdjax.freeze(graph, variables, counts)(images), masked, rtol=0, atol=1e-5)
