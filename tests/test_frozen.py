"""The frozen network says what the masked one says, whatever the masks; and its plans are data."""

from __future__ import annotations

import itertools
import json

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from fdjax.frozen.kernels import pack, pointwise
from fdjax.frozen.plan import plan_product
from fdjax.spec import network_macs
from flax.core import FrozenDict
from hypothesis import given, settings

from fdjax.frozen import NetworkPlan, freeze
from fdjax.ops.macs import depthwise_macs
from fdjax.zoo import MobileNet
from tests.frozen_networks import (
    HASTE,
    frozen_logits,
    masked_logits,
    random_counts,
    random_variables,
    raw_images,
    relative_error,
    with_preprocessing,
)
from tests.scipy_pointwise import prefix_mask, scipy_masked

MEANS = (1,)


def make(shape=(28, 28, 1), variant="mobilenetv2_small", width=0.3, **fields):
    for name in ("block_by_map", "block_by_layer"):
        if name in fields:
            fields[name] = FrozenDict(fields[name])
    network = MobileNet(variant, 10, width, mode="hard", **fields)
    return network, with_preprocessing(network.spec(shape))


def check(network, spec, counts, choose=None, seed=0, batch=2, **how):
    variables = random_variables(network, spec, seed)
    frozen = freeze(spec, variables, counts, choose) if choose else freeze(spec, variables, counts)
    images = raw_images(spec, batch, seed)
    expected = masked_logits(network, spec, variables, counts, images)
    assert relative_error(frozen_logits(frozen, images, **how), expected) < 1e-4 / 4
    return frozen


TIED = {"block": 2, "block_by_map": {7: 7}, "tied": True}
UNTIED = {"block": 2, "block_by_map": {7: 7}}


@pytest.mark.parametrize(
    ("fields", "levels", "forms"),
    [
        (TIED, MEANS, {"groups"}),
        ({**TIED, "padding": "torch", "sides": "output"}, MEANS, {"groups"}),
        (TIED, None, {"bands"}),
        (TIED, (), {"channels"}),
        (UNTIED, None, {"bands"}),
        (UNTIED, MEANS, {"bands", "groups"}),
        ({**UNTIED, "sides": "output", "padding": "torch"}, MEANS, {"bands"}),
        ({**UNTIED, "sides": "input"}, None, {"bands"}),
        # Blocks that divide no map, and ones that differ within a block of the network.
        ({"block": 4, "tied": True, "shape": (22, 26, 3)}, MEANS, {"bands"}),
        ({"block": 4, "shape": (22, 26, 3), "padding": "torch"}, None, {"bands"}),
        ({"block": 3, "shape": (24, 24, 3), "block_by_map": {12: 2}, "tied": True}, MEANS, {"groups"}),
        ({"block": 1, "block_by_layer": {"block02/project": 3}}, None, {"channels", "bands"}),
    ],
)
def test_the_frozen_network_equals_the_masked_one(fields, levels, forms) -> None:
    network, spec = make(**fields)
    frozen = check(network, spec, random_counts(spec, 1, levels))
    assert forms <= {unit.form for unit in frozen.plan.units}


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param("mobilenetv2", marks=pytest.mark.slow),
        pytest.param("mobilenetv2_cifar10", marks=pytest.mark.slow),
        "mobilenetv2_cifar100",
    ],
)
def test_every_variant_freezes(variant: str) -> None:
    shape = (64, 64, 3) if variant == "mobilenetv2" else (16, 16, 3)
    # The narrowest one: its first block, which has no expand layer, keeps its width and so has a residual.
    network, spec = make(shape, variant, 0.1, block=2, tied=variant == "mobilenetv2_cifar10")
    check(network, spec, random_counts(spec, 2, MEANS))


def test_removed_narrow_channels_may_be_multiplied_by_zero() -> None:
    network, spec = make(**UNTIED)
    chosen = []

    def choose(candidates) -> str:
        chosen.append("filled" if "filled" in candidates else next(iter(candidates)))
        return chosen[-1]

    frozen = check(network, spec, random_counts(spec, 1, ()), choose)
    filled = [unit for unit, form in zip(frozen.plan.units, chosen, strict=True) if form == "filled"]
    assert filled and all(unit.placement is None for unit in filled)
    assert not any(chain.expand and chain.expand.input_order for unit in filled for chain in unit.chains)
    # Where something is transformed, removed channels cost nothing to leave out.
    chosen.clear()
    check(network, spec, random_counts(spec, 1, None), choose)
    assert "filled" not in chosen


def test_wide_channels_are_made_a_multiple_by_zeros() -> None:
    network, spec = make(**UNTIED)
    chosen = []

    def choose(candidates) -> str:
        chosen.append("even" if "even" in candidates else next(iter(candidates)))
        return chosen[-1]

    counts = random_counts(spec, 1, ())
    frozen, fewest = check(network, spec, counts, choose), check(network, spec, counts)
    evened = [
        (one, other)
        for one, other, form in zip(frozen.plan.units, fewest.plan.units, chosen, strict=True)
        if form == "even"
    ]
    assert evened
    for one, other in evened:
        width = sum(chain.channels for chain in one.chains)
        alive = sum(chain.channels for chain in other.chains)
        assert alive < width < alive + 16 and (width % 16 == 0 or width == one_whole(spec, one.name))
    chosen.clear()
    check(network, spec, random_counts(spec, 1, None), choose)
    assert "even" not in chosen


def one_whole(spec, name: str) -> int:
    """Wide channels of a block."""
    return next(layer.in_channels for layer in spec.layers if layer.name == f"{name}/project")


def test_nothing_pruned_and_everything_pruned() -> None:
    network, spec = make(**UNTIED)
    frozen = check(network, spec, spec.full_counts())
    assert {unit.form for unit in frozen.plan.units} == {"dense"} and frozen.plan.head.form == "dense"
    nothing = {path: np.zeros(channels, int) for path, (channels, _) in spec.mask_sizes.items()}
    frozen = check(network, spec, nothing)
    assert sum(unit.macs() for unit in frozen.plan.units) == 0 and frozen.plan.head.product.outputs == 0


def test_a_removed_channel_that_differs_at_the_borders_stays_exact() -> None:
    """The project layer reads what the expand layer does not make: a constant, but for the depthwise layer's zeros."""
    network, spec = make(**UNTIED)
    counts = spec.full_counts()
    counts["block02/expand/output"] = np.zeros_like(counts["block02/expand/output"])
    counts["block02/expand/output"][::3] = 4
    frozen = check(network, spec, counts)
    unit = frozen.plan.units[2]
    assert unit.border and frozen.arrays["block02/bias"].shape == (7, 7, unit.outputs)
    assert unit.chains[0].channels == (counts["block02/expand/output"] > 0).sum()


def test_channels_that_nothing_writes_or_nothing_reads_leave_the_narrow_map() -> None:
    network, spec = make(**UNTIED)
    counts = spec.full_counts()
    counts["block02/project/output"][:3] = 0  # The stride is 2: nothing else writes these ...
    counts["block03/project/output"][1:4] = 0  # ... but for block 3, which leaves out number 1 and 2, too.
    counts["head/input"][5:7] = 0
    counts["block03/expand/input"][6:8] = 0  # Number 6 is read by neither.
    frozen = check(network, spec, counts)
    assert frozen.plan.units[3].outputs == spec.layers[-2].in_channels - 3
    assert frozen.plan.units[2].outputs == frozen.plan.units[3].outputs


@pytest.mark.parametrize(
    ("form", "levels", "fields"),
    [
        ("bands", MEANS, TIED),
        ("means", (1, 2), TIED),
        ("groups", (1, 2), TIED),
        ("groups", (1, 3), {"block": 4, "tied": True, "shape": (22, 26, 3)}),
    ],
)
def test_the_forms_of_a_block_are_the_same_function(form: str, levels, fields) -> None:
    network, spec = make(**fields)
    asked = []

    def choose(candidates):
        asked.append(form in candidates)
        return form if form in candidates else "bands"

    check(network, spec, random_counts(spec, 3, levels), choose)
    assert any(asked)


def test_large_batches_a_few_images_at_a_time(monkeypatch) -> None:
    network, spec = make(**TIED)
    monkeypatch.setattr("fdjax.frozen.network._CHUNK_BYTES", 100_000)
    check(network, spec, random_counts(spec, 1, MEANS), batch=12, in_chunks=True)


@given(
    st.integers(1, 4),
    st.lists(st.integers(0, 16), min_size=1, max_size=7),
    st.lists(st.integers(0, 16), min_size=1, max_size=7),
    st.tuples(st.integers(4, 9), st.integers(4, 9)),
)
@settings(max_examples=6)
def test_one_layer_equals_the_masked_one(block, input_counts, output_counts, size) -> None:
    num_coefs, rng = block**2, np.random.default_rng(len(input_counts))
    inputs, outputs = (np.minimum(counts, num_coefs) for counts in (input_counts, output_counts))
    x = rng.normal(size=(2, *size, len(inputs))).astype(np.float32)
    kernel = rng.normal(size=(len(inputs), len(outputs))).astype(np.float32)
    masks = [prefix_mask(counts, block) for counts in (inputs, outputs)]
    expected = np.stack([scipy_masked(image, kernel, block, *masks) for image in x])
    orders = [np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)] for counts in (inputs, outputs)]
    plan = plan_product(inputs[orders[0]], outputs[orders[1]], block, tuple(map(int, orders[0])))
    packed = pack("layer", kernel[np.ix_(*orders)], plan)
    found = jax.jit(lambda x: pointwise(x, packed, "layer", plan, block), compiler_options=HASTE)(x)
    np.testing.assert_allclose(found, expected[..., orders[1]], atol=2e-5)


def test_bands_that_are_many_become_few_products() -> None:
    counts = np.arange(16, 0, -1)
    plan = plan_product(counts, counts, 4)
    assert len(plan.runs) == 4 and plan.whole == (1, 1)
    assert plan.runs[0][0] == 0 and plan.runs[-1][1] == 15
    assert all(a[1] == b[0] for a, b in itertools.pairwise(plan.runs))


def test_a_block_costs_what_the_networks_count_says() -> None:
    network, spec = make(**TIED)
    counts = random_counts(spec, 5, MEANS)
    counted = {layer.name: layer.total for layer in network_macs(spec, counts).layers}
    for unit in freeze(spec, random_variables(network, spec, 0), counts).plan.units:
        if unit.form != "groups":
            continue
        total = sum(macs for name, macs in counted.items() if name.startswith(unit.name))
        # Phases that see the same taps are computed once here, for each pixel there.
        means = sum(chain.channels for chain in unit.chains if chain.means)
        assert total - depthwise_macs(unit.out_size, means) <= unit.macs() <= total


def test_plans_survive_json_and_hash() -> None:
    network, spec = make(**UNTIED)
    plan = freeze(spec, random_variables(network, spec, 0), random_counts(spec, 4)).plan
    read = NetworkPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert read == plan and hash(read) == hash(plan)
    with pytest.raises(ValueError, match="no NetworkPlan"):
        NetworkPlan.from_dict({"units": []})


def test_variables_and_counts_must_be_the_specs() -> None:
    network, spec = make(**UNTIED)
    variables, counts = random_variables(network, spec, 0), spec.full_counts()
    with pytest.raises(ValueError, match="counts of head/input must be"):
        freeze(spec, variables, {**counts, "head/input": counts["head/input"][1:]})
    del variables["params"]["block01"]["expand"]
    with pytest.raises(ValueError, match="no block01/expand/kernel"):
        freeze(spec, variables, counts)


def test_unit_candidates_are_named_as_they_run() -> None:
    network, spec = make(**TIED)
    seen = []

    def choose(candidates):
        seen.append({name: plan.form for name, (plan, _) in candidates.items()})
        return "bands"

    freeze(spec, random_variables(network, spec, 0), random_counts(spec, 1, MEANS), choose)
    # Block 2 changes from 2x2 blocks to 7x7 ones and so is not tied.
    whole_or_means = {"bands": "bands", "means": "groups"}
    assert seen == [whole_or_means, whole_or_means, {"bands": "bands"}, whole_or_means]
