"""Expected MACs: for hard masks the count of the network, in between a slope that always leads down."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

import fdjax
from fdjax.config import LearnConfig
from fdjax.graph.counting import NetworkMacs, group_runs, network_macs
from fdjax.graph.masks import MaskedGraph
from fdjax.ops.fcmask import level_counts
from fdjax.ops.macs import block_transform_macs
from fdjax.pruning import expected_macs
from fdjax.pruning.expected import expected_ratio
from fdjax.training.steps import mask_penalty
from fdjax.zoo import MobileNet
from tests.graph_networks import network_for
from tests.small_network import small, tied_masks, units

fast_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
Masks = dict[str, np.ndarray]
Counts = dict[str, np.ndarray]


GRAPHS = {
    "both": small(),
    "input": small(sides="input"),
    "output": small(sides="output"),
    "padded": small(block=3, block_by_map={}),
    "no expand": network_for(MobileNet("mobilenetv2", 10, width=0.35, block=2), (64, 64, 3)),
    "tied": small(tied=True),
    "tied, torch": small(tied=True, padding="torch", block=4, block_by_map={}),
}
TIED = ["tied", "tied, torch"]
UNTIED = [kind for kind in GRAPHS if kind not in TIED]
LEVELS = {"all": None, "0,1,N": (0, 1), "0,2,N": (0, 2), "0,N": (0,)}


@cache
def compiled(graph: MaskedGraph, levels: tuple[int, ...] | None, convention: str) -> Callable:
    """(masks) -> (expected MACs, gradient)."""
    return fast_jit(jax.value_and_grad(lambda masks: expected_macs(graph, masks, levels, convention)))


def expected(graph: MaskedGraph, counts: Counts, levels: tuple[int, ...] | None, convention: str = "total") -> float:
    """Of hard masks: each at its count's place among the levels."""
    masks = {}
    for path, (_, num_coefs) in graph.mask_sizes.items():
        accepted = level_counts(num_coefs, levels)
        assert set(counts[path].tolist()) <= set(accepted)
        masks[path] = jnp.asarray(np.searchsorted(accepted, counts[path]) / (len(accepted) - 1), jnp.float32)
    return float(compiled(graph, levels, convention)(masks)[0])


def random_counts(graph: MaskedGraph, levels: tuple[int, ...] | None, seed: int) -> Counts:
    rng = np.random.default_rng(seed)
    return {
        path: rng.choice(level_counts(num_coefs, levels), channels)
        for path, (channels, num_coefs) in graph.mask_sizes.items()
    }


def under_masks(graph: MaskedGraph, macs: NetworkMacs) -> int:
    """The total of the layers that masks act on: the wrapped ones, and the depthwise layers next to them.

    That of a first block without an expand layer follows the stem, which has no masks; the project layer after it does.
    """
    return sum(layer.total for layer in macs.layers if layer.name in graph.blocks or layer.kind == "depthwise")


def alone(graph: MaskedGraph, path: str, counts: Counts) -> Counts:
    """Nothing is kept but under the mask `path`: no layer costs anything but those of its run."""
    return {other: kept if other == path else np.zeros_like(kept) for other, kept in counts.items()}


@pytest.mark.parametrize("kind", GRAPHS)
def test_nothing_pruned_costs_the_dense_network_where_levels_are_0_and_n_or_masks_are_tied(kind: str) -> None:
    graph = GRAPHS[kind]
    whole = graph.full_counts()
    dense = under_masks(graph, network_macs(graph, whole))
    assert expected(graph, whole, (0,)) == pytest.approx(dense, rel=1e-6)
    for unit, mask in tied_masks(graph).items():
        dense = sum(layer.dense_macs for layer in units(graph)[unit].values())
        assert expected(graph, alone(graph, mask.path, whole), None) == pytest.approx(dense, rel=1e-6)
    assert bool(tied_masks(graph)) == (kind in TIED)


@pytest.mark.parametrize("kind", GRAPHS)
def test_levels_of_0_and_n_cost_what_the_network_costs(kind: str) -> None:
    """Fewer channels and no transform, also where maps are no multiple of the block."""
    graph = GRAPHS[kind]
    for seed in range(5):
        counts = random_counts(graph, (0,), seed)
        macs = network_macs(graph, counts)
        assert {layer.form for layer in macs.layers} <= {"dense", "channels"}
        assert expected(graph, counts, (0,)) == pytest.approx(under_masks(graph, macs), rel=1e-6)
    if kind in ("both", "tied"):
        masks = {path: jnp.asarray(kept > 0, jnp.float32) for path, kept in counts.items()}
        ratio = fast_jit(lambda masks: expected_ratio(graph, masks, (0,)))(masks)
        assert float(ratio) == pytest.approx(macs.ratio, rel=1e-6)
        assert macs.ratio < 1


@pytest.mark.parametrize("kind", UNTIED)
def test_bands_cost_what_the_network_costs_while_no_side_drops_a_coefficient(kind: str) -> None:
    graph = GRAPHS[kind]
    for seed in range(5):
        counts = random_counts(graph, None, seed)
        for path, (_, num_coefs) in graph.mask_sizes.items():
            # One channel is whole on all sides: the first is alive on both ends of its block. Another one is not.
            counts[path][:2] = (num_coefs, num_coefs // 2)
        macs = network_macs(graph, counts)
        assert {layer.form for layer in macs.layers if layer.block} == {"bands"}
        assert expected(graph, counts, None) == pytest.approx(under_masks(graph, macs), rel=1e-6)


@pytest.mark.parametrize("kind", TIED)
def test_tied_blocks_run_by_groups_cost_what_the_network_costs_but_for_the_shared_transforms(kind: str) -> None:
    graph, seen = GRAPHS[kind], 0
    for seed in range(5):
        counts = random_counts(graph, (0, 1), seed)
        found = {layer.name: layer for layer in network_macs(graph, counts).layers}
        for unit, mask in tied_masks(graph).items():
            roles = units(graph)[unit]
            if {found[layer.name].form for layer in roles.values()} != {"groups"}:
                continue
            seen += 1
            expand, project = roles["expand"], roles["project"]
            # The means of the narrow input and the broadcast to the narrow output: N each, block by block.
            blocks = [-(-side // mask.block) for side in (*expand.in_size, *project.in_size)]
            shared = blocks[0] * blocks[1] * expand.in_channels + blocks[2] * blocks[3] * project.out_channels
            shared *= mask.num_coefs
            assert (counts[mask.path] == 1).any()
            total = sum(found[layer.name].total for layer in roles.values())
            assert expected(graph, alone(graph, mask.path, counts), (0, 1)) == pytest.approx(total - shared, rel=1e-6)
    assert seen >= 5


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("kind", TIED)
def test_a_tied_channel_is_never_expected_to_cost_more_than_by_groups(kind: str, levels: str) -> None:
    """Levels dearer than a mixture of their neighbours count as the mixture, so that none is in the way of a mask."""
    graph = GRAPHS[kind]
    run, *_ = group_runs(graph).values()
    path, num_coefs, costs = run.mask.path, run.mask.num_coefs, []
    accepted = level_counts(num_coefs, LEVELS[levels])
    for count in accepted:
        counts = np.full(run.mask.channels, count)
        found = expected(graph, alone(graph, path, {**graph.full_counts(), path: counts}), LEVELS[levels])
        by_groups = sum(run.macs(counts, narrow_transforms=False).values())
        assert found <= by_groups * (1 + 1e-6), path
        assert found == pytest.approx(by_groups, rel=1e-6) or 0 < count < num_coefs
        costs.append(found)
    slopes = np.diff(costs)
    assert costs[0] == 0 and (slopes > 0).all()
    assert (np.diff(slopes) >= -1e-5 * costs[-1]).all()


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("kind", GRAPHS)
def test_the_papers_convention_is_the_papers_count_of_the_wrapped_layers(kind: str, levels: str) -> None:
    graph = GRAPHS[kind]
    for seed in range(3):
        counts = random_counts(graph, LEVELS[levels], seed)
        paper = sum(layer.paper_total for layer in network_macs(graph, counts).layers if layer.block)
        assert expected(graph, counts, LEVELS[levels], "paper") == pytest.approx(paper, rel=1e-6)


def test_maps_of_three_axes_are_expected_to_cost_what_they_are_counted_with() -> None:
    class Volume(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3, 3), name="stem")(x))
            x = nn.relu(nn.Conv(16, (1, 1, 1), name="a")(x))
            return nn.Conv(8, (1, 1, 1), name="b")(x).mean((1, 2, 3))

    x = jnp.zeros((1, 6, 4, 4, 3))
    variables = jax.eval_shape(Volume().init, jax.random.key(0), x)
    graph = fdjax.with_masks(fdjax.trace(Volume().apply, variables, x), tied=False)
    counted = fdjax.count(graph, graph.full_counts())
    ratio = fdjax.expected_ratio(graph, fdjax.init_fcmask(graph), convention="paper")
    assert float(ratio) == pytest.approx(counted.paper_ratio, rel=1e-6)


@pytest.mark.parametrize("convention", ["total", "paper"])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("kind", ["both", "output", "tied"])
def test_the_slope_never_leads_up_and_leads_down_from_whole_masks(kind: str, levels: str, convention: str) -> None:
    graph = GRAPHS[kind]
    function = compiled(graph, LEVELS[levels], convention)
    dense = sum(layer.dense_macs for layer in graph.layers.values())
    values = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        masks = {path: rng.uniform(0, 1, n).astype(np.float32) for path, (n, _) in graph.mask_sizes.items()}
        value, gradient = function(masks)
        assert 0 < value < 4 * dense
        assert gradient.keys() == masks.keys()
        for path, slope in gradient.items():
            assert np.isfinite(slope).all() and (np.asarray(slope) >= 0).all(), path
        values.append(float(value))
    ones = {path: np.ones(n, np.float32) for path, (n, _) in graph.mask_sizes.items()}
    value, gradient = function(ones)
    assert value > max(values)
    for path, slope in gradient.items():
        assert np.isfinite(slope).all() and (np.asarray(slope) > 0).all(), path


@pytest.mark.parametrize("kind", ["both", "tied"])
def test_removing_a_wide_channel_takes_its_part_of_all_three_layers_away(kind: str) -> None:
    graph = GRAPHS[kind]
    # The last block does not change its map's size: tied networks tie it.
    roles = [*units(graph).values()][-1]
    expand, depthwise, project = roles["expand"], roles["depthwise"], roles["project"]
    made, read = graph.mask_of(expand.name, "output"), graph.mask_of(project.name, "input")
    assert made and read and (made == read) == (kind == "tied")
    blocks = {layer.name: graph.blocks[layer.name] for layer in (expand, project)}
    for text, levels in LEVELS.items():
        whole = graph.full_counts()
        before = expected(graph, whole, levels)
        pixels_in, pixels_out = (layer.in_size[0] * layer.in_size[1] for layer in (expand, project))
        assert (pixels_in % blocks[expand.name] ** 2, pixels_out % blocks[project.name] ** 2) == (0, 0)
        part = pixels_in * expand.in_channels + pixels_out * (9 + project.out_channels)
        if kind == "both" and text != "0,N":  # its transforms, too; those of the narrow sides stay
            for layer, pixels in ((expand, pixels_in), (project, pixels_out)):
                block = blocks[layer.name]
                part += pixels // block**2 * block_transform_macs(block, block**2)
        # Removed on one end, it is removed on the other.
        for paths in ((made,), (read,), (made, read)):
            counts = {path: count.copy() for path, count in whole.items()}
            for path in paths:
                counts[path][3] = 0
            assert before - expected(graph, counts, levels) == pytest.approx(part, abs=1), (text, paths)
    assert depthwise.window == (3, 3)


def test_a_runs_penalty_is_the_papers_or_expected_macs_over_dense_ones() -> None:
    graph = GRAPHS["tied"]
    dense = sum(layer.dense_macs for layer in graph.counted_layers.values())
    rng = np.random.default_rng(0)
    masks = {path: rng.uniform(0, 1, n).astype(np.float32) for path, (n, _) in graph.mask_sizes.items()}
    collection = unflatten_dict(masks, sep="/")
    for convention in ("total", "paper"):
        learn = LearnConfig(penalty="macs", levels="0,1,N", target_convention=convention)
        expected = float(compiled(graph, (0, 1), convention)(masks)[0]) / dense
        assert float(mask_penalty(graph, collection, learn)) == pytest.approx(expected, rel=1e-5)
    means = sum(float(mask.mean()) for mask in masks.values())
    assert float(mask_penalty(graph, collection, LearnConfig())) == pytest.approx(means, rel=1e-5)
