"""The frozen network says what the masked one says, whatever the masks, by every schedule."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from flax.core import FrozenDict

from fdjax.frozen.choice import layers_of
from fdjax.frozen.products import plan_product
from fdjax.frozen.program import Pointwise, Run
from fdjax.graph.counting import network_macs
from fdjax.ops.macs import depthwise_macs
from fdjax.zoo import MobileNet
from tests.frozen_networks import (
    frozen_logits,
    frozen_of,
    masked_logits,
    random_counts,
    random_variables,
    raw_images,
    relative_error,
    with_preprocessing,
)
from tests.graph_networks import network_for

MEANS = (1,)


def make(shape=(28, 28, 1), variant="mobilenetv2_small", width=0.3, **fields):
    for name in ("block_by_map", "block_by_layer"):
        if name in fields:
            fields[name] = FrozenDict(fields[name])
    network = MobileNet(variant, 10, width, mode="hard", **fields)
    return network, with_preprocessing(network_for(network, shape))


def operations_of(frozen) -> dict[str, Run | Pointwise]:
    """Runs, and the pointwise layers outside of any, by name."""
    return {name: program.operations[0] for name, (program, _) in layers_of(frozen).items()}


def runs_of(frozen) -> list[Run]:
    return [operation for operation in operations_of(frozen).values() if isinstance(operation, Run)]


def forms_of(frozen) -> set[str]:
    return {run.form for run in runs_of(frozen)}


def check(network, graph, counts, choose=None, seed=0, batch=2, **how):
    variables = random_variables(network, graph, seed)
    frozen = frozen_of(graph, variables, counts, choose) if choose else frozen_of(graph, variables, counts)
    images = raw_images(graph, batch, seed)
    expected = masked_logits(network, graph, variables, counts, images)
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
        ({"block": 4, "shape": (22, 26, 3), "padding": "torch"}, (0, 3, 7), {"bands"}),
        ({"block": 3, "shape": (24, 24, 3), "block_by_map": {12: 2}, "tied": True}, MEANS, {"groups"}),
        ({"block": 1, "block_by_layer": {"block02/project": 3}}, None, {"channels", "bands"}),
    ],
)
def test_the_frozen_network_equals_the_masked_one(fields, levels, forms) -> None:
    network, graph = make(**fields)
    frozen = check(network, graph, random_counts(graph, 1, levels))
    assert forms <= forms_of(frozen)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["mobilenetv2", "mobilenetv2_cifar10", "mobilenetv2_cifar100"])
def test_every_variant_freezes(variant: str) -> None:
    shape = (64, 64, 3) if variant == "mobilenetv2" else (16, 16, 3)
    # The narrowest one: its first block, which has no expand layer, keeps its width and so has a residual.
    network, graph = make(shape, variant, 0.1, block=2, tied=variant == "mobilenetv2_cifar10")
    check(network, graph, random_counts(graph, 2, MEANS))


def test_removed_narrow_channels_may_be_multiplied_by_zero() -> None:
    network, graph = make(**UNTIED)
    chosen = []

    def choose(candidates) -> str:
        chosen.append("filled" if "filled" in candidates else next(iter(candidates)))
        return chosen[-1]

    frozen = check(network, graph, random_counts(graph, 1, ()), choose)
    filled = [run for run, form in zip(runs_of(frozen), chosen, strict=True) if form == "filled"]
    assert filled and all(run.placement is None for run in filled)
    assert not any(chain.writer.input_order for run in filled for chain in run.chains)
    # Where something is transformed, removed channels cost nothing to leave out.
    chosen.clear()
    check(network, graph, random_counts(graph, 1, None), choose)
    assert "filled" not in chosen


def test_wide_channels_are_made_a_multiple_by_zeros() -> None:
    network, graph = make(**UNTIED)
    chosen = []

    def choose(candidates) -> str:
        chosen.append("even" if "even" in candidates else next(iter(candidates)))
        return chosen[-1]

    counts = random_counts(graph, 1, ())
    frozen, fewest = check(network, graph, counts, choose), check(network, graph, counts)
    evened = [
        (one, other)
        for one, other, form in zip(runs_of(frozen), runs_of(fewest), chosen, strict=True)
        if form == "even"
    ]
    assert evened
    for one, other in evened:
        width = sum(chain.channels for chain in one.chains)
        alive = sum(chain.channels for chain in other.chains)
        assert alive < width < alive + 16 and (width % 16 == 0 or width == one_whole(graph, one.name))
    chosen.clear()
    check(network, graph, random_counts(graph, 1, None), choose)
    assert "even" not in chosen


def one_whole(graph, name: str) -> int:
    """Channels of a run's space."""
    return graph.layers[f"{name}/project"].in_channels


def test_nothing_pruned_and_everything_pruned() -> None:
    network, graph = make(**UNTIED)
    frozen = check(network, graph, graph.full_counts())
    assert {operation.form for operation in operations_of(frozen).values()} == {"dense"}
    nothing = {path: np.zeros(channels, int) for path, (channels, _) in graph.mask_sizes.items()}
    frozen = check(network, graph, nothing)
    assert frozen.program.macs() == 0


def test_a_removed_channel_that_differs_at_the_borders_stays_exact() -> None:
    """The project layer reads what the expand layer does not make: a constant, but for the depthwise layer's zeros."""
    network, graph = make(**UNTIED)
    counts = graph.full_counts()
    counts["block02/expand/output"] = np.zeros_like(counts["block02/expand/output"])
    counts["block02/expand/output"][::3] = 4
    frozen = check(network, graph, counts)
    run = operations_of(frozen)["block02"]
    assert run.bias == "map" and frozen.arrays["block02/bias"].shape == (7, 7, run.outputs)
    assert run.chains[0].channels == (counts["block02/expand/output"] > 0).sum()


def test_channels_that_nothing_writes_or_nothing_reads_leave_the_narrow_map() -> None:
    network, graph = make(**UNTIED)
    counts = graph.full_counts()
    counts["block02/project/output"][:3] = 0  # The stride is 2: nothing else writes these ...
    counts["block03/project/output"][1:4] = 0  # ... but for block 3, which leaves out number 1 and 2, too.
    counts["head/input"][5:7] = 0
    counts["block03/expand/input"][6:8] = 0  # Number 6 is read by neither.
    frozen = check(network, graph, counts)
    runs = operations_of(frozen)
    assert runs["block03"].outputs == graph.layers["head"].in_channels - 3
    assert runs["block02"].outputs == runs["block03"].outputs


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
    network, graph = make(**fields)
    asked = []

    def choose(candidates):
        asked.append(form in candidates)
        return form if form in candidates else "bands"

    check(network, graph, random_counts(graph, 3, levels), choose)
    assert any(asked)


def test_large_batches_a_few_images_at_a_time(monkeypatch) -> None:
    network, graph = make(**TIED)
    monkeypatch.setattr("fdjax.frozen.xla_stages._CHUNK_BYTES", 100_000)
    check(network, graph, random_counts(graph, 1, MEANS), batch=12, in_chunks=True)


def test_bands_that_are_many_become_few_products() -> None:
    counts = np.arange(16, 0, -1)
    plan = plan_product(counts, counts, 4)
    assert len(plan.runs) == 4 and plan.whole == (1, 1)
    assert plan.runs[0][0] == 0 and plan.runs[-1][1] == 15
    assert all(a[1] == b[0] for a, b in itertools.pairwise(plan.runs))


def test_a_run_costs_what_the_networks_count_says() -> None:
    network, graph = make(**TIED)
    counts = random_counts(graph, 5, MEANS)
    counted = {layer.name: layer.total for layer in network_macs(graph, counts).layers}
    frozen = frozen_of(graph, random_variables(network, graph, 0), counts)
    groups = [run for run in runs_of(frozen) if run.form == "groups"]
    assert groups
    for run in groups:
        total = sum(macs for name, macs in counted.items() if name.startswith(run.name))
        # Phases that see the same taps are computed once here, for each pixel there.
        means = sum(chain.channels for chain in run.chains if chain.means)
        assert total - depthwise_macs(run.out_size, means) <= run.macs() <= total


def test_variables_and_counts_must_be_the_networks() -> None:
    network, graph = make(**UNTIED)
    variables, counts = random_variables(network, graph, 0), graph.full_counts()
    with pytest.raises(ValueError, match="counts of head/input must be"):
        frozen_of(graph, variables, {**counts, "head/input": counts["head/input"][1:]})
    expand = variables["params"]["block01"]["expand"]
    expand["kernel"] = expand["kernel"][1:]
    with pytest.raises(ValueError, match="block01/expand/kernel must have shape"):
        frozen_of(graph, variables, counts)
    del variables["params"]["block01"]["expand"]
    with pytest.raises(ValueError, match=r"the network has \d+ arrays, and \d+ are given"):
        frozen_of(graph, variables, counts)


def test_schedules_are_named_as_they_run() -> None:
    network, graph = make(**TIED)
    seen = []

    def choose(candidates):
        seen.append({name: run.form for name, (run, _) in candidates.items()})
        return "bands"

    frozen_of(graph, random_variables(network, graph, 0), random_counts(graph, 1, MEANS), choose)
    # Block 2 changes from 2x2 blocks to 7x7 ones and so is not tied.
    whole_or_means = {"bands": "bands", "means": "groups"}
    assert seen == [whole_or_means, whole_or_means, {"bands": "bands"}, whole_or_means]
