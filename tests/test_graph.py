"""The channel graph: traced operations, layers, spaces, masks; and the frozen program that is folded from it."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax import lax

from fdjax.config import Config, LearnConfig, ModelConfig
from fdjax.frozen.assemble import freeze
from fdjax.frozen.program import Program
from fdjax.frozen.xla import apply
from fdjax.graph.masks import MaskedGraph, layer_blocks
from fdjax.graph.network import Graph, trace
from fdjax.training.build import build_network, collection_of, hard_network
from fdjax.training.network import graph_variables
from fdjax.training.state import init_variables
from fdjax.zoo import FCMASK

SMALL = (28, 28, 1)
# Name, input, width, block, tied, levels of the random masks (None: all counts), other fields of the model.
CASES = {
    "tied_means": ("mobilenetv2_small", SMALL, 0.5, 2, True, (0, 1, 4), {}),
    "tied_counts": ("mobilenetv2_small", SMALL, 0.5, 4, True, None, {}),
    "papers_masks_that_do_not_divide": ("mobilenetv2_small", (30, 30, 3), 0.5, 4, False, None, {}),
    "whole_channels": ("mobilenetv2_small", SMALL, 0.5, 2, False, (0, 4), {}),
    "without_expansion": ("mobilenetv1", (32, 32, 3), 0.1, 1, False, None, {}),
    "groups": ("resnext29", (16, 16, 3), 0.25, 2, False, None, {"cardinality": 4}),
    "padded_shortcuts": ("resnet20", (16, 16, 3), 0.5, 2, False, None, {}),
}


def networks(name: str, shape: tuple[int, int, int], width: float, block: int, tied: bool, fields: dict[str, Any]):
    """The module of the zoo, and its graph with scaled images."""
    config = Config(model=ModelConfig(name=name, width=width, **fields), learn=LearnConfig(block=block, tied=tied))
    module, graph = build_network(config, shape, 10)
    scaling = {
        "input_mean": tuple(100.0 + 10 * np.arange(shape[2])),
        "input_std": tuple(50.0 + np.arange(shape[2])),
    }
    return module, dataclasses.replace(graph, **scaling)


@pytest.mark.parametrize("case", CASES)
def test_a_graph_has_the_layers_and_masks_of_its_network_and_freezes_to_the_masked_one(case: str) -> None:
    name, shape, width, block, tied, levels, fields = CASES[case]
    module, network = networks(name, shape, width, block, tied, fields)
    variables = init_variables(module, shape, 0)
    kernels = {path: leaf for path, leaf in flatten_dict(variables["params"], sep="/").items() if leaf.ndim > 1}
    found = {layer.name: layer.dense_macs for layer in network.layers.values()}
    assert {name.removesuffix("/kernel"): leaf.size for name, leaf in kernels.items()} == {
        name: macs // math.prod(network.layers[name].out_size) for name, macs in found.items()
    }
    masks = {path: leaf.shape for path, leaf in flatten_dict(variables.get(FCMASK, {}), sep="/").items()}
    assert {path: (channels,) for path, (channels, _) in network.mask_sizes.items()} == masks
    assert not network.graph.walk.opaque

    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda a: np.asarray(a) + (a.ndim == 1) * np.abs(rng.normal(0, 0.1, a.shape)).astype(np.float32), variables
    )
    counts = {
        path: rng.choice(levels or np.arange(num_coefs + 1), channels)
        for path, (channels, num_coefs) in network.mask_sizes.items()
    }
    images = rng.uniform(0, 255, (2, *shape)).astype(np.float32)
    masked = hard_network(module, network, counts)
    scaled = (images - np.float32(network.input_mean)) / np.float32(network.input_std)
    collections = {**variables, FCMASK: collection_of(network, counts)} if counts else variables
    expected = np.asarray(jax.jit(masked.apply)(collections, scaled))
    frozen = freeze(network, graph_variables(network, variables["params"], variables["batch_stats"]), counts)
    program = Program.from_dict(json.loads(json.dumps(frozen.program.to_dict())))
    assert program == frozen.program
    (logits,) = jax.jit(lambda arrays, x: apply(program, arrays, x))(frozen.arrays, images)
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_network_survives_json() -> None:
    _, network = networks("mobilenetv2_small", SMALL, 0.5, 2, True, {})
    read = MaskedGraph.from_dict(json.loads(json.dumps(network.to_dict())))
    for field in dataclasses.fields(MaskedGraph):
        if field.name not in ("graph", "masks", "blocks"):
            assert getattr(read, field.name) == getattr(network, field.name), field.name
    assert dict(read.masks) == dict(network.masks) and dict(read.blocks) == dict(network.blocks)
    assert read.graph.operations.shapes == network.graph.operations.shapes
    assert list(read.layers) == list(network.layers)


def test_tables_of_positions_survive_json_and_larger_constants_are_refused() -> None:
    def with_table(numbers: int) -> Graph:
        table = np.random.default_rng(0).normal(size=(1, numbers // 384, 384)).astype(np.float32)
        tokens = jnp.ones((1, numbers // 384, 4))
        return trace(lambda v, x: x @ v["w"] + table, {"w": jnp.ones((4, 384))}, tokens)

    graph = with_table(196 * 384)
    read = Graph.from_dict(json.loads(json.dumps(graph.to_dict())))
    for value, array in graph.operations.constants.items():
        np.testing.assert_array_equal(read.operations.constants[value], array)
    with pytest.raises(ValueError, match=r"a constant of 1,000,320 numbers .* as part of its variables"):
        with_table(2605 * 384).to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format 99"),
        ({"format": "other"}, "do not describe a graph"),
        ({"outputs": [10**6]}, "damaged"),
        ({"operations": [["add", [0, 10**6], [1], {}, ""]]}, "damaged"),
        ({"shapes": 3}, "damaged"),
    ],
)
def test_a_damaged_or_newer_graph_is_refused(change: dict[str, Any], message: str) -> None:
    graph = trace(lambda v, x: x @ v["w"], {"w": jnp.ones((3, 2))}, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=message):
        Graph.from_dict({**graph.to_dict(), **change})


def plain(variables: Any, x: jax.Array) -> jax.Array:
    """Two convolutions with a depthwise one between them, an operation over channels, and a product."""
    x = lax.conv_general_dilated(x, variables["first"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = lax.conv_general_dilated(
        jax.nn.relu(x), variables["depthwise"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=8,
    )  # fmt: skip
    x = jnp.einsum("bhwc,cd->bhwd", jax.nn.relu(x), variables["second"])
    return jnp.cumsum(x, axis=-1).mean(axis=(1, 2))


def test_what_is_not_understood_is_named_and_pinned() -> None:
    variables = {
        "first": jnp.ones((1, 1, 3, 8)),
        "depthwise": jnp.ones((3, 3, 1, 8)),
        "second": jnp.ones((8, 4)),
    }
    graph = trace(plain, variables, jnp.ones((1, 6, 6, 3)))
    assert [(layer.name, layer.kind) for layer in graph.layers.values()] == [
        ("first", "pointwise"), ("depthwise", "depthwise"), ("second", "pointwise"),
    ]  # fmt: skip
    assert len(graph.walk.opaque) == 1
    (reason,) = graph.walk.opaque.values()
    assert "cumsum" in reason and "test_graph.py" in reason
    assert graph.spaces["first"].is_run and graph.spaces["first"].depthwise == ("depthwise",)
    assert "cumsum" in (graph.spaces["second"].pinned or "")
    assert graph.layers["first"].dense_macs == 36 * 3 * 8
    assert graph.layers["depthwise"].dense_macs == 36 * 9 * 8


def test_residual_additions_join_spaces_and_concatenations_do_not() -> None:
    def function(v: Any, x: jax.Array) -> jax.Array:
        a = x @ v["a"]
        b = jnp.maximum(a @ v["b"], 0) + a
        return jnp.concatenate([b, x @ v["c"]], axis=-1) @ v["d"]

    variables = {"a": jnp.ones((3, 5)), "b": jnp.ones((5, 5)), "c": jnp.ones((3, 2)), "d": jnp.ones((7, 4))}
    graph = trace(function, variables, jnp.ones((1, 4, 4, 3)))
    assert graph.spaces["a"].writers == ("a", "b") and graph.spaces["a"].readers == ("b", "d")
    assert graph.spaces["c"].writers == ("c",) and graph.spaces["c"].readers == ("d",)
    assert graph.layers["d"].source is None and graph.layers["d"].in_channels == 7


def test_images_that_a_function_does_not_take_are_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"cannot be traced with images of shape \[1, 4\]"):
        trace(lambda v, x: x @ v, jnp.ones((3, 2)), jnp.ones((1, 4)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": 4}, "larger than the 2x2 map"),
        ({"block": 1, "by_map": {9: 2}}, "maps of side 9"),
        ({"block": 1, "by_layer": {"nothing": 2}}, "names 'nothing'"),
    ],
)
def test_blocks_that_do_not_fit_are_value_errors(settings: dict[str, Any], message: str) -> None:
    graph = trace(lambda v, x: x @ v["w"], {"w": jnp.ones((3, 2))}, jnp.ones((1, 2, 2, 3)))
    with pytest.raises(ValueError, match=message):
        layer_blocks(graph, ["w"], **settings)


def pooled_without_activation(v: Any, x: jax.Array) -> jax.Array:
    """What follows a bias here is no activation, and reads the map twice."""
    y = jnp.einsum("bhwc,cd->bhwd", x, v["first"]) * v["scale"] + v["bias"]
    y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    z = jnp.einsum("bhwc,cd->bhwd", y, v["second"]) * v["scale"] + v["bias"]
    return (z * z + (y + y)).mean(axis=(1, 2)) @ v["third"]


def test_a_bias_and_a_scale_are_applied_once_whatever_reads_them() -> None:
    rng = np.random.default_rng(0)
    shapes = {"first": (3, 5), "second": (5, 5), "third": (5, 4), "scale": (5,), "bias": (5,)}
    variables = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    images = rng.normal(size=(2, 4, 4, 3)).astype(np.float32)
    graph = trace(pooled_without_activation, variables, images[:1])
    frozen = freeze(MaskedGraph("plain", graph, {}, {}, 4), variables, {})
    (logits,) = apply(frozen.program, frozen.arrays, jnp.asarray(images))
    expected = pooled_without_activation(variables, images)
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
