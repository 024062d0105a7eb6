"""Expected MACs: for hard masks the count of the network, in between a slope that always leads down."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fdjax.spec import NetworkMacs, NetworkSpec, network_macs, tied_mask, unit_group_macs, units
from flax.traverse_util import unflatten_dict

from fdjax.config import LearnConfig
from fdjax.ops.fcmask import level_counts
from fdjax.ops.macs import block_transform_macs
from fdjax.pruning import expected_macs
from fdjax.training.steps import mask_penalty
from fdjax.zoo import MobileNet
from tests.small_network import small

fast_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
Masks = dict[str, np.ndarray]
Counts = dict[str, np.ndarray]


SPECS = {
    "both": small(),
    "input": small(sides="input"),
    "output": small(sides="output"),
    "padded": small(block=3, block_by_map={}),
    "no expand": MobileNet("mobilenetv2", 10, width=0.35, block=2).spec((64, 64, 3)),
    "tied": small(tied=True),
    "tied, torch": small(tied=True, padding="torch", block=4, block_by_map={}),
}
UNTIED = [kind for kind in SPECS if not SPECS[kind].tied]
TIED = [kind for kind in SPECS if SPECS[kind].tied]
LEVELS = {"all": None, "0,1,N": (0, 1), "0,2,N": (0, 2), "0,N": (0,)}


@cache
def compiled(spec: NetworkSpec, levels: tuple[int, ...] | None, convention: str) -> Callable:
    """(masks) -> (expected MACs, gradient)."""
    return fast_jit(jax.value_and_grad(lambda masks: expected_macs(spec, masks, levels, convention)))


def expected(spec: NetworkSpec, counts: Counts, levels: tuple[int, ...] | None, convention: str = "total") -> float:
    """Of hard masks: each at its count's place among the levels."""
    masks = {}
    for path, (_, num_coefs) in spec.mask_sizes.items():
        accepted = level_counts(num_coefs, levels)
        assert set(counts[path].tolist()) <= set(accepted)
        masks[path] = jnp.asarray(np.searchsorted(accepted, counts[path]) / (len(accepted) - 1), jnp.float32)
    return float(compiled(spec, levels, convention)(masks)[0])


def random_counts(spec: NetworkSpec, levels: tuple[int, ...] | None, seed: int) -> Counts:
    rng = np.random.default_rng(seed)
    return {
        path: rng.choice(level_counts(num_coefs, levels), channels)
        for path, (channels, num_coefs) in spec.mask_sizes.items()
    }


def under_masks(spec: NetworkSpec, macs: NetworkMacs) -> int:
    """The total of the layers that masks act on: all of a block, and what is wrapped besides."""
    acted_on = {layer.name for layer in spec.layers if layer.block or layer.unit}
    return sum(layer.total for layer in macs.layers if layer.name in acted_on)


@pytest.mark.parametrize("kind", SPECS)
def test_nothing_pruned_costs_the_dense_network_where_levels_are_0_and_n_or_masks_are_tied(kind: str) -> None:
    spec = SPECS[kind]
    dense = under_masks(spec, network_macs(spec, spec.full_counts()))
    assert expected(spec, spec.full_counts(), (0,)) == pytest.approx(dense, rel=1e-6)
    for layers in units(spec).values() if spec.tied else ():
        alone = dataclasses.replace(spec, layers=tuple(layers.values()))
        if tied_mask(layers):
            dense = sum(layer.dense_macs for layer in layers.values())
            assert expected(alone, alone.full_counts(), None) == pytest.approx(dense, rel=1e-6)


@pytest.mark.parametrize("kind", SPECS)
def test_levels_of_0_and_n_cost_what_the_network_costs(kind: str) -> None:
    """Fewer channels and no transform, also where maps are no multiple of the block."""
    spec = SPECS[kind]
    for seed in range(5):
        counts = random_counts(spec, (0,), seed)
        macs = network_macs(spec, counts)
        assert {layer.form for layer in macs.layers} <= {"dense", "channels"}
        assert expected(spec, counts, (0,)) == pytest.approx(under_masks(spec, macs), rel=1e-6)


@pytest.mark.parametrize("kind", UNTIED)
def test_bands_cost_what_the_network_costs_while_no_side_drops_a_coefficient(kind: str) -> None:
    spec = SPECS[kind]
    for seed in range(5):
        counts = random_counts(spec, None, seed)
        for path, (_, num_coefs) in spec.mask_sizes.items():
            # One channel is whole on all sides: the first is alive on both ends of its block. Another one is not.
            counts[path][:2] = (num_coefs, num_coefs // 2)
        macs = network_macs(spec, counts)
        assert all(layer.form == "bands" for layer in macs.layers if layer.block)
        assert expected(spec, counts, None) == pytest.approx(under_masks(spec, macs), rel=1e-6)


@pytest.mark.parametrize("kind", TIED)
def test_tied_blocks_run_by_groups_cost_what_the_network_costs_but_for_the_shared_transforms(kind: str) -> None:
    spec, seen = SPECS[kind], 0
    for seed in range(5):
        counts = random_counts(spec, (0, 1), seed)
        for roles in units(spec).values():
            alone = dataclasses.replace(spec, layers=tuple(roles.values()))
            macs = network_macs(alone, counts)
            if {layer.form for layer in macs.layers} != {"groups"}:
                continue
            seen += 1
            expand, project = roles["expand"], roles["project"]
            assert project.block is not None
            # The means of the narrow input and the broadcast to the narrow output: N each, block by block.
            blocks = [-(-side // project.block) for side in (*expand.in_size, *project.in_size)]
            shared = blocks[0] * blocks[1] * expand.in_channels + blocks[2] * blocks[3] * project.out_channels
            shared *= project.num_coefs
            assert (counts[tied_mask(roles) or ""] == 1).any()
            assert expected(alone, counts, (0, 1)) == pytest.approx(under_masks(alone, macs) - shared, rel=1e-6)
    assert seen >= 5


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("kind", TIED)
def test_a_tied_channel_is_never_expected_to_cost_more_than_by_groups(kind: str, levels: str) -> None:
    """Levels dearer than a mixture of their neighbours count as the mixture, so that none is in the way of a mask."""
    spec = SPECS[kind]
    (name, roles), *_ = ((name, roles) for name, roles in units(spec).items() if tied_mask(roles))
    alone = dataclasses.replace(spec, layers=tuple(roles.values()))
    ((path, (channels, num_coefs)),) = alone.mask_sizes.items()
    costs = []
    accepted = level_counts(num_coefs, LEVELS[levels])
    for count in accepted:
        counts = np.full(channels, count)
        found = expected(alone, {path: counts}, LEVELS[levels])
        by_groups = sum(unit_group_macs(alone, roles, counts, narrow_transforms=False).values())
        assert found <= by_groups * (1 + 1e-6), name
        assert found == pytest.approx(by_groups, rel=1e-6) or 0 < count < num_coefs
        costs.append(found)
    slopes = np.diff(costs)
    assert costs[0] == 0 and (slopes > 0).all()
    assert (np.diff(slopes) >= -1e-5 * costs[-1]).all()


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("kind", SPECS)
def test_the_papers_convention_is_the_papers_count_of_the_wrapped_layers(kind: str, levels: str) -> None:
    spec = SPECS[kind]
    for seed in range(3):
        counts = random_counts(spec, LEVELS[levels], seed)
        paper = sum(layer.paper_total for layer in network_macs(spec, counts).layers if layer.block)
        assert expected(spec, counts, LEVELS[levels], "paper") == pytest.approx(paper, rel=1e-6)


@pytest.mark.parametrize("convention", ["total", "paper"])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("kind", ["both", "output", "tied"])
def test_the_slope_never_leads_up_and_leads_down_from_whole_masks(kind: str, levels: str, convention: str) -> None:
    spec = SPECS[kind]
    function = compiled(spec, LEVELS[levels], convention)
    dense = sum(layer.dense_macs for layer in spec.layers)
    values = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        masks = {path: rng.uniform(0, 1, n).astype(np.float32) for path, (n, _) in spec.mask_sizes.items()}
        value, gradient = function(masks)
        assert 0 < value < 4 * dense
        assert gradient.keys() == masks.keys()
        for path, slope in gradient.items():
            assert np.isfinite(slope).all() and (np.asarray(slope) >= 0).all(), path
        values.append(float(value))
    ones = {path: np.ones(n, np.float32) for path, (n, _) in spec.mask_sizes.items()}
    value, gradient = function(ones)
    assert value > max(values)
    for path, slope in gradient.items():
        assert np.isfinite(slope).all() and (np.asarray(slope) > 0).all(), path


@pytest.mark.parametrize("kind", ["both", "tied"])
def test_removing_a_wide_channel_takes_its_part_of_all_three_layers_away(kind: str) -> None:
    spec = SPECS[kind]
    # The last block does not change its map's size: tied networks tie it.
    name, roles = [(name, roles) for name, roles in units(spec).items() if kind == "both" or tied_mask(roles)][-1]
    expand, depthwise, project = roles["expand"], roles["depthwise"], roles["project"]
    assert expand.output_mask and project.input_mask and expand.block and project.block
    for text, levels in LEVELS.items():
        whole = spec.full_counts()
        before = expected(spec, whole, levels)
        pixels_in, pixels_out = (layer.in_size[0] * layer.in_size[1] for layer in (expand, project))
        assert (pixels_in % expand.num_coefs, pixels_out % project.num_coefs) == (0, 0)
        part = pixels_in * expand.in_channels + pixels_out * (9 + project.out_channels)
        if kind == "both" and text != "0,N":  # its transforms, too; those of the narrow sides stay
            for layer, pixels in ((expand, pixels_in), (project, pixels_out)):
                assert layer.block
                part += pixels // layer.num_coefs * block_transform_macs(layer.block, layer.num_coefs)
        # Removed on one end, it is removed on the other.
        for paths in ((expand.output_mask,), (project.input_mask,), (expand.output_mask, project.input_mask)):
            counts = {path: count.copy() for path, count in whole.items()}
            for path in paths:
                counts[path][3] = 0
            assert before - expected(spec, counts, levels) == pytest.approx(part, abs=1), (name, text, paths)
    assert depthwise.window == 3


def test_a_runs_penalty_is_the_papers_or_expected_macs_over_dense_ones() -> None:
    spec = SPECS["tied"]
    dense = sum(layer.dense_macs for layer in spec.counted_layers)
    rng = np.random.default_rng(0)
    masks = {path: rng.uniform(0, 1, n).astype(np.float32) for path, (n, _) in spec.mask_sizes.items()}
    collection = unflatten_dict(masks, sep="/")
    for convention in ("total", "paper"):
        learn = LearnConfig(penalty="macs", levels="0,1,N", target_convention=convention)
        expected = float(compiled(spec, (0, 1), convention)(masks)[0]) / dense
        assert float(mask_penalty(spec, collection, learn)) == pytest.approx(expected, rel=1e-5)
    means = sum(float(mask.mean()) for mask in masks.values())
    assert float(mask_penalty(spec, collection, LearnConfig())) == pytest.approx(means, rel=1e-5)
