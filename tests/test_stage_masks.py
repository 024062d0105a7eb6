"""Stage masks: one FCMask for a residual stream, in the network, in its counts, at the gate and in a run."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import example, given
from hypothesis import strategies as st

from fdjax.config import LearnConfig
from fdjax.errors import UserError
from fdjax.nn import FCMASK, MobileNet
from fdjax.ops import block_dct, block_idct, depthwise_conv
from fdjax.ops.fcmask import counts_to_fcmask, level_counts
from fdjax.ops.macs import cheapest_pointwise, group_macs
from fdjax.pruning import expected_macs, gate_counts, harden_to_target, mac_ratio, round_masks
from fdjax.spec import NetworkSpec, network_macs, room_macs, rooms, stage_masks, units
from fdjax.training.build import collection_of
from fdjax.training.run import train
from fdjax.training.steps import mask_penalty
from tests.tiny_run import get_config

fast_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
Counts = dict[str, np.ndarray]
TINY = MobileNet("mobilenetv2_small", 5, width=0.3, block=2, stage_masks=True)
WHOLE_BLOCKS = (16, 16, 3)  # 8x8 and 4x4 maps


def spec_of(shape: tuple[int, int, int] = (32, 32, 3), **settings) -> NetworkSpec:
    """mobilenetv2_small at width 1, with both of its streams: 16x16 maps and 8x8 maps, in 2x2 blocks."""
    return MobileNet("mobilenetv2_small", 10, **{"block": 2, "stage_masks": True, **settings}).spec(shape)


SPECS = {
    "untied": spec_of(),
    "tied": spec_of(tied=True),
    "untied, 4x4": spec_of(block=4),
    "tied, 4x4": spec_of(tied=True, block=4),
    "tied, padded": spec_of((28, 28, 1), tied=True, block=4),
    "two block sizes": spec_of(tied=True, block_by_map={8: 8}),
    "split": spec_of(tied=True, block_by_layer={"block03/expand": 4}),
}
LEVELS = {"all": None, "0,1,N": (0, 1), "0,N": (0,)}


def random_counts(spec: NetworkSpec, seed: int, levels: tuple[int, ...] | None = None) -> Counts:
    rng = np.random.default_rng(seed)
    return {path: rng.choice(level_counts(n, levels), channels) for path, (channels, n) in spec.mask_sizes.items()}


def without_stage_masks(network: MobileNet) -> MobileNet:
    """A mask for every side of every layer."""
    return dataclasses.replace(network, stage_masks=False, tied=False)


def layer_by_layer(spec: NetworkSpec, plain: NetworkSpec, masks: dict[str, Any]) -> dict[str, Any]:
    """The masks of `spec`, each at every layer that shares it, as masks of `plain`."""
    found = {}
    for shared, own in zip(spec.layers, plain.layers, strict=True):
        for path, own_path, channels in (
            (shared.input_mask, own.input_mask, own.in_channels),
            (shared.output_mask, own.output_mask, own.out_channels),
        ):
            if own_path:
                whole = own.num_coefs if masks[next(iter(masks))].dtype.kind == "i" else 1.0
                found[own_path] = masks[path] if path else np.full(channels, whole)
    return found


# Which streams there are


@pytest.mark.parametrize("tied", [False, True])
def test_a_stream_has_one_mask_at_all_layers_that_write_or_read_it(tied: bool) -> None:
    spec = spec_of(tied=tied)
    assert stage_masks(spec) == {"stage00/stream": True, "stage01/stream": True}
    for path, written, read in (
        ("stage00/stream", ["block00/project", "block01/project"], ["block01/expand", "block02/expand"]),
        ("stage01/stream", ["block02/project", "block03/project"], ["block03/expand", "head"]),
    ):
        assert [layer.name for layer in spec.layers if layer.output_mask == path] == written
        assert [layer.name for layer in spec.layers if layer.input_mask == path] == read
    assert spec.mask_sizes["stage00/stream"] == (24, 4) and spec.mask_sizes["stage01/stream"] == (64, 4)
    # The first block reads the stem, which has no mask to share; wide sides are as without stage masks.
    without = {layer.name: layer for layer in spec_of(tied=tied, stage_masks=False).layers}
    for layer in spec.layers:
        if layer.name.endswith("expand"):
            assert layer.output_mask == without[layer.name].output_mask
        if layer.name.endswith("project"):
            assert layer.input_mask == without[layer.name].input_mask
    assert spec.layers[1].input_mask == without["block00/expand"].input_mask


def paths_of(spec: NetworkSpec, *names: str) -> set[str | None]:
    layers = {layer.name: layer for layer in spec.layers}
    return {layers[n].output_mask if n.endswith("project") else layers[n].input_mask for n in names}


def test_streams_of_the_family() -> None:
    # A stage of one block has a stream, too; the first of the original's blocks has no expand layer.
    spec = MobileNet("mobilenetv2", 10, block=2, stage_masks=True).spec((192, 192, 3))
    assert list(stage_masks(spec)) == [f"stage{n:02d}/stream" for n in range(7)]
    assert paths_of(spec, "block00/project", "block01/expand") == {"stage00/stream"}
    assert paths_of(spec, "block16/project", "head") == {"stage06/stream"}
    # Narrow networks: stages of one width without a stride between them are one stream.
    spec = MobileNet("mobilenetv2_cifar10", 10, width=0.35, block=2, stage_masks=True).spec((32, 32, 3))
    assert list(stage_masks(spec)) == [f"stage{n:02d}/stream" for n in (0, 2, 3, 4, 5, 6)]
    assert paths_of(spec, "block00/project", "block01/expand", "block02/project", "block03/expand") == {
        "stage00/stream"
    }
    # The stem feeds the first stream where block00 has a residual: its layers keep what they have without.
    spec, without = (dataclasses.replace(TINY, stage_masks=on).spec(WHOLE_BLOCKS) for on in (True, False))
    assert list(stage_masks(spec)) == ["stage01/stream"]
    names = [layer.name for layer in spec.layers if layer.block][:5]
    assert paths_of(spec, *names) == paths_of(without, *names)
    assert names[-1] == "block02/expand"


def test_a_stream_whose_layers_have_different_blocks_is_left_without_a_mask() -> None:
    spec, without = SPECS["split"], spec_of(tied=True, stage_masks=False, block_by_layer={"block03/expand": 4})
    assert list(stage_masks(spec)) == ["stage00/stream"]
    names = ("block02/project", "block03/expand", "block03/project", "head")
    assert paths_of(spec, *names) == paths_of(without, *names)


def test_stage_masks_need_both_sides() -> None:
    with pytest.raises(UserError, match=r"LearnConfig\.sides must be both where stage_masks is on, got 'input'"):
        LearnConfig(stage_masks=True, sides="input")
    assert stage_masks(spec_of(sides="output")) == {}


def test_padded_maps_are_known() -> None:
    assert stage_masks(SPECS["tied, padded"]) == {"stage00/stream": False, "stage01/stream": False}
    assert stage_masks(spec_of((28, 28, 1))) == {"stage00/stream": True, "stage01/stream": False}


# The network


def variables_of(network: MobileNet, shape: tuple[int, int, int]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: network.init(key, jnp.zeros((1, *shape))), jax.random.key(0))

    def fill(path, leaf) -> jax.Array:
        name = path[-1].key
        if name in ("scale", "var"):
            value = rng.uniform(0.5, 2, leaf.shape)
        elif name in ("bias", "mean"):
            value = rng.normal(0.3, 0.5, leaf.shape)
        else:
            value = rng.normal(size=leaf.shape) / np.sqrt(max(leaf.size / leaf.shape[-1], 1))
        return jnp.asarray(value, jnp.float32)

    return {name: jax.tree_util.tree_map_with_path(fill, shapes[name]) for name in ("params", "batch_stats")}


@cache
def applied(network: MobileNet) -> Callable[..., jax.Array]:
    return fast_jit(network.apply)


def logits(network: MobileNet, shape: tuple[int, int, int], masks: dict[str, Any]) -> np.ndarray:
    x = np.random.default_rng(9).normal(size=(2, *shape)).astype(np.float32)
    fcmask = unflatten_dict({path: jnp.asarray(mask, jnp.float32) for path, mask in masks.items()}, sep="/")
    return np.asarray(applied(network)({**variables_of(network, shape), FCMASK: fcmask}, x))


@pytest.mark.parametrize("tied", [False, True])
def test_the_network_owns_the_masks_that_its_spec_names(tied: bool) -> None:
    network = dataclasses.replace(TINY, tied=tied)
    shapes = jax.eval_shape(lambda key: network.init(key, jnp.zeros((1, *WHOLE_BLOCKS))), jax.random.key(0))
    found = {path: leaf.shape for path, leaf in flatten_dict(shapes[FCMASK], sep="/").items()}
    assert found == {path: (n,) for path, (n, _) in network.spec(WHOLE_BLOCKS).mask_sizes.items()}
    masks = fast_jit(lambda: network.init(jax.random.key(0), jnp.zeros((1, *WHOLE_BLOCKS)))[FCMASK])()
    np.testing.assert_array_equal(masks["stage01"]["stream"], np.ones(24))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_a_stage_mask_is_the_same_mask_at_each_of_its_layers(mode: str, tied: bool) -> None:
    network = dataclasses.replace(TINY, tied=tied, mode=mode)  # type: ignore[arg-type]
    plain = without_stage_masks(network)
    specs = [each.spec(WHOLE_BLOCKS) for each in (network, plain)]
    rng = np.random.default_rng(1)
    masks = {path: rng.uniform(0, 1, n).astype(np.float32) for path, (n, _) in specs[0].mask_sizes.items()}
    found = logits(network, WHOLE_BLOCKS, masks)
    expected = logits(plain, WHOLE_BLOCKS, layer_by_layer(*specs, masks))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    ones = logits(network, WHOLE_BLOCKS, {path: np.ones_like(mask) for path, mask in masks.items()})
    assert np.abs(found - ones).max() > 0.01


def test_a_stage_mask_has_the_gradients_of_all_its_layers() -> None:
    specs = [network.spec(WHOLE_BLOCKS) for network in (TINY, without_stage_masks(TINY))]
    rng = np.random.default_rng(2)
    masks = {path: rng.uniform(0, 1, n).astype(np.float32) for path, (n, _) in specs[0].mask_sizes.items()}
    x = rng.normal(size=(2, *WHOLE_BLOCKS)).astype(np.float32)

    def gradients(network: MobileNet, masks: dict[str, Any]) -> dict[str, np.ndarray]:
        variables = variables_of(network, WHOLE_BLOCKS)
        loss = lambda fcmask: jnp.sum(jnp.tanh(network.apply({**variables, FCMASK: fcmask}, x)))  # type: ignore[arg-type]  # noqa: E731
        fcmask = unflatten_dict({path: jnp.asarray(mask) for path, mask in masks.items()}, sep="/")
        return flatten_dict(fast_jit(jax.grad(loss))(fcmask), sep="/")

    found = gradients(TINY, masks)
    each = gradients(without_stage_masks(TINY), layer_by_layer(*specs, masks))
    layers = ("block02/project/output", "block03/expand/input", "block03/project/output", "head/input")
    expected = sum(each[path] for path in layers)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found["stage01/stream"], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("pixels", "whole_blocks"), [(16, True), (24, False)])  # the last maps are 4x4 and 6x6
def test_readers_find_a_stream_masked_on_maps_of_whole_blocks_and_only_there(pixels: int, whole_blocks: bool) -> None:
    """What the counts build on: all that a reader's mask still takes away there is the constant of a dead channel."""
    shape = (pixels, pixels, 3)
    network = dataclasses.replace(TINY, mode="hard", block=4)
    plain = without_stage_masks(network)
    specs = [each.spec(shape) for each in (network, plain)]
    assert stage_masks(specs[0]) == {"stage01/stream": whole_blocks}
    counts = layer_by_layer(*specs, random_counts(specs[0], 3))

    def computed(**changed: np.ndarray) -> np.ndarray:
        return logits(plain, shape, {path: count / 16 for path, count in {**counts, **changed}.items()})

    stream = counts["head/input"]
    assert stream.min() == 0 and len({*stream.tolist()}) > 8
    raised = np.where(stream > 0, 16, 0)
    expected, found = computed(), computed(**{"block03/expand/input": raised, "head/input": raised})
    if whole_blocks:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        assert np.abs(computed(**{"head/input": np.full_like(stream, 16)}) - expected).max() > 1e-3
    else:
        assert np.abs(found - expected).max() > 1e-3


def through_the_frequency_domain(variables: dict[str, Any], masks: dict[str, jax.Array], wide: jax.Array) -> jax.Array:
    """TINY from block02's wide channels [B, H, W, C] on, where the stream is nothing but kept coefficients.

    `masks` holds coefficient masks [N, channels].
    """
    params, stats, stream_mask = variables["params"], variables["batch_stats"], masks["stage01/stream"]

    def affine(*path: str) -> tuple[jax.Array, jax.Array]:
        p, s = params, stats
        for name in path:
            p, s = p[name], s[name]
        factor = p["scale"] / jnp.sqrt(s["var"] + 1e-5)
        return factor, p["bias"] - factor * s["mean"]

    def norm(x: jax.Array, *path: str) -> jax.Array:
        factor, shift = affine(*path)
        return jnp.clip(x * factor + shift, 0, 6)

    def write(x: jax.Array, name: str) -> jax.Array:
        """What a project layer and its norm add to the stream: coefficients [B, R, S, N, C]."""
        y = (block_dct(x, 2) * masks[f"{name}/project/input"]) @ params[name]["project"]["kernel"]
        factor, shift = affine(name, "project_norm")
        y = y * stream_mask * factor
        # The mean's coefficient is K times the mean. A dead channel's constant is left out: no reader asks for it.
        return y.at[..., 0, :].add(2 * shift) * stream_mask

    stream = write(wide, "block02")
    y = (stream @ params["block03"]["expand"]["kernel"]) * masks["block03/expand/output"]
    x = norm(block_idct(y, 2, (4, 4)), "block03", "expand_norm")
    x = norm(depthwise_conv(x, params["block03"]["depthwise"], 1), "block03", "depthwise_norm")
    stream = stream + write(x, "block03")
    y = (stream @ params["head"]["kernel"]) * masks["head/output"]
    x = norm(block_idct(y, 2, (4, 4)), "head_norm").mean(axis=(1, 2))
    return x @ params["classifier"]["kernel"] + params["classifier"]["bias"]


def test_a_stream_can_stay_in_the_frequency_domain() -> None:
    network = dataclasses.replace(TINY, mode="hard")
    spec = network.spec(WHOLE_BLOCKS)
    counts = random_counts(spec, 5)
    assert {*counts["stage01/stream"].tolist()} == {0, 1, 2, 3, 4}
    seen = {}

    def watch(call, args, kwargs, context):
        seen["/".join(context.module.path)] = args[0]
        return call(*args, **kwargs)

    def apply(variables, x):
        with nn.intercept_methods(watch):
            return network.apply(variables, x), seen["block02/project"]

    x = np.random.default_rng(9).normal(size=(2, *WHOLE_BLOCKS)).astype(np.float32)
    variables = {**variables_of(network, WHOLE_BLOCKS), FCMASK: collection_of(spec, counts)}
    expected, wide = fast_jit(apply)(variables, x)
    masks = {path: jnp.asarray(np.arange(4)[:, None] < count, jnp.float32) for path, count in counts.items()}
    found = fast_jit(through_the_frequency_domain)(variables, masks, wide)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# Counts


def test_one_layer_of_a_stream_by_hand() -> None:
    """K = 2 on a 4x4 map: 4 blocks, 16 pixels; transforms of 1, 2, 3, 4 coefficients cost 4, 8, 12, 16."""
    narrow, wide = np.bincount([4, 2, 0], minlength=5), np.bincount([4, 4, 1], minlength=5)
    by_band = [2 * 3, 2 * 2, 1 * 2, 1 * 2]
    narrow_transforms, wide_transforms = 16 + 8, 16 + 16 + 4
    count = partial(cheapest_pointwise, (4, 4), 2)
    assert count(narrow, wide) == (4 * (sum(by_band) + narrow_transforms + wide_transforms), "bands")
    assert count(narrow, wide, ("coefficients", "pixels")) == (4 * (sum(by_band) + wide_transforms), "bands")
    assert count(wide, narrow, ("pixels", "coefficients")) == (4 * (sum(by_band) + wide_transforms), "bands")
    # A whole wide side: a reader of masked pixels needs no transform; a writer masks what it has computed.
    whole = np.bincount([4] * 9, minlength=5)
    assert count(narrow, whole, ("masked", "pixels")) == (16 * 2 * 9, "channels")
    assert count(whole, narrow, ("pixels", "masked")) == (16 * 2 * 9 + 4 * 2 * narrow_transforms, "channels")
    assert count(narrow, whole, ("coefficients", "pixels")) == (16 * 2 * 9 + 4 * narrow_transforms, "channels")
    assert count(whole, narrow, ("pixels", "coefficients")) == (16 * 2 * 9 + 4 * narrow_transforms, "channels")
    # A writer of few wide channels goes by bands.
    few = np.bincount([4], minlength=5)
    assert count(few, narrow, ("pixels", "masked")) == (4 * (4 + 2 + 16 + narrow_transforms), "bands")
    assert count(few, narrow, ("pixels", "coefficients")) == (4 * (4 + 2 + 16), "bands")
    assert count(narrow, np.bincount([0, 0], minlength=5), ("coefficients", "pixels")) == (0, "channels")


def test_a_tied_block_between_streams_by_hand() -> None:
    """K = 2 on 4x4 maps; wide counts 2, 1, 1, 0; the narrow input keeps 4, 1, 0, the output 3, 2."""
    narrow = (np.array([4, 1, 0]), np.array([3, 2]))
    count = partial(group_macs, np.array([2, 1, 1, 0]), 2, 3, 2, (4, 4), (4, 4), 64, narrow_counts=narrow)
    expand = 4 * ((2 + 1) + 8) + 4 * 2 * (1 + 1)  # a product a common coefficient, and back to pixels
    project = 4 * ((2 + 2) + 8) + 4 * 2 * (2 + 4)
    depthwise = 9 * 16 + 2 * 64
    # The narrow input's transforms to 2 coefficients of one channel and 1 of the other, the output's of 2 and 2.
    shared = (4 * (8 + 4), 4 * (8 + 8))
    assert count() == {"expand": expand + shared[0], "depthwise": depthwise, "project": project + shared[1]}
    in_coefs = count(handovers=("coefficients", "coefficients"))
    assert in_coefs == {"expand": expand, "depthwise": depthwise, "project": project}
    assert count(narrow_transforms=False) == in_coefs


@pytest.mark.parametrize(
    ("handover", "expand", "project"),
    [
        # Pixel by pixel: 8 whole wide channels with what is alive. The mask around it, where one is needed.
        ("pixels", 16 * 8 * 2 + 2 * 4 * (16 + 4), 16 * 8 * 2 + 2 * 4 * (12 + 8)),
        ("masked", 16 * 8 * 2, 16 * 8 * 2 + 2 * 4 * (12 + 8)),
        ("coefficients", 16 * 8 * 2 + 4 * (16 + 4), 16 * 8 * 2 + 4 * (12 + 8)),
    ],
)
def test_whole_wide_channels_between_streams_by_hand(handover: Any, expand: int, project: int) -> None:
    narrow = (np.array([4, 1, 0]), np.array([3, 2]))
    found = group_macs(np.full(8, 4), 2, 3, 2, (4, 4), (4, 4), 64, narrow_counts=narrow, handovers=(handover, handover))
    assert found == {"expand": expand, "depthwise": 8 * 9 * 16, "project": project}


def test_one_whole_wide_channel_between_streams_is_cheaper_by_coefficients() -> None:
    narrow = (np.array([1] * 40), np.array([1] * 40))
    found = group_macs(np.array([4]), 2, 40, 40, (4, 4), (4, 4), 64, narrow_counts=narrow,
                       handovers=("coefficients", "coefficients"))  # fmt: skip
    assert found == {"expand": 4 * (40 + 16), "depthwise": 9 * 16, "project": 4 * (40 + 16)}


def test_a_stream_that_stays_in_the_frequency_domain_needs_no_transforms_of_its_own() -> None:
    """All masks partial and untied: the products and the transforms of the wide sides are all there is."""
    spec = SPECS["untied"]
    counts = {path: np.resize([1, 2, 3], channels) for path, (channels, _) in spec.mask_sizes.items()}
    found = {layer.name: layer for layer in network_macs(spec, counts).layers}
    for layer in spec.layers:
        if not layer.block:
            continue
        blocks = layer.in_size[0] * layer.in_size[1] // 4
        inputs, outputs = layer.input_counts(counts), layer.output_counts(counts)
        products = np.minimum(inputs[:, None], outputs[None]).sum()
        sides = [
            side
            for side, path in ((inputs, layer.input_mask), (outputs, layer.output_mask))
            if path not in stage_masks(spec)
        ]
        transforms = sum(4 * int(side.sum()) for side in sides)
        assert found[layer.name].total == blocks * (products + transforms), layer.name
        assert len(sides) == (2 if layer.name == "block00/expand" else 1)


@pytest.mark.parametrize("kind", SPECS)
def test_nothing_pruned_is_the_dense_network(kind: str) -> None:
    spec = SPECS[kind]
    macs = network_macs(spec, spec.full_counts())
    assert macs.ratio == 1
    assert {layer.form for layer in macs.layers} == {"dense"}


@pytest.mark.parametrize("kind", SPECS)
def test_dead_channels_of_a_stream_leave_all_its_layers(kind: str) -> None:
    spec = SPECS[kind]
    counts = random_counts(spec, 0, (0,))
    found = {layer.name: layer for layer in network_macs(spec, counts).layers}
    for roles in units(spec).values():
        expand, project = roles["expand"], roles["project"]
        wide = (expand.output_counts(counts) > 0) & (project.input_counts(counts) > 0)
        for layer, narrow in ((expand, expand.input_counts(counts)), (project, project.output_counts(counts))):
            pixels = layer.in_size[0] * layer.in_size[1]
            assert found[layer.name].total == pixels * int((narrow > 0).sum()) * int(wide.sum())
    head = spec.layers[-2]
    alive = [int((side(counts) > 0).sum()) for side in (head.input_counts, head.output_counts)]
    assert found["head"].total == head.in_size[0] * head.in_size[1] * alive[0] * alive[1]


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("kind", SPECS)
def test_streams_stay_in_the_frequency_domain_exactly_where_that_is_cheapest(kind: str, levels: str) -> None:
    spec = SPECS[kind]
    streams = [path for path, whole_blocks in stage_masks(spec).items() if whole_blocks]
    for seed in range(5):
        counts = random_counts(spec, seed, LEVELS[levels])
        # Some layers would have coefficients, those with whole wide sides pixels.
        for path, (_, num_coefs) in sorted(spec.mask_sizes.items())[seed % 3 :: 3]:
            counts[path] = np.where(counts[path] > 0, num_coefs, 0)
        totals = []
        for choices in itertools.product((False, True), repeat=len(streams)):
            in_coefs = [path for path, stays in zip(streams, choices, strict=True) if stays]
            layers = [room_macs(spec, room, counts, streams, in_coefs) for room in rooms(spec)]
            totals.append(sum(macs for room in layers for macs, _ in room.values()))
        stem = spec.layers[0].dense_macs
        assert network_macs(spec, counts).to_dict()["total"] == min(totals) + stem


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("kind", [kind for kind in SPECS if "untied" in kind])
def test_a_network_is_never_dearer_than_with_the_same_masks_layer_by_layer(kind: str, levels: str) -> None:
    spec, seen = SPECS[kind], set()
    plain = spec_of(stage_masks=False, block=spec.layers[1].block)
    for seed in range(4):
        counts = random_counts(spec, seed, LEVELS[levels])
        ours, theirs = network_macs(spec, counts), network_macs(plain, layer_by_layer(spec, plain, counts))
        assert ours.ratio <= theirs.ratio
        seen.add(ours.ratio < theirs.ratio)
        for left, right in zip(ours.layers, theirs.layers, strict=True):
            assert (left.pruned, left.paper_total) == (right.pruned, right.paper_total)
            assert (left.input_histogram, left.output_histogram) == (right.input_histogram, right.output_histogram)
    assert seen == {levels != "0,N"}


def test_on_padded_maps_a_stage_mask_saves_no_transforms() -> None:
    spec = spec_of((28, 28, 1), block=4)
    plain = spec_of((28, 28, 1), block=4, stage_masks=False)
    for seed in range(3):
        counts = random_counts(spec, seed)
        assert network_macs(spec, counts) == network_macs(plain, layer_by_layer(spec, plain, counts))


# Expected MACs


def expected(spec: NetworkSpec, counts: Counts, levels: tuple[int, ...] | None) -> float:
    """Of hard masks: each at its count's place among the levels."""
    masks = {}
    for path, (_, num_coefs) in spec.mask_sizes.items():
        accepted = level_counts(num_coefs, levels)
        masks[path] = jnp.asarray(np.searchsorted(accepted, counts[path]) / (len(accepted) - 1), jnp.float32)
    return float(expected_macs(spec, masks, levels))


def under_masks(spec: NetworkSpec, counts: Counts) -> int:
    """The total of all layers but the stem."""
    return sum(layer.total for layer in network_macs(spec, counts).layers if layer.name != "stem")


@pytest.mark.parametrize("kind", ["untied", "tied", "tied, padded"])
def test_levels_of_0_and_n_are_expected_to_cost_what_the_network_costs(kind: str) -> None:
    spec = SPECS[kind]
    for seed in range(2):
        counts = random_counts(spec, seed, (0,))
        assert expected(spec, counts, (0,)) == pytest.approx(under_masks(spec, counts), rel=1e-6)


@pytest.mark.parametrize("kind", ["untied", "untied, 4x4"])
def test_bands_are_expected_to_cost_what_the_network_costs_with_its_streams_in_the_frequency_domain(kind: str) -> None:
    spec = SPECS[kind]
    for seed in range(2):
        counts = random_counts(spec, seed)
        for path, (_, num_coefs) in spec.mask_sizes.items():
            counts[path][:2] = (num_coefs, num_coefs // 2)  # no side drops a coefficient, or is whole
        assert expected(spec, counts, None) == pytest.approx(under_masks(spec, counts), rel=1e-6)


def test_tied_blocks_are_expected_to_cost_what_the_network_costs_with_its_streams_in_the_frequency_domain() -> None:
    spec = SPECS["tied"]
    counts = {}
    for path, (channels, num_coefs) in spec.mask_sizes.items():
        # So much of a stream is left that no level is dearer than a mixture of those around it.
        levels = [0, 1, 1] if path.endswith("wide") else [0, 1, *[num_coefs] * 6]
        counts[path] = np.resize(levels, channels)
    macs = network_macs(spec, counts)
    assert {layer.form for layer in macs.layers} == {"dense", "groups", "bands"}  # the stem, the blocks, the head
    # What enters the first block, the stem's output, has no mask: its means are shared by the groups.
    first = spec.layers[1]
    shared = first.in_size[0] * first.in_size[1] * first.in_channels
    assert expected(spec, counts, (0, 1)) == pytest.approx(under_masks(spec, counts) - shared, rel=1e-6)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("kind", ["untied", "tied", "tied, padded"])
def test_the_slope_never_leads_up_and_leads_down_from_whole_masks(kind: str, levels: str) -> None:
    spec = SPECS[kind]
    function = fast_jit(jax.value_and_grad(lambda masks: expected_macs(spec, masks, LEVELS[levels])))
    rng = np.random.default_rng(0)
    masks = {path: rng.uniform(0, 1, n).astype(np.float32) for path, (n, _) in spec.mask_sizes.items()}
    value, gradient = function(masks)
    assert value > 0
    ones = {path: np.ones(n, np.float32) for path, (n, _) in spec.mask_sizes.items()}
    whole, from_whole = function(ones)
    assert whole > value
    for path in masks:
        assert np.isfinite(gradient[path]).all() and (np.asarray(gradient[path]) >= -1e-3).all(), path
        assert (np.asarray(from_whole[path]) > 0).all(), path


def test_the_papers_penalty_counts_a_shared_mask_once() -> None:
    spec = SPECS["untied"]
    collection = collection_of(spec, spec.full_counts())
    # Four layers with two sides in each block, and the head's two, less what six further sides share.
    assert float(mask_penalty(spec, collection, LearnConfig())) == pytest.approx(len(spec.mask_sizes))
    assert len(spec.mask_sizes) == 4 * 4 + 2 - 6


# The gate


def random_masks(spec: NetworkSpec, seed: int, low: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    masks = {}
    for path, (channels, _) in spec.mask_sizes.items():
        mask = rng.uniform(low, 1, channels)
        mask[rng.uniform(size=channels) < 0.15] = 0
        masks[path] = mask.astype(np.float32)
    return masks


@given(
    st.sampled_from(sorted(SPECS)), st.sampled_from(sorted(LEVELS)), st.floats(0, 0.9), st.integers(0, 10_000),
    st.sampled_from(["total", "paper"]),
)  # fmt: skip
@example("tied", "0,1,N", 0.0, 1, "total")
@example("untied", "all", 0.0, 1, "paper")
def test_the_gate_never_makes_a_network_dearer_and_releases_streams_as_a_whole(
    kind: str, levels: str, low: float, seed: int, convention: str
) -> None:
    spec = SPECS[kind]
    counts = round_masks(spec, random_masks(spec, seed, low), LEVELS[levels])
    gated, released = gate_counts(spec, counts, convention)
    before, after = network_macs(spec, counts), network_macs(spec, gated, released)
    assert mac_ratio(after, convention) <= mac_ratio(before, convention)
    assert mac_ratio(after, convention) <= 1
    assert gated.keys() == counts.keys()
    for path, (_, num_coefs) in spec.mask_sizes.items():
        whole = np.where(counts[path] > 0, num_coefs, 0)
        assert (gated[path] == counts[path]).all() or (gated[path] == whole).all(), path
    for layer in spec.layers:
        if layer.block:
            sides = (layer.input_counts(gated), layer.output_counts(gated))
            whole = all(np.isin(side, (0, layer.num_coefs)).all() for side in sides)
            assert whole == (layer.name in released)
    again, _ = gate_counts(spec, gated, convention)
    for path in gated:
        np.testing.assert_array_equal(again[path], gated[path])


def test_nothing_pruned_is_released() -> None:
    for spec in SPECS.values():
        for convention in ("total", "paper"):
            gated, released = gate_counts(spec, spec.full_counts(), convention)
            assert released == tuple(layer.name for layer in spec.layers if layer.block)
            macs = network_macs(spec, gated, released)
            assert macs.ratio == macs.paper_ratio == 1


def test_a_stream_that_does_not_pay_for_its_transforms_is_released_and_one_that_does_is_not() -> None:
    """One coefficient of one channel less saves next to nothing; one of four saves much."""
    spec = SPECS["untied"]
    for kept, released in ((3, True), (1, False)):
        counts = spec.full_counts()
        counts["stage00/stream"][: 1 if released else None] = kept
        gated, _ = gate_counts(spec, counts)
        assert (gated["stage00/stream"] == 4).all() == released
    # What saves without any transform at all stays: whole wide sides read a masked stream in pixels.
    counts = spec.full_counts()
    counts["stage01/stream"][:20] = 0
    gated, released_layers = gate_counts(spec, counts)
    np.testing.assert_array_equal(gated["stage01/stream"], counts["stage01/stream"])
    assert "head" in released_layers


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("levels", LEVELS)
def test_random_masks_are_hardened_to_within_2_per_cent_of_the_target(kind: str, levels: str) -> None:
    spec = SPECS[kind]
    rng = np.random.default_rng(0)
    masks = {path: rng.uniform(0, 1, n).astype(np.float32) for path, (n, _) in spec.mask_sizes.items()}
    for target in (0.25, 0.5, 0.75):
        hard = harden_to_target(spec, masks, target, levels=LEVELS[levels])
        assert hard.macs.ratio == pytest.approx(target, rel=0.02)


def test_hard_counts_survive_the_trip_through_the_collection() -> None:
    spec = SPECS["tied"]
    counts = random_counts(spec, 0)
    flat = flatten_dict(collection_of(spec, counts), sep="/")
    assert flat.keys() == spec.mask_sizes.keys()
    for path, count in counts.items():
        np.testing.assert_array_equal(flat[path], counts_to_fcmask(count, spec.mask_sizes[path][1]))
    assert stage_masks(NetworkSpec.from_dict(json.loads(json.dumps(spec.to_dict())))) == stage_masks(spec)


# A run


@pytest.mark.usefixtures("few_test_images")
def test_a_run_learns_and_refines_with_stage_masks(tmp_path) -> None:
    config = get_config()
    # With adam all masks come down at one speed, however much of the network hangs on a stream.
    learn = dataclasses.replace(
        config.learn, tied=True, stage_masks=True, penalty="macs", optimizer="adam", learning_rate=0.02, target_macs=0.6
    )
    config = dataclasses.replace(config, phases=("pretrain", "learn", "refine"), learn=learn)
    summary = train(config, str(tmp_path / "run"))
    assert 0.5 < summary["macs"]["ratio"] < 0.7  # after so few steps many channels of a mask are all but equal
    kept = {layer["name"]: layer["kept_counts"] for layer in summary["layers"]}
    sides = [kept["block02/project"]["output"], kept["block03/expand"]["input"], kept["block03/project"]["output"],
             kept["head"]["input"]]  # fmt: skip
    assert sides[0] is not None and sum(sides[0]) == 24 and all(side == sides[0] for side in sides)
    with np.load(tmp_path / "run" / "soft_masks.npz") as soft:
        assert np.ptp(soft["stage01/stream"]) > 0
