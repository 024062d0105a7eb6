"""MAC counts of networks: the paper's numbers to the digit, and layers and runs against those of loops."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax.graph.counting import GroupRun, effective_counts, group_runs, network_macs
from fdjax.graph.masks import SIDES, MaskedGraph
from fdjax.zoo import MobileNet, ResNet
from tests.graph_networks import network_for
from tests.small_network import small, tied_masks, units
from tests.test_ops_macs import loop_pointwise

# The networks, counted here from Sandler et al.'s Table 2 with nothing of ours

TABLE_2 = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))


def count_mobilenet(pixels: int, stem: tuple[int, int], strides, expand_always: bool, classes: int) -> dict[str, int]:
    """Dense MACs, MACs with every wrapped layer's full 4x4 transforms (16 an element), and parameters; width 1.0."""
    window, stride = stem
    side, channels = pixels // stride, 32
    dense = side**2 * 3 * 32 * window**2
    parameters = 3 * 32 * window**2 + 2 * 32
    transforms = 0

    def pointwise(inputs: int, outputs: int) -> None:
        nonlocal dense, parameters, transforms
        dense += side**2 * inputs * outputs
        transforms += side**2 * (inputs + outputs) * 16
        parameters += inputs * outputs + 2 * outputs

    for (expansion, outputs, repeats), first_stride in zip(TABLE_2, strides, strict=True):
        for repeat in range(repeats):
            wide = expansion * channels
            if expansion > 1 or expand_always:
                pointwise(channels, wide)
            side //= first_stride if repeat == 0 else 1
            dense += side**2 * 9 * wide
            parameters += 9 * wide + 2 * wide
            pointwise(wide, outputs)
            channels = outputs
    pointwise(320, 1280)
    parameters += 1280 * classes + classes
    return {"dense": dense, "full": dense + transforms, "classifier": 1280 * classes, "parameters": parameters}


ORIGINAL = (1, 2, 2, 2, 1, 2, 1)
PAPERS = {
    # name: (pixels, classes, our count above, published M dense, published M with full transforms, exact integers)
    "mobilenetv2_cifar10": (
        32, 10, count_mobilenet(32, (3, 1), (1, 1, 2, 2, 1, 2, 1), True, 10),
        "89.01", "117.98", 89_012_224, 117_979_136,
    ),
    "mobilenetv2_cifar100": (
        32, 100, count_mobilenet(32, (1, 1), (1, 2, 2, 2, 1, 1, 1), False, 100),
        "42.96", "53.67", 42_958_848, 53_673_984,
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", PAPERS)
def test_cifar_networks_have_the_papers_counts_to_the_digit(variant: str) -> None:
    pixels, classes, counted, dense_m, full_m, dense, full = PAPERS[variant]
    graph = network_for(MobileNet(variant, classes, block=4), (pixels, pixels, 3))
    macs = network_macs(graph, graph.full_counts()).to_dict()
    assert (macs["dense"], macs["full_transforms"]) == (dense, full)
    assert (counted["dense"], counted["full"]) == (dense, full)
    assert (f"{dense / 1e6:.2f}", f"{full / 1e6:.2f}") == (dense_m, full_m)
    assert macs["paper_total"] == full
    assert macs["pruned"] == macs["total"] == dense
    assert (macs["ratio"], macs["paper_ratio"]) == (1, full / dense)


@pytest.mark.parametrize(("pixels", "published", "exact"), [(224, "300.77", 300_774_272), (192, "221.32", 221_316_608)])
def test_the_original_has_its_published_count_with_the_classifier(pixels: int, published: str, exact: int) -> None:
    counted = count_mobilenet(pixels, (3, 2), ORIGINAL, False, 1000)
    blocks = {14: 2, 7: 7} if pixels == 224 else {}
    network = MobileNet("mobilenetv2", 1000, block=2 if pixels == 224 else 3, block_by_map=blocks)
    graph = network_for(network, (pixels, pixels, 3), count_classifier=True)
    macs = network_macs(graph, graph.full_counts()).to_dict()
    assert macs["dense"] == counted["dense"] + counted["classifier"] == exact
    assert f"{exact / 1e6:.2f}" == published
    uncounted = dataclasses.replace(graph, uncounted=frozenset({"classifier"}))
    without = network_macs(uncounted, graph.full_counts()).to_dict()
    assert macs["dense"] - without["dense"] == 1_280_000


# TF-slim's README: width, resolution, millions of MACs; of its 22 networks each width and each resolution once.
PUBLISHED = ((1.4, 224, 582), (1.3, 224, 509), (1.0, 160, 154), (0.75, 128, 69), (0.5, 192, 71), (0.35, 96, 11))


@pytest.mark.parametrize(("width", "pixels", "millions"), PUBLISHED)
def test_widths_and_resolutions_have_their_published_counts(width: float, pixels: int, millions: int) -> None:
    network = MobileNet("mobilenetv2", 1000, width=width, block=1)
    graph = network_for(network, (pixels, pixels, 3), count_classifier=True)
    assert abs(sum(layer.dense_macs for layer in graph.counted_layers.values()) / 1e6 - millions) < 1


@pytest.mark.parametrize(
    ("network", "dense", "full"),
    [
        (ResNet("resnext29", 10, block=4), "772.47", "843.25"),
        (ResNet("resnet110", 10), "252.89", "252.89"),
    ],
)
def test_residual_networks_have_their_published_counts(network: ResNet, dense: str, full: str) -> None:
    graph = network_for(network, (32, 32, 3))
    macs = network_macs(graph, graph.full_counts()).to_dict()
    assert (f"{macs['dense'] / 1e6:.2f}", f"{macs['full_transforms'] / 1e6:.2f}") == (dense, full)
    assert macs["pruned"] == macs["total"] == macs["dense"]


def test_the_original_has_its_published_number_of_parameters() -> None:
    variables = jax.eval_shape(
        lambda key: MobileNet("mobilenetv2", 1000, mode="off").init(key, jnp.zeros((1, 32, 32, 3))), jax.random.key(0)
    )
    found = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert found == count_mobilenet(224, (3, 2), ORIGINAL, False, 1000)["parameters"] == 3_504_872


# Whole networks


GRAPHS = {
    "both": small(),
    "input": small(sides="input"),
    "output": small(sides="output"),
    "tied": small(tied=True),
    "torch": small(tied=True, padding="torch", block_by_map={}),
    "wide": small(width=2.0, block=3, block_by_map={}),
}


def random_counts(graph: MaskedGraph, seed: int, levels: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    counts = {}
    for path, (channels, num_coefs) in graph.mask_sizes.items():
        counts[path] = rng.choice([0, 1, num_coefs], channels) if levels else rng.integers(0, num_coefs + 1, channels)
    return counts


@pytest.mark.parametrize("kind", GRAPHS)
def test_nothing_pruned_is_the_dense_network(kind: str) -> None:
    graph = GRAPHS[kind]
    macs = network_macs(graph, graph.full_counts())
    assert macs.ratio == 1
    for layer in macs.layers:
        assert (layer.total, layer.pruned, layer.form) == (layer.dense, layer.dense, "dense")


def sides_of(graph: MaskedGraph, name: str, counts: dict[str, np.ndarray]) -> list[list[int]]:
    """Kept counts of both sides of a wrapped layer; N where a side has no mask."""
    layer, found = graph.layers[name], []
    for side, channels in zip(SIDES, (layer.in_channels, layer.out_channels), strict=True):
        path = graph.mask_of(name, side)
        found.append([int(n) for n in counts[path]] if path else [graph.blocks[name] ** 2] * channels)
    return found


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("seed", range(3))
def test_totals_are_sums_of_layers_and_layers_are_those_of_pointwise_macs(kind: str, seed: int) -> None:
    graph = GRAPHS[kind]
    counts = random_counts(graph, seed)
    macs = network_macs(graph, counts, released=["head"])
    summary, layers = macs.to_dict(), {layer.name: layer.to_dict() for layer in macs.layers}
    assert [*layers] == [name for name, layer in graph.layers.items() if layer.kind != "dense"]
    for field in ("dense", "pruned", "full_transforms", "paper_total", "total"):
        assert summary[field] == sum(layer[field] for layer in layers.values())
        assert type(summary[field]) is int
    assert summary["ratio"] == macs.ratio == summary["total"] / summary["dense"]
    assert summary["paper_ratio"] == macs.paper_ratio == summary["paper_total"] / summary["dense"]
    assert json.loads(json.dumps([summary, layers])) == [summary, layers]
    assert [name for name, layer in layers.items() if layer["released"]] == ["head"]
    for name, found in layers.items():
        assert found["total"] <= found["paper_total"]
        assert found["ratio"] == found["total"] / found["dense"]
        if name not in graph.blocks:
            assert found["kept_counts"] == {"input": None, "output": None}
            assert found["pruned"] == found["full_transforms"] == found["paper_total"] == found["dense"]
            continue
        block = graph.blocks[name]
        sides = sides_of(graph, name, counts)
        for side, kept in zip(SIDES, sides, strict=True):
            expected = [kept.count(n) for n in range(block**2 + 1)] if graph.mask_of(name, side) else None
            assert found["kept_counts"][side] == expected
        assert found["num_coefs"] == block**2
        if name != "head":
            assert found["paper_total"] == loop_pointwise(graph.layers[name].in_size, block, *sides).paper_total


@pytest.mark.parametrize("kind", ["both", "input", "output", "wide"])
def test_untied_layers_and_depthwise_layers_are_counted_without_dead_channels(kind: str) -> None:
    """A wide channel that is dead on one end of its block is dead on the other, and in between."""
    graph = GRAPHS[kind]
    counts = random_counts(graph, 7, levels=True)
    found = {layer.name: layer for layer in network_macs(graph, counts).layers}
    effective, forms = effective_counts(graph, counts), set()
    for roles in units(graph).values():
        expand, depthwise, project = roles["expand"], roles["depthwise"], roles["project"]
        (narrow_in, wide_out), (wide_in, narrow_out) = (sides_of(graph, of.name, counts) for of in (expand, project))
        alive = [bool(out and back) for out, back in zip(wide_out, wide_in, strict=True)]
        wide_out, wide_in = ([n * a for n, a in zip(wide, alive, strict=True)] for wide in (wide_out, wide_in))
        for layer, sides in ((expand, (narrow_in, wide_out)), (project, (wide_in, narrow_out))):
            loops = loop_pointwise(layer.in_size, graph.blocks[layer.name], *sides)
            assert (found[layer.name].total, found[layer.name].form) == (loops.total, loops.form)
            forms.add(loops.form)
        height, width = depthwise.out_size
        assert found[depthwise.name].total == 9 * height * width * sum(alive)
        assert effective[expand.name][1].tolist() == wide_out
        assert effective[project.name][0].tolist() == wide_in
    assert "bands" in forms


def runs_of(graph: MaskedGraph) -> dict[str, GroupRun]:
    """Inverted residual -> its run by groups."""
    return {run.writer.name.rpartition("/")[0]: run for run in group_runs(graph).values()}


@pytest.mark.parametrize("kind", ["tied", "torch"])
def test_tied_blocks_take_the_cheaper_of_groups_and_layers(kind: str) -> None:
    graph = GRAPHS[kind]
    assert runs_of(graph).keys() == tied_masks(graph).keys() != set()
    for seed, levels in ((0, True), (1, True), (2, False)):
        counts = random_counts(graph, seed, levels)
        found = {layer.name: layer for layer in network_macs(graph, counts).layers}
        untied = effective_counts(graph, counts)
        for unit, run in runs_of(graph).items():
            roles, wide = units(graph)[unit], counts[tied_masks(graph)[unit].path]
            assert run.layers == (roles["expand"], roles["depthwise"], roles["project"])
            by_layer = sum(
                loop_pointwise(layer.in_size, graph.blocks[name], *(list(map(int, s)) for s in untied[name])).total
                for layer in roles.values()
                if (name := layer.name) in graph.blocks
            ) + 9 * roles["depthwise"].out_size[0] * roles["depthwise"].out_size[1] * int((wide > 0).sum())
            by_group = sum(run.macs(wide).values())
            total = sum(found[layer.name].total for layer in roles.values())
            assert total == min(by_group, by_layer)
            assert {found[layer.name].form == "groups" for layer in roles.values()} == {by_group < by_layer}


def test_group_counts_of_a_network_use_its_own_padding() -> None:
    """Levels {0, 1, N} on the block whose depthwise layer has stride 2: 14x14 to 7x7 in 4x4 blocks."""
    for padding, first, along in (("same", 0, 10), ("torch", -1, 11)):
        run = runs_of(small(block=4, block_by_map=None, tied=True, padding=padding))["block02"]
        expand, depthwise, project = run.layers
        assert (depthwise.in_size, depthwise.out_size, depthwise.stride) == ((14, 14), (7, 7), (2, 2))
        assert along == sum(len({(2 * i + first + a) // 4 for a in range(3)}) for i in range(7))
        counts = np.zeros(depthwise.in_channels, int)
        counts[:3] = 1
        assert run.macs(counts) == {
            "block02/expand": 16 * (16 * expand.in_channels + 3 * expand.in_channels),
            "block02/depthwise": 3 * along**2,
            "block02/project": 4 * (3 * 16 + 3 * project.out_channels + 16 * project.out_channels),
        }


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_network_survives_json(kind: str) -> None:
    """Its masks and all that is counted; `test_graph.py` looks at the graph itself."""
    graph = dataclasses.replace(GRAPHS[kind], input_mean=(1.5, 2.0), input_std=(3.0, 4.0), class_names=("ant", "bee"))
    again = MaskedGraph.from_dict(json.loads(json.dumps(graph.to_dict())))
    assert again.to_dict() == graph.to_dict()
    assert (again.masks, again.mask_sizes) == (graph.masks, graph.mask_sizes)
    counts = random_counts(graph, 0, levels=True)
    assert network_macs(again, counts) == network_macs(graph, counts)


@pytest.mark.parametrize("fields", [{}, {"graph": 3}, {"masks": 3}, {"masks": [["head/input", 8]]}, {"colour": 1}])
def test_fields_of_no_network_are_a_value_error(fields: dict) -> None:
    with pytest.raises(ValueError, match=r"do not describe a|damaged"):
        MaskedGraph.from_dict({**GRAPHS["both"].to_dict(), **fields} if fields else {})


def test_masks_of_layers_that_a_network_does_not_have_are_a_value_error() -> None:
    with pytest.raises(ValueError, match="name layers that it does not have"):
        MaskedGraph.from_dict({**GRAPHS["both"].to_dict(), "blocks": {"neck": 2}})


def test_block_settings_that_do_not_fit_are_value_errors_with_words() -> None:
    with pytest.raises(ValueError, match=r"block 8 is larger than the 7x7 map of layer block02/project"):
        small(block=8, block_by_map=None)
    with pytest.raises(ValueError, match=r"block_by_layer names 'block99/expand'; wrapped layers are block00/expand"):
        small(block_by_layer={"block99/expand": 2})
    with pytest.raises(ValueError, match=r"block_by_map names maps of side 5; wrapped layers have 7, 14"):
        small(block_by_map={5: 2})
