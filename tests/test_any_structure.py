"""Networks of many shapes: what is masked is frozen exactly, with the MACs that are counted; the rest stays."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend.core import Primitive
from jax.interpreters import mlir

import fdjax
from fdjax.config import LearnConfig
from fdjax.frozen.onnx_model import onnxruntime_session, to_onnx
from fdjax.training.network import trace_network
from fdjax.zoo import MobileNet


def norm(name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=True, name=name)


class ResNet(nn.Module):
    """Bottlenecks with a strided projection, as in flax's example."""

    groups: int = 1

    @nn.compact
    def __call__(self, x):
        x = nn.relu(norm("stem_norm")(nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for unit, (inner, stride) in enumerate(((6, 1), (8, 2), (8, 1))):
            name = f"unit{unit}"
            y = nn.relu(norm(f"{name}/norm1")(nn.Conv(inner, (1, 1), use_bias=False, name=f"{name}/conv1")(x)))
            y = nn.Conv(
                inner, (3, 3), (stride, stride), use_bias=False, feature_group_count=self.groups, name=f"{name}/conv2"
            )(y)
            y = nn.relu(norm(f"{name}/norm2")(y))
            y = norm(f"{name}/norm3")(nn.Conv(2 * inner, (1, 1), use_bias=False, name=f"{name}/conv3")(y))
            if x.shape != y.shape:
                x = nn.Conv(2 * inner, (1, 1), (stride, stride), use_bias=False, name=f"{name}/shortcut")(x)
            x = nn.relu(x + y)
        return nn.Dense(4, name="top")(x.mean(axis=(1, 2)))


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), name="stem")(x)
        for layer in range(3):
            y = nn.relu(norm(f"norm{layer}")(x))
            y = nn.relu(nn.Conv(8, (1, 1), name=f"narrow{layer}")(y))
            y = nn.Conv(4, (3, 3), name=f"grow{layer}")(y)
            x = jnp.concatenate([x, y], axis=-1)
            if layer == 1:
                x = nn.avg_pool(nn.Conv(7, (1, 1), name="transition")(nn.relu(x)), (2, 2), (2, 2))
        return nn.Dense(4, name="top")(nn.relu(x).mean(axis=(1, 2)))


class UNet(nn.Module):
    """Two heads: a map and a vector; upsampling by repetition, and by a transposed layout of pixels."""

    @nn.compact
    def __call__(self, x):
        high = nn.relu(nn.Conv(6, (3, 3), name="high")(x))
        low = nn.relu(nn.Conv(10, (3, 3), (2, 2), name="low")(high))
        low = nn.relu(nn.Conv(9, (1, 1), name="mix")(low))
        up = jnp.repeat(jnp.repeat(low, 2, axis=1), 2, axis=2)
        both = jnp.concatenate([up, high], axis=-1)
        both = nn.relu(nn.Conv(8, (1, 1), name="join")(both))
        return nn.Conv(2, (1, 1), name="map")(both), nn.Dense(3, name="top")(low.max(axis=(1, 2)))


class TransposedUNet(nn.Module):
    """Upsampling by a transposed convolution, behind padding that leaves constants at the borders."""

    @nn.compact
    def __call__(self, x):
        high = nn.relu(norm("high_norm")(nn.Conv(6, (3, 3), name="high")(x)))
        low = nn.relu(norm("low_norm")(nn.Conv(9, (3, 3), (2, 2), name="low")(high)))
        up = nn.relu(nn.ConvTranspose(7, (3, 3), (2, 2), name="up")(low))
        both = nn.relu(nn.Conv(8, (1, 1), name="join")(jnp.concatenate([up, high], axis=-1)))
        return nn.ConvTranspose(2, (2, 2), (2, 2), name="map")(both), nn.Dense(3, name="top")(low.mean(axis=(1, 2)))


class ConvNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="stem_norm")(nn.Conv(8, (2, 2), (2, 2), name="stem")(x))
        for unit in range(2):
            y = nn.Conv(8, (3, 3), feature_group_count=8, name=f"unit{unit}/depthwise")(x)
            y = nn.LayerNorm(name=f"unit{unit}/norm")(y)
            y = nn.Dense(12, name=f"unit{unit}/expand")(y)
            y = nn.Dense(8, name=f"unit{unit}/project")(nn.gelu(y))
            x = x + y * self.param(f"scale{unit}", nn.initializers.constant(0.5), (8,))
        return nn.Dense(4, name="top")(x.mean(axis=(1, 2)))


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), (2, 2), name="patches")(x)
        x = x.reshape(x.shape[0], -1, 8) + self.param("places", nn.initializers.normal(0.1), (1, 16, 8))
        for unit in range(2):
            y = nn.LayerNorm(name=f"unit{unit}/norm1")(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2, name=f"unit{unit}/attention")(y)
            y = nn.Dense(12, name=f"unit{unit}/expand")(nn.LayerNorm(name=f"unit{unit}/norm2")(x))
            x = x + nn.Dense(8, name=f"unit{unit}/project")(nn.gelu(y))
        return nn.Dense(4, name="top")(x.mean(axis=1))


class Shuffle(nn.Module):
    """Channel split, shuffle, and pixel shuffle."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        kept, changed = jnp.split(x, 2, axis=-1)
        changed = nn.relu(nn.Conv(6, (1, 1), name="one")(changed))
        changed = nn.Conv(4, (1, 1), name="two")(changed)
        x = jnp.concatenate([kept, changed], axis=-1)
        x = x.reshape(*x.shape[:3], 2, 4).swapaxes(3, 4).reshape(x.shape)
        x = nn.relu(nn.Conv(12, (1, 1), name="three")(x))
        x = nn.relu(nn.Conv(8, (1, 1), name="four")(x))
        x = x.reshape(*x.shape[:3], 2, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], 16, 16, 2)
        return nn.Conv(2, (1, 1), name="map")(x)


class ShuffleNet(nn.Module):
    """Units of ShuffleNet V2 (a split, of which one half goes through) and V1 (grouped layers around a shuffle)."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        for unit in range(2):
            name = f"unit{unit}"
            kept, y = jnp.split(x, 2, axis=-1)
            y = nn.relu(nn.Conv(6, (1, 1), name=f"{name}/expand")(y))
            y = nn.Conv(6, (3, 3), feature_group_count=6, name=f"{name}/depthwise")(y)
            y = nn.relu(nn.Conv(4, (1, 1), name=f"{name}/project")(y))
            x = jnp.concatenate([kept, y], axis=-1)
            x = x.reshape(*x.shape[:3], 2, 4).swapaxes(3, 4).reshape(x.shape)
        y = nn.relu(nn.Conv(12, (1, 1), feature_group_count=2, name="grouped1")(x))
        y = y.reshape(*y.shape[:3], 2, 6).swapaxes(3, 4).reshape(y.shape)
        x = x + nn.Conv(8, (1, 1), feature_group_count=2, name="grouped2")(y)
        return nn.Dense(3, name="top")(x.mean(axis=(1, 2)))


class ChannelsFirst(nn.Module):
    """NCHW and OIHW, as a function of its own weights."""

    @nn.compact
    def __call__(self, x):
        x = x.transpose(0, 3, 1, 2)
        for name, (inputs, outputs, window) in {"a": (3, 8, 3), "b": (8, 12, 1), "c": (12, 6, 1)}.items():
            kernel = self.param(name, nn.initializers.normal(0.3), (outputs, inputs, window, window))
            x = jax.nn.relu(jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME"))
        return x.mean(axis=(2, 3)) @ self.param("top", nn.initializers.normal(0.3), (6, 3))


NETS = {
    "resnet": ResNet(),
    "resnext": ResNet(groups=2),
    "densenet": DenseNet(),
    "unet": UNet(),
    "transposed": TransposedUNet(),
    "convnext": ConvNeXt(),
    "vit": ViT(),
    "shuffle": Shuffle(),
    "shufflenet": ShuffleNet(),
    "channels first": ChannelsFirst(),
}
MASKS = {
    "channels": {},
    "levels": {"block": 2, "levels": (0, 1)},
    "untied": {"block": 2, "tied": False},
}
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
# The map that tokens are.
GRIDS = {"vit": (4, 4)}


def random_variables(module: nn.Module):
    variables = jax.jit(module.init)(jax.random.key(0), IMAGES)
    leaves, tree = jax.tree.flatten(variables)
    rng = np.random.default_rng(1)
    moved = [np.asarray(leaf) + 0.2 * rng.uniform(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, moved)


def random_counts(graph, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: rng.choice(graph.levels_of(path), channels) for path, (channels, _) in graph.mask_sizes.items()}


def assert_alike(found, expected) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * float(jnp.abs(other).max()))


def cases():
    """Whole channels of every network in the gate, and where there is most to get wrong the other masks."""
    quick = {
        ("convnext", "levels"),
        ("vit", "levels"),
        ("shuffle", "levels"),
        ("channels first", "levels"),
        ("resnext", "untied"),
    }
    for name in NETS:
        for masks in MASKS:
            marks = () if masks == "channels" or (name, masks) in quick else pytest.mark.slow
            yield pytest.param(name, masks, marks=marks)


@pytest.mark.parametrize(("name", "masks"), list(cases()))
def test_frozen_is_masked_with_the_macs_that_are_counted(name, masks, monkeypatch):
    # A small map's bands are merged into fewer products, which multiply more than is counted.
    monkeypatch.setattr("fdjax.frozen.products._LEAST_SAVED", 0)
    module, settings = NETS[name], {**MASKS[masks], "grid": GRIDS.get(name)}
    variables = random_variables(module)
    graph = fdjax.with_masks(fdjax.trace(module.apply, variables, IMAGES[:1]), **settings)
    counts = random_counts(graph, 0)
    if masks == "channels":
        # Where all that a layer (or a group of it) reads is dead, freezing leaves out what it makes, which is counted:
        # so every second channel lives.
        counts = {path: np.maximum(count, np.arange(len(count)) % 2) for path, count in counts.items()}
    frozen = fdjax.freeze(graph, variables, counts)
    assert_alike(frozen(IMAGES), jax.jit(fdjax.masked(module.apply, graph))(counts, variables, IMAGES))
    macs, program = fdjax.count(graph, counts).to_dict(), frozen.frozen.program.macs()
    assert program <= macs["total"]
    if masks == "channels":
        assert program == macs["total"] < macs["dense"]
        np.testing.assert_allclose(fdjax.expected_ratio(graph, fdjax.init_fcmask(graph)), 1, rtol=1e-6)
        soft = {path: jnp.asarray(count, jnp.float32) for path, count in counts.items()}
        np.testing.assert_allclose(fdjax.expected_ratio(graph, soft), macs["ratio"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", NETS)
def test_onnx_runtime_says_the_same(name, masks):
    module, settings = NETS[name], {**MASKS[masks], "grid": GRIDS.get(name)}
    variables = random_variables(module)
    graph = fdjax.with_masks(fdjax.trace(module.apply, variables, IMAGES[:1]), **settings)
    counts = random_counts(graph, 0)
    frozen = fdjax.freeze(graph, variables, counts).frozen
    found = onnxruntime_session(to_onnx(frozen.program, frozen.arrays))(IMAGES)
    assert_alike(found, jax.jit(fdjax.masked(module.apply, graph))(counts, variables, IMAGES))


def test_half_of_all_channels_dead_shrinks_every_layer():
    module = NETS["resnet"]
    variables = random_variables(module)
    graph = fdjax.with_masks(fdjax.trace(module.apply, variables, IMAGES[:1]))
    counts = {path: np.arange(channels) % 2 for path, (channels, _) in graph.mask_sizes.items()}
    shares = {layer.name: layer.total / layer.dense for layer in fdjax.count(graph, counts).layers}
    # The images' channels and the results stay.
    assert shares == {name: 0.5 if name in ("stem", "top") else 0.25 for name in graph.layers}


def test_a_concatenation_is_read_with_the_masks_it_was_written_with():
    module = NETS["densenet"]
    variables = random_variables(module)
    graph = fdjax.with_masks(fdjax.trace(module.apply, variables, IMAGES[:1]))
    assert graph.paths_of("narrow1", "input") == ("stem/channels", "grow0/channels")
    counts = graph.full_counts() | {"grow0/channels": np.array([1, 0, 0, 1])}
    assert graph.side_counts(counts, "narrow1", "input").tolist() == [1] * 6 + [1, 0, 0, 1]


class Around(nn.Module):
    """Two layers around an operation on live channels."""

    operation: Any

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (1, 1), name="one")(x))
        x = nn.relu(nn.Conv(6, (1, 1), name="two")(x))
        x = self.operation(x)
        return nn.Dense(3, name="top")(nn.relu(nn.Conv(5, (1, 1), name="three")(x)).mean(axis=(1, 2)))


# A primitive of someone's own, without a form in JSON or a rule for channels.
TWICE = Primitive("twice")
TWICE.def_impl(lambda x: 2 * x)
TWICE.def_abstract_eval(lambda x: x)
mlir.register_lowering(TWICE, mlir.lower_fun(lambda x: 2 * x, multiple_results=False))

OPERATIONS = {
    "scan": lambda x: jax.lax.scan(lambda carry, _: (jnp.sin(carry), None), x, None, length=2)[0],
    "while": lambda x: jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, 2 * s[1]), (0, x))[1],
    "cond": lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
    "cumsum": lambda x: jnp.cumsum(x, axis=-1),
    "sort": lambda x: jnp.sort(x, axis=-1),
    "top_k": lambda x: jax.lax.top_k(x, 6)[0],
    "pure_callback": lambda x: jax.pure_callback(np.sin, x, x),
    "twice": lambda x: TWICE.bind(x),
}


@pytest.mark.parametrize("kind", OPERATIONS)
def test_channels_that_pass_what_is_not_understood_stay(kind):
    module = Around(OPERATIONS[kind])
    variables = random_variables(module)
    graph = fdjax.trace(module.apply, variables, IMAGES[:1])
    reason = graph.spaces["two"].pinned
    assert reason is not None and "test_any_structure.py:" in reason and reason in str(graph)
    assert f"{kind} is not understood (test_any_structure.py:" in str(graph)
    masked = fdjax.with_masks(graph)
    assert set(masked.masks) == {"one/channels", "three/channels"}
    counts = random_counts(masked, 0)
    expected = fdjax.masked(module.apply, masked)(counts, variables, IMAGES)
    try:
        frozen = fdjax.freeze(masked, variables, counts)
    except ValueError as error:
        # What has no form in a frozen network is said, not guessed.
        assert kind in str(error)
    else:
        assert_alike(frozen(IMAGES), expected)


class Scanned(nn.Module):
    """Two units in a loop over stacked kernels, between layers of their own."""

    @nn.compact
    def __call__(self, x):
        class Unit(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.relu(nn.Conv(6, (1, 1), name="inner")(x)), None

        x = nn.relu(nn.Conv(6, (3, 3), name="stem")(x))
        units = nn.scan(Unit, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = units(name="units")(x, None)
        return nn.Dense(3, name="top")(nn.relu(nn.Conv(5, (1, 1), name="after")(x)).mean(axis=(1, 2)))


def test_layers_in_a_loop_stay_and_those_around_it_are_masked():
    module = Scanned()
    variables = random_variables(module)
    graph = fdjax.with_masks(fdjax.trace(module.apply, variables, IMAGES[:1]))
    assert set(graph.masks) == {"after/channels"} and set(graph.layers) == {"stem", "after", "top"}
    assert "scan is not understood (test_any_structure.py:" in str(graph.spaces["stem"].pinned)
    counts = {"after/channels": np.array([1, 0, 1, 0, 0])}
    found = fdjax.masked(module.apply, graph)(counts, variables, IMAGES)
    dropped = {**variables["params"], "top": {**variables["params"]["top"]}}
    dropped["top"]["kernel"] = dropped["top"]["kernel"] * counts["after/channels"][:, None]
    assert_alike(found, module.apply({"params": dropped}, IMAGES))
    with pytest.raises(ValueError, match=r"scan \(test_any_structure\.py:\d+\)"):
        fdjax.freeze(graph, variables, counts)


def test_a_network_of_which_nothing_can_be_pruned_says_why():
    module = Around(OPERATIONS["sort"])
    x = jnp.ones((1, 8, 8, 3))

    def apply(variables, x):
        return jnp.sort(jnp.asarray(nn.Conv(4, (1, 1)).apply(variables, x)), axis=-1)

    variables = nn.Conv(4, (1, 1)).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"nothing that can be masked: kernel \(pointwise\) .*sort is not understood"):
        fdjax.with_masks(fdjax.trace(apply, variables, x))
    with pytest.raises(ValueError, match="cannot be traced with images of shape"):
        fdjax.trace(module.apply, random_variables(module), np.zeros((1, 8, 8, 4), np.float32))


@pytest.mark.parametrize("tied", [False, True])
def test_masks_get_the_gradients_of_the_zoos_own_layers(tied):
    module: Any = MobileNet("mobilenetv2_small", 5, width=0.2, block=2, tied=tied, levels=(0, 1))
    images = np.random.default_rng(3).normal(size=(2, 12, 12, 3)).astype(np.float32)
    learn = LearnConfig(block=2, tied=tied, levels="0,1,N")
    graph = trace_network(module, (12, 12, 3), learn)
    variables = dict(jax.jit(module.init)(jax.random.key(0), images))
    shapes = flatten_dict(variables.pop("fcmask"), sep="/")
    rng = np.random.default_rng(4)
    masks = {path: rng.uniform(0.1, 0.9, graph.mask_sizes[path][0]).astype(np.float32) for path in shapes}
    plain = module.without_masks()

    def own(masks):
        return (module.apply({**variables, "fcmask": unflatten_dict(masks, sep="/")}, images) ** 2).sum()

    def outside(masks):
        return (fdjax.masked(plain.apply, graph)(masks, variables, images) ** 2).sum()

    expected, found = (jax.jit(jax.grad(function))(masks) for function in (own, outside))
    for path, gradient in expected.items():
        np.testing.assert_allclose(found[path], gradient, rtol=0, atol=1e-5 * float(jnp.abs(gradient).max()))
