"""The frequency layer, batch norm as a module, and MobileNet against its graph and against hand compositions."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from fdjax.graph.counting import network_macs
from fdjax.graph.masks import SIDES, MaskedGraph
from fdjax.ops import banded_pointwise, masked_pointwise, plan_bands, pointwise
from fdjax.ops.fcmask import coef_mask, counts_to_fcmask
from fdjax.pruning import gate_counts
from fdjax.training.build import hard_network
from fdjax.zoo import FCMASK, MOBILENETS, FrequencyPointwise, MobileNet, frequency, normalization
from fdjax.zoo.network import round_channels
from fdjax.zoo.normalization import BatchNorm, Depthwise, Pointwise
from tests.graph_networks import network_for
from tests.small_network import units

# A network that compiles in a few seconds: 8 to 24 channels, maps of 6x6 and (not divided by the block) 3x3.
SHAPE = (12, 12, 3)
TINY = MobileNet("mobilenetv2_small", 5, width=0.35, block=2)
fast_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def masks_of(graph: MaskedGraph, counts: dict[str, np.ndarray]) -> dict:
    """Kept counts as an `fcmask` collection."""
    return unflatten_dict(
        {path: jnp.asarray(counts_to_fcmask(c, graph.mask_sizes[path][1])) for path, c in counts.items()}, sep="/"
    )


def random_counts(graph: MaskedGraph, seed: int = 0, whole: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Any counts; 0 and N only in the masks of the layers named in `whole`."""
    rng = np.random.default_rng(seed)
    counts = {path: rng.integers(0, n + 1, channels) for path, (channels, n) in graph.mask_sizes.items()}
    for path in dict.fromkeys(graph.mask_of(name, side) for name in whole for side in SIDES):
        if path:
            channels, num_coefs = graph.mask_sizes[path]
            counts[path] = num_coefs * rng.integers(0, 2, channels)
    return counts


def random_variables(network: MobileNet, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> dict[str, Any]:
    """Kernels as initialised by shape, and batch norms that do something: ReLU6 clips at both ends."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: network.init(key, jnp.zeros((1, *shape))), jax.random.key(0))

    def fill(path, leaf) -> jax.Array:
        name = path[-1].key
        if name == "scale":
            value = rng.uniform(1, 3, leaf.shape)
        elif name == "var":
            value = rng.uniform(0.5, 1.5, leaf.shape)
        elif name in ("bias", "mean"):
            value = rng.normal(0.5, 0.5, leaf.shape)
        else:
            value = rng.normal(size=leaf.shape) / np.sqrt(max(leaf.size / leaf.shape[-1], 1))
        return jnp.asarray(value, jnp.float32)

    variables = jax.tree_util.tree_map_with_path(fill, {k: v for k, v in shapes.items() if k != FCMASK})
    return {**variables, FCMASK: jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes[FCMASK])}


def images(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(9).normal(size=(batch, *SHAPE)).astype(np.float32)


@cache
def applied(network: MobileNet) -> Callable[..., jax.Array]:
    """The compiled network in evaluation."""
    return fast_jit(network.apply)


def logits(network: MobileNet, variables: dict, fcmask: dict | None = None) -> np.ndarray:
    if fcmask is not None:
        variables = {**variables, FCMASK: fcmask}
    return np.asarray(applied(network)(variables, images()))


# The layer


def test_layer_owns_its_masks_and_they_start_at_one() -> None:
    x = jnp.ones((1, 4, 4, 3))
    for sides in ((True, True), (True, False), (False, True), (False, False)):
        layer = FrequencyPointwise(5, 2, *sides)
        variables = jax.eval_shape(layer.init, jax.random.key(0), x)
        expected = {name: (size,) for name, size, own in (("input", 3, sides[0]), ("output", 5, sides[1])) if own}
        assert {name: leaf.shape for name, leaf in variables.get(FCMASK, {}).items()} == expected
    masks = fast_jit(FrequencyPointwise(5, 2).init)(jax.random.key(0), x)[FCMASK]
    np.testing.assert_array_equal(masks["input"], np.ones(3))
    np.testing.assert_array_equal(masks["output"], np.ones(5))


def test_layer_with_hard_masks_is_the_banded_layer() -> None:
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 5, 4, 3)).astype(np.float32), rng.normal(size=(3, 5)).astype(np.float32)
    inputs, outputs = [4, 1, 0], [2, 4, 0, 1, 3]
    own = {"input": counts_to_fcmask(np.array(inputs), 4), "output": counts_to_fcmask(np.array(outputs), 4)}
    expected = fast_jit(banded_pointwise, static_argnums=2)(x, kernel, plan_bands(inputs, outputs, 2))
    for mode in ("hard", "soft"):
        y = fast_jit(FrequencyPointwise(5, 2, mode=mode).apply)({"params": {"kernel": kernel}, FCMASK: own}, x)
        np.testing.assert_allclose(y, expected, atol=1e-5)
        # Masks that are handed over take the place of own ones.
        given = FrequencyPointwise(5, 2, False, False, mode=mode)
        y = fast_jit(given.apply)({"params": {"kernel": kernel}}, x, own["input"], own["output"])
        np.testing.assert_allclose(y, expected, atol=1e-5)
    dense = FrequencyPointwise(5, 2, mode="off").apply({"params": {"kernel": kernel}, FCMASK: own}, x)
    np.testing.assert_allclose(dense, x @ kernel, atol=1e-5)


def test_layer_with_levels_fades_from_one_to_the_next() -> None:
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 5, 4, 3)).astype(np.float32), rng.normal(size=(3, 5)).astype(np.float32)
    layer = fast_jit(FrequencyPointwise(5, 2, levels=(0, 1)).apply)

    def apply(inputs: list[float], outputs: list[float]) -> np.ndarray:
        masks = {"input": jnp.array(inputs), "output": jnp.array(outputs)}
        return np.asarray(layer({"params": {"kernel": kernel}, FCMASK: masks}, x))

    # Of three levels 0, a half and 1 are the places.
    places, counts = ([0.5, 0, 1], [1, 1, 0.5, 0, 0.5]), ([1, 0, 4], [4, 4, 1, 0, 1])
    expected = fast_jit(banded_pointwise, static_argnums=2)(x, kernel, plan_bands(*counts, 2))
    np.testing.assert_allclose(apply(*places), expected, atol=1e-5)
    # In between, the function is a mixture.
    between = apply([0.625, 0, 1], places[1])
    np.testing.assert_allclose(between, 0.75 * apply(*places) + 0.25 * apply([1, 0, 1], places[1]), atol=1e-5)
    assert not np.allclose(between, apply(*places), atol=1e-3)


def test_the_network_hands_its_levels_to_every_wrapped_layer() -> None:
    variables = random_variables(TINY)
    graph = network_for(TINY, SHAPE)
    counts = {path: np.resize([n, 1, n], channels) for path, (channels, n) in graph.mask_sizes.items()}
    # At the levels 0, 1 and N soft masks are hard ones.
    places = unflatten_dict(
        {path: jnp.asarray(np.where(count == 1, 0.5, 1), jnp.float32) for path, count in counts.items()}, sep="/"
    )
    soft = logits(dataclasses.replace(TINY, levels=(0, 1)), variables, places)
    hard = logits(dataclasses.replace(TINY, mode="hard"), variables, masks_of(graph, counts))
    np.testing.assert_allclose(soft, hard, rtol=1e-4, atol=1e-4)


def test_hard_masks_are_rounded_soft_ones() -> None:
    x, kernel = jnp.ones((1, 2, 2, 1)), jnp.ones((1, 1))
    apply = cache(lambda mode: fast_jit(FrequencyPointwise(1, 2, output_side=False, mode=mode).apply))
    for mask, hard, soft in ((0.1, 0.0, 0.4), (0.125, 1.0, 0.5), (0.2, 1.0, 0.8), (0.3, 1.0, 1.0)):
        for mode, expected in (("hard", hard), ("soft", soft)):
            y = apply(mode)({"params": {"kernel": kernel}, FCMASK: {"input": jnp.array([mask])}}, x)
            np.testing.assert_allclose(y, np.full((1, 2, 2, 1), expected), atol=1e-6)


def test_soft_masks_have_gradients_and_hard_ones_have_none() -> None:
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 3)).astype(np.float32)
    variables = fast_jit(FrequencyPointwise(5, 2).init)(jax.random.key(0), x)

    def gradients(mode: str):
        layer = FrequencyPointwise(5, 2, mode=mode)
        loss = lambda masks: jnp.sum(layer.apply({**variables, FCMASK: masks}, x) ** 2)  # noqa: E731
        return fast_jit(jax.grad(loss))(variables[FCMASK])

    soft, hard = gradients("soft"), gradients("hard")
    for side in ("input", "output"):
        assert (np.abs(soft[side]) > 1e-4).all()  # at exactly 1.0, where training starts
        np.testing.assert_array_equal(hard[side], np.zeros_like(hard[side]))


def test_an_unknown_mode_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"mode must be one of \('off', 'soft', 'hard'\), got 'on'"):
        FrequencyPointwise(5, 2, mode="on").init(jax.random.key(0), jnp.ones((1, 4, 4, 3)))  # type: ignore[arg-type]


def test_bfloat16_images_stay_bfloat16_through_the_layer() -> None:
    x = jnp.ones((1, 4, 4, 3), jnp.bfloat16)
    for mode in ("off", "soft", "hard"):
        layer = FrequencyPointwise(5, 2, mode=mode)
        y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
        assert variables["params"]["kernel"].dtype == jnp.float32
        assert y.dtype == jnp.bfloat16


# Batch norm


def test_batch_norm_is_flaxs_own() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, (4, 3, 5, 6)).astype(np.float32)
    settings = {"momentum": 0.8, "epsilon": 1e-3}
    theirs = nn.BatchNorm(use_running_average=False, **settings)
    ours = BatchNorm(use_running_average=False, **settings)
    initial = theirs.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(0), x)) == jax.tree.map(jnp.shape, initial)
    variables = {
        "params": {"scale": jnp.asarray(rng.uniform(1, 2, 6)), "bias": jnp.asarray(rng.normal(size=6))},
        "batch_stats": {"mean": jnp.asarray(rng.normal(size=6)), "var": jnp.asarray(rng.uniform(1, 2, 6))},
    }
    for _ in range(3):  # the averages of several batches in turn
        y, updated = ours.apply(variables, x, mutable=["batch_stats"])
        expected, expected_stats = theirs.apply(variables, x, mutable=["batch_stats"])
        np.testing.assert_allclose(y, expected, atol=1e-5)
        for name in ("mean", "var"):
            np.testing.assert_allclose(
                updated["batch_stats"][name], expected_stats["batch_stats"][name], rtol=1e-5, atol=1e-6
            )
        variables = {**variables, **updated}
        x = x * 1.5 + 1
    running = BatchNorm(use_running_average=True, **settings).apply(variables, x)
    expected = nn.BatchNorm(use_running_average=True, **settings).apply(variables, x)
    np.testing.assert_allclose(running, expected, atol=1e-5)
    clipped = BatchNorm(use_running_average=True, relu6=True, **settings).apply(variables, x)
    np.testing.assert_allclose(clipped, np.clip(expected, 0, 6), atol=1e-5)
    assert np.min(expected) < 0 and np.max(expected) > 6


def test_batch_norm_leaves_its_averages_alone_in_evaluation_and_at_the_start() -> None:
    x = jnp.full((2, 3, 3, 4), 7.0)
    started = BatchNorm(use_running_average=False).init(jax.random.key(0), x)["batch_stats"]
    np.testing.assert_array_equal(started["mean"], np.zeros(4))
    np.testing.assert_array_equal(started["var"], np.ones(4))
    variables = {"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}, "batch_stats": started}
    _, after = BatchNorm(use_running_average=True).apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_array_equal(after["batch_stats"]["mean"], np.zeros(4))


# A convolution and the norm after it

CONVOLUTIONS: dict[str, tuple[Any, bool]] = {
    # What comes before the norm for 4 channels, and whether ReLU6 comes after it.
    "widening": (lambda kernel: Pointwise(kernel(4, 6)), False),
    "widening, relu6": (lambda kernel: Pointwise(kernel(4, 6)), True),
    "narrowing": (lambda kernel: Pointwise(kernel(4, 3)), False),
    "depthwise": (lambda kernel: Depthwise(kernel(3, 3, 4), 2, "torch"), False),
    "depthwise, relu6": (lambda kernel: Depthwise(kernel(3, 3, 4), 1, "same"), True),
}


def textbook_convolution(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: str = "same", groups: int = 1):
    """XLA's own; kernel [H, W, C, D]."""
    pads = "SAME" if padding == "same" else [(kernel.shape[0] // 2,) * 2] * 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def textbook_batch_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, shift: jax.Array, epsilon: float, relu6: bool):
    """`batch_norm` for autodiff, with two passes."""
    mean = jnp.mean(x, axis=(0, 1, 2))
    variance = jnp.mean((x - mean) ** 2, axis=(0, 1, 2))
    y = (x - mean) / jnp.sqrt(variance + epsilon) * scale + bias
    return jnp.minimum(jax.nn.relu(y), 6) if relu6 else y, mean, variance


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_norm_after_its_convolution_is_the_textbooks(kind: str, train: bool) -> None:
    make, relu6 = CONVOLUTIONS[kind]
    rng = np.random.default_rng(0)
    convolution = make(lambda *shape: rng.normal(size=shape))
    channels = convolution.kernel.shape[-1]
    x = rng.normal(3, 4, (2, 5, 4, 4))
    variables = {
        "params": {"scale": rng.uniform(2, 4, channels), "bias": rng.normal(3, 1, channels)},
        "batch_stats": {"mean": rng.normal(size=channels), "var": rng.uniform(1, 2, channels)},
    }
    norm = BatchNorm(use_running_average=not train, momentum=0.8, epsilon=1e-3, relu6=relu6)
    with jax.enable_x64(True):
        shapes = jax.eval_shape(lambda key: norm.init(key, jnp.asarray(x), convolution), jax.random.key(0))
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(np.shape, variables)
        y, updated = fast_jit(
            lambda v, x, kernel: norm.apply(v, x, convolution._replace(kernel=kernel), mutable=["batch_stats"])
        )(variables, x, convolution.kernel)
        if isinstance(convolution, Depthwise):
            kernel, stride, padding = convolution
            convolved = textbook_convolution(np.clip(x, 0, 6), kernel[:, :, None], stride, padding, 4)
        else:
            convolved = textbook_convolution(x, convolution.kernel[None, None])
        params, stats = variables["params"], variables["batch_stats"]
        expected, mean, var = textbook_batch_norm(convolved, **params, shift=0, epsilon=1e-3, relu6=relu6)
        if not train:
            mean, var = stats["mean"], stats["var"]
            expected = (convolved - mean) / np.sqrt(var + 1e-3) * params["scale"] + params["bias"]
            expected = np.clip(expected, 0, 6) if relu6 else expected
        statistics = {"mean": np.asarray(mean), "var": np.asarray(var)}
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-10)
    for name, of_batch in statistics.items():
        np.testing.assert_allclose(updated["batch_stats"][name], 0.8 * stats[name] + 0.2 * of_batch, rtol=1e-10)


@pytest.mark.parametrize("train", [True, False])
def test_a_norm_handed_to_the_layer_comes_after_it(train: bool) -> None:
    """In every mode: one function with the dense product, or after the inverse transform."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 4, 3)).astype(np.float32)
    whole = {
        name: counts_to_fcmask(np.array(counts), 4) for name, counts in (("input", [4, 0, 4]), ("output", [4] * 5))
    }
    modes: dict[str, dict[str, Any]] = {
        "off": {"mode": "off"},
        "soft": {"mode": "soft"},
        "hard": {"mode": "hard"},
        "whole channels": {"mode": "hard", "whole_channels": True},
    }

    class Handed(nn.Module):
        inside: bool
        settings: Any

        @nn.compact
        def __call__(self, x):
            layer = FrequencyPointwise(5, 2, **self.settings, name="layer")
            norm = BatchNorm(use_running_average=not train, relu6=True, name="norm")
            return layer(x, norm=norm) if self.inside else norm(layer(x))

    for settings in modes.values():
        inside, after = Handed(True, settings), Handed(False, settings)
        variables = fast_jit(inside.init)(jax.random.key(0), x)
        assert jax.tree.map(jnp.shape, variables) == jax.tree.map(
            jnp.shape, jax.eval_shape(after.init, jax.random.key(0), x)
        )
        variables["params"]["norm"] = {"scale": rng.uniform(2, 4, 5), "bias": rng.uniform(1, 3, 5)}
        variables[FCMASK]["layer"] = whole
        y, updated = fast_jit(partial(inside.apply, mutable=["batch_stats"]))(variables, x)
        expected, expected_stats = fast_jit(partial(after.apply, mutable=["batch_stats"]))(variables, x)
        np.testing.assert_allclose(y, expected, atol=1e-4)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), updated, expected_stats)


# The network and its graph

SETTINGS: dict[str, dict[str, Any]] = {
    "both": {},
    "input": {"sides": "input"},
    "output": {"sides": "output"},
    "tied": {"tied": True},
    "tied, head by input only": {"tied": True, "sides": "input"},
    "tied but where the maps' blocks differ": {"tied": True, "block_by_map": {6: 3}},
    "a block by layer": {"block_by_map": {3: 3}, "block_by_layer": {"block01/expand": 1, "head": 2}},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_fcmask_collection_is_the_graphs(kind: str) -> None:
    network = dataclasses.replace(TINY, **SETTINGS[kind])
    graph = network_for(network, SHAPE)
    shapes = jax.eval_shape(lambda key: network.init(key, jnp.zeros((1, *SHAPE))), jax.random.key(0))
    found = {path: leaf.shape for path, leaf in flatten_dict(shapes[FCMASK], sep="/").items()}
    assert found == {path: (channels,) for path, (channels, _) in graph.mask_sizes.items()}
    own = {side: network.sides in ("both", side) for side in SIDES}
    assert {side: bool(graph.mask_of("head", side)) for side in SIDES} == own
    for unit in units(graph):
        expand, project = (
            {side: graph.mask_of(f"{unit}/{of}", side) for side in SIDES} for of in ("expand", "project")
        )
        if network.tied and graph.blocks[f"{unit}/expand"] == graph.blocks[f"{unit}/project"]:
            assert (expand["input"], project["output"]) == (None, None)
            assert expand["output"] == project["input"] == f"{unit}/wide"
        else:
            assert all({side: bool(of[side]) for side in SIDES} == own for of in (expand, project))
            assert f"{unit}/wide" not in found


def test_blocks_by_layer_go_before_blocks_by_map() -> None:
    graph = network_for(dataclasses.replace(TINY, **SETTINGS["a block by layer"]), SHAPE)
    blocks = {name: (block, graph.layers[name].in_size[0]) for name, block in graph.blocks.items()}
    assert blocks["block00/expand"] == (2, 6)
    assert blocks["block01/expand"] == (1, 6)
    assert blocks["block03/project"] == (3, 3)
    assert blocks["head"] == (2, 3)


@pytest.mark.parametrize(
    ("variant", "shape", "padding"),
    [*((variant, (32, 32, 3), "same") for variant in MOBILENETS), ("mobilenetv2", (50, 37, 1), "torch")],
)
def test_graph_has_the_real_sizes_of_every_layer(variant: str, shape: tuple[int, int, int], padding: str) -> None:
    network = MobileNet(variant, 7, width=0.35, block=1, padding=padding, mode="off")
    seen: dict[str, tuple] = {}

    def record(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(context.module, FrequencyPointwise | nn.Conv | nn.Dense):
            seen["/".join(context.module.path)] = (args[0].shape, out.shape)
        elif context.method_name == "__call__" and context.module.name == "depthwise_norm":
            seen[f"{context.module.path[-2]}/depthwise"] = (None, out.shape)
        return out

    def trace(key):
        with nn.intercept_methods(record):
            return network.init(key, jnp.zeros((2, *shape)))

    params = flatten_dict(jax.eval_shape(trace, jax.random.key(0))["params"], sep="/")
    graph = network_for(network, shape)
    assert seen.keys() == graph.layers.keys()
    for layer in graph.layers.values():
        inputs, outputs = seen[layer.name]
        if layer.kind == "dense":
            assert (inputs, outputs) == ((2, layer.in_channels), (2, layer.out_channels))
            assert params[f"{layer.name}/kernel"].shape == (layer.in_channels, layer.out_channels)
            continue
        assert outputs == (2, *layer.out_size, layer.out_channels), layer.name
        if inputs is not None:
            assert inputs == (2, *layer.in_size, layer.in_channels), layer.name
        if layer.kind == "depthwise":
            assert params[layer.name].shape == (*layer.window, layer.in_channels)
        elif layer.kind == "conv":
            assert params[f"{layer.name}/kernel"].shape == (*layer.window, layer.in_channels, layer.out_channels)
        else:
            # The kernel of a 1x1 stem is a convolution's.
            assert params[f"{layer.name}/kernel"].shape[-2:] == (layer.in_channels, layer.out_channels)


def test_channels_are_rounded_as_the_family_does() -> None:
    """The rule of the original implementation: multiples of 8, and never more than a tenth below what was asked."""
    assert [round_channels(c) for c in (1, 8, 11.2, 12, 16, 33.6, 44.8, 91)] == [8, 8, 16, 16, 16, 32, 48, 88]
    for channels in np.linspace(8, 400, 97):
        rounded = round_channels(channels)
        assert rounded % 8 == 0 and 0.9 * channels <= rounded < channels + 8


def test_kernels_start_with_the_variance_of_fan_out() -> None:
    """He et al.: 2 / fan-out; the fan-out of a depthwise kernel is its 9 taps."""
    network = MobileNet("mobilenetv2_small", 10, width=2.0, mode="off")
    params = fast_jit(network.init)(jax.random.key(0), jnp.zeros((1, *SHAPE)))["params"]
    for kernel, fan_out in (
        (params["block02"]["expand"]["kernel"], params["block02"]["expand"]["kernel"].shape[1]),
        (params["block02"]["depthwise"], 9),
        (params["stem"]["kernel"], 9 * params["stem"]["kernel"].shape[-1]),
    ):
        assert np.std(kernel) == pytest.approx(np.sqrt(2 / fan_out), rel=0.1)


# What the network computes


def textbook_small(variables: dict, x: jax.Array, padding: str) -> jax.Array:
    """mobilenetv2_small as Sandler et al. draw it (figure 4d), with XLA's convolutions and no module of ours."""
    params, stats = variables["params"], variables["batch_stats"]

    def conv(x, kernel, stride: int = 1, groups: int = 1):
        return textbook_convolution(x, kernel, stride, padding, groups)

    def norm(x, *path: str, relu6: bool = True):
        p, s = params, stats
        for name in path:
            p, s = p[name], s[name]
        y = (x - s["mean"]) / jnp.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]
        return jnp.minimum(jax.nn.relu(y), 6) if relu6 else y

    x = norm(conv(x, params["stem"]["kernel"], 2), "stem_norm")
    for name, stride in (("block00", 1), ("block01", 1), ("block02", 2), ("block03", 1)):
        block, shortcut = params[name], x
        x = norm(conv(x, block["expand"]["kernel"][None, None]), name, "expand_norm")
        x = norm(conv(x, block["depthwise"][:, :, None], stride, x.shape[-1]), name, "depthwise_norm")
        x = norm(conv(x, block["project"]["kernel"][None, None]), name, "project_norm", relu6=False)
        if x.shape == shortcut.shape:
            x = x + shortcut
    x = norm(conv(x, params["head"]["kernel"][None, None]), "head_norm").mean(axis=(1, 2))
    return x @ params["classifier"]["kernel"] + params["classifier"]["bias"]


@pytest.mark.parametrize("padding", ["same", "torch"])
def test_dense_network_is_the_textbooks(padding: str) -> None:
    network = dataclasses.replace(TINY, mode="off", padding=padding)
    variables = random_variables(network)
    expected = fast_jit(textbook_small, static_argnums=2)(variables, images(), padding)
    np.testing.assert_allclose(logits(network, variables), expected, atol=1e-4)


def test_nothing_pruned_is_the_dense_network() -> None:
    variables = random_variables(TINY)
    dense = logits(dataclasses.replace(TINY, mode="off"), variables)
    assert np.ptp(dense) > 0.1
    for mode in ("soft", "hard"):
        np.testing.assert_allclose(logits(dataclasses.replace(TINY, mode=mode), variables), dense, atol=1e-4)


def test_tied_network_with_nothing_pruned_is_the_dense_network() -> None:
    """The same weights: tying changes the masks only."""
    tied = dataclasses.replace(TINY, tied=True)
    untied_masks = random_variables(TINY)[FCMASK]
    dense = logits(dataclasses.replace(TINY, mode="off"), random_variables(tied), untied_masks)
    np.testing.assert_allclose(logits(tied, random_variables(tied)), dense, atol=1e-4)


def hand_composed(network: MobileNet, counts: dict[str, np.ndarray]) -> Callable[..., jax.Array]:
    """The dense network whose wrapped layers are replaced, one by one, by banded products."""
    graph = network_for(network, SHAPE)

    def banded(call, args, kwargs, context):
        if context.method_name != "__call__" or not isinstance(context.module, FrequencyPointwise):
            return call(*args, **kwargs)
        name = "/".join(context.module.path)
        plan = plan_bands(*(graph.side_counts(counts, name, side) for side in SIDES), graph.blocks[name])
        y = banded_pointwise(args[0], context.module.variables["params"]["kernel"], plan)
        return kwargs["norm"](y)

    def apply(variables, x):
        with nn.intercept_methods(banded):
            return dataclasses.replace(network, mode="off").apply(variables, x)

    return fast_jit(apply)


@pytest.mark.parametrize("tied", [False, True])
def test_hard_network_is_the_composition_of_banded_layers(tied: bool) -> None:
    network = dataclasses.replace(TINY, tied=tied)
    counts = random_counts(network_for(network, SHAPE))
    variables = {**random_variables(network), FCMASK: masks_of(network_for(network, SHAPE), counts)}
    hard = logits(dataclasses.replace(network, mode="hard"), variables)
    np.testing.assert_allclose(hard, hand_composed(network, counts)(variables, images()), atol=1e-4)
    dense = logits(dataclasses.replace(network, mode="off"), variables)
    assert np.abs(hard - dense).max() > 0.01


def test_gated_network_as_training_builds_it_is_the_composition_of_banded_layers() -> None:
    """Some layers released, so without transforms; the others pruned."""
    graph = network_for(TINY, SHAPE)
    counts, released = gate_counts(graph, random_counts(graph, seed=3))
    wrapped = {*graph.blocks}
    network = hard_network(TINY, graph, counts)
    assert {*released} <= network.whole_channels < wrapped and released
    variables = {**random_variables(TINY), FCMASK: masks_of(graph, counts)}
    expected = hand_composed(TINY, counts)(variables, images())
    np.testing.assert_allclose(logits(network, variables), expected, atol=1e-4)


def test_soft_masks_that_stand_at_hard_values_are_hard() -> None:
    counts = random_counts(network_for(TINY, SHAPE))
    variables = {**random_variables(TINY), FCMASK: masks_of(network_for(TINY, SHAPE), counts)}
    soft, hard = (logits(dataclasses.replace(TINY, mode=mode), variables) for mode in ("soft", "hard"))
    np.testing.assert_allclose(soft, hard, atol=1e-4)


def test_soft_masks_of_whole_channels_are_those_between_transforms() -> None:
    """The layer multiplies its kernel by them; the same masks between a DCT and its inverse are the oracle."""
    rng = np.random.default_rng(4)
    x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 4, 6, 3), (3, 5)))
    # At 0 and at 1 the gradient is the one inside the range.
    masks = {"input": np.array([0, 0.3, 1], np.float32), "output": rng.uniform(size=5).astype(np.float32)}
    layer = FrequencyPointwise(5, 2, levels=())

    def by_layer(masks: Any, kernel: Any) -> Any:
        return layer.apply({"params": {"kernel": kernel}, FCMASK: masks}, x)

    def by_transforms(masks: Any, kernel: Any) -> Any:
        return masked_pointwise(x, kernel, 2, *(coef_mask(masks[side], 4, ()) for side in SIDES))

    (value, grads), (expected, expected_grads) = (
        jax.value_and_grad(lambda *given, of=of: jnp.sum(jnp.sin(of(*given))), (0, 1))(masks, kernel)
        for of in (by_layer, by_transforms)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), grads, expected_grads)


def test_layers_of_whole_channels_need_no_transform() -> None:
    whole = ("block01/expand", "block01/project", "block03/project", "head")
    graph = network_for(TINY, SHAPE)
    counts = random_counts(graph, whole=whole)
    assert any(0 < count.sum() < count.size * graph.mask_sizes[path][1] for path, count in counts.items())
    variables = {**random_variables(TINY), FCMASK: masks_of(graph, counts)}
    hard = dataclasses.replace(TINY, mode="hard")
    promised = dataclasses.replace(hard, whole_channels=frozenset(whole))
    np.testing.assert_allclose(logits(promised, variables), logits(hard, variables), atol=1e-4)


def test_layers_at_0_1_and_n_need_block_means_only() -> None:
    graph = network_for(TINY, SHAPE)
    rng = np.random.default_rng(5)
    counts = random_counts(graph)
    for path, (channels, num_coefs) in graph.mask_sizes.items():
        if path.startswith("block01"):
            counts[path] = rng.choice([0, 1, num_coefs], channels)
            counts[path][:3] = [0, 1, num_coefs]
    network = hard_network(TINY, graph, counts)
    assert {"block01/expand", "block01/project"} <= network.block_means
    assert "block01/expand" not in network.whole_channels
    variables = {**random_variables(TINY), FCMASK: masks_of(graph, counts)}
    plain = dataclasses.replace(network, block_means=frozenset(), whole_channels=frozenset())
    np.testing.assert_allclose(logits(network, variables), logits(plain, variables), atol=1e-4)


def test_training_updates_every_running_average_and_nothing_else() -> None:
    network = dataclasses.replace(TINY, mode="off")
    variables = random_variables(network)
    _, updated = fast_jit(partial(network.apply, train=True, mutable=["batch_stats", FCMASK]))(variables, images())
    for before, after in zip(
        jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(updated["batch_stats"]), strict=True
    ):
        assert np.abs(before - after).max() > 1e-6
    for before, after in zip(jax.tree.leaves(variables[FCMASK]), jax.tree.leaves(updated[FCMASK]), strict=True):
        np.testing.assert_array_equal(before, after)


TRAINED = MobileNet("mobilenetv2_small", 5, width=0.3, block=2, padding="torch")
TRAINED_SHAPE = (28, 28, 1)


def loss_and_gradients(network: MobileNet, variables: dict) -> tuple[Any, ...]:
    """In training and float64: the loss, the new running averages, and the gradients to all parameters and masks."""
    rng = np.random.default_rng(4)
    x, target = rng.normal(size=(4, *TRAINED_SHAPE)), rng.normal(size=(4, 5))

    def run(learned, rest, x, target):
        def loss(learned):
            out, updated = network.apply({**learned, **rest}, x, train=True, mutable=["batch_stats"])
            return jnp.sum(jnp.tanh(out) * target), updated

        (value, updated), gradients = jax.value_and_grad(loss, has_aux=True)(learned)
        return value, updated, gradients

    learned = {name: variables[name] for name in ("params", FCMASK)}
    rest = {"batch_stats": variables["batch_stats"]}
    with jax.enable_x64(True):
        return fast_jit(run)(*jax.tree.map(np.float64, (learned, rest)), x, target)


def watch_norms(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each form of the norm is traced from now on."""
    calls: Counter = Counter()

    def watched(name: str, function):
        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    for name in ("depthwise_batch_norm", "pointwise_batch_norm", "batch_norm"):
        monkeypatch.setattr(normalization, name, watched(name, getattr(normalization, name)))
    return calls


def assert_same_training(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, left), right in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert left.dtype == np.float64, path
        tolerance = 1e-9 * max(1, np.abs(right).max())
        np.testing.assert_allclose(left, right, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("mode", "fused"),
    [
        ("off", {"depthwise_batch_norm": 4, "pointwise_batch_norm": 5, "batch_norm": 5}),
        ("soft", {"depthwise_batch_norm": 4, "batch_norm": 10}),
        ("whole channels", {"depthwise_batch_norm": 4, "pointwise_batch_norm": 5, "batch_norm": 5}),
    ],
)
def test_training_is_autodiff_of_the_textbook_network(
    mode: str, fused: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU's forms and those of other backends against the same network without a gradient written by hand."""
    network = dataclasses.replace(TRAINED, mode=mode)  # type: ignore[arg-type]
    if mode == "whole channels":
        whole = tuple(network_for(TRAINED, TRAINED_SHAPE).blocks)
        network = dataclasses.replace(TRAINED, mode="hard", whole_channels=frozenset(whole))
    variables = random_variables(network, shape=TRAINED_SHAPE)
    if mode == "soft":
        variables[FCMASK] = jax.tree.map(lambda mask: mask - np.linspace(0.05, 0.9, mask.size), variables[FCMASK])
    elif mode == "whole channels":
        graph = network_for(network, TRAINED_SHAPE)
        variables[FCMASK] = masks_of(graph, random_counts(graph, whole=whole))

    calls = watch_norms(monkeypatch)
    found = [loss_and_gradients(network, variables)]
    assert calls == fused
    monkeypatch.setattr(normalization.jax, "default_backend", lambda: "gpu")
    if mode == "off":
        calls.clear()
        found.append(loss_and_gradients(network, variables))
        assert calls == {"batch_norm": 14}

    monkeypatch.setattr(normalization, "batch_norm", textbook_batch_norm)
    monkeypatch.setattr(
        normalization,
        "depthwise_conv",
        lambda x, kernel, stride, padding: textbook_convolution(x, kernel[:, :, None], stride, padding, x.shape[-1]),
    )
    for module in (normalization, frequency, pointwise):
        monkeypatch.setattr(module, "dense_pointwise", partial(jnp.einsum, "...c,cd->...d"))
    expected = loss_and_gradients(network, variables)
    for each in found:
        assert_same_training(each, expected)
    assert np.abs(expected[0]) > 0.1
    for path, gradient in flatten_dict(expected[2], sep="/").items():
        # A channel's constant is taken away by the next norm; hard masks pass no gradient.
        if not path.endswith("project_norm/bias") and (mode == "soft" or not path.startswith(FCMASK)):
            assert np.abs(gradient).max() > 1e-4, path


@pytest.mark.parametrize("tied", [True, False])
def test_training_group_by_group_is_training_under_masks(tied: bool) -> None:
    """What no mask lets through is left out: same loss and gradients, and the averages of dead channels stand still."""
    network = dataclasses.replace(TRAINED, tied=tied)
    graph = network_for(network, TRAINED_SHAPE)
    rng = np.random.default_rng(7)
    counts = {path: rng.permuted(np.resize([0, 1, n, n - 1], c)) for path, (c, n) in graph.mask_sizes.items()}
    variables = random_variables(network, shape=TRAINED_SHAPE)
    variables[FCMASK] = masks_of(graph, counts)
    grouped = hard_network(network, graph, counts)
    groups = dict(grouped.wide_groups)
    assert groups.keys() == {"block00", "block01", "block02", "block03"}
    assert all(group.others for group in groups.values())
    # The other two have maps of 7x7: small, and not divided by 2.
    assert [name for name, group in groups.items() if group.whole and group.means] == ["block00", "block01"][: 2 * tied]

    loss, updated, gradients = loss_and_gradients(grouped, variables)
    expected = loss_and_gradients(dataclasses.replace(grouped, wide_groups=()), variables)
    assert_same_training((loss, gradients["params"]), (expected[0], expected[2]["params"]))
    averages, before = flatten_dict(updated["batch_stats"]), flatten_dict(variables["batch_stats"])
    for path, wanted in flatten_dict(expected[1]["batch_stats"]).items():
        alive = np.ones(len(wanted), bool)
        if path[0] in groups and path[1] != "project_norm":
            alive[:] = False
            alive[np.concatenate(groups[path[0]]).astype(int)] = True
            assert not alive.all()
        np.testing.assert_allclose(averages[path][alive], wanted[alive], atol=1e-9)
        np.testing.assert_array_equal(averages[path][~alive], np.float64(before[path])[~alive])


def test_every_mask_moves_from_one_under_the_task() -> None:
    """The gradient of a loss at the start of mask learning is not zero for any mask array."""
    variables = random_variables(TINY)

    def loss(fcmask):
        out = TINY.apply({**variables, FCMASK: fcmask}, images())
        return jnp.sum(out * jnp.arange(1.0, 6))  # type: ignore[operator]

    gradients = flatten_dict(fast_jit(jax.grad(loss))(variables[FCMASK]), sep="/")
    assert gradients.keys() == network_for(TINY, SHAPE).mask_sizes.keys()
    for path, gradient in gradients.items():
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-6, path


def test_the_compilers_flops_are_twice_the_dense_macs() -> None:
    """Beside them only a few per cent: taps on padding are not counted, batch norm, ReLU6 and residuals are."""
    network = MobileNet("mobilenetv2_small", 10, width=2.0, block=1, mode="off")
    shape = (28, 28, 1)
    variables = jax.eval_shape(lambda key: network.init(key, jnp.zeros((1, *shape))), jax.random.key(0))
    compiled = fast_jit(network.apply).lower(variables, jax.ShapeDtypeStruct((1, *shape), jnp.float32)).compile()
    graph = network_for(network, shape, count_classifier=True)
    macs = network_macs(graph, graph.full_counts()).to_dict()["dense"]
    assert float(compiled.cost_analysis()["flops"]) == pytest.approx(2 * macs, rel=0.05)  # type: ignore[index]
