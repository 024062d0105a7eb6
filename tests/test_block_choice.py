"""Choosing blocks: against brute force, on maps of known spectrum, and as a command; and K = 1 in training."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax.checkpoint import find_checkpoint
from fdjax.checkpoints.calibrate import choose_blocks_of, side_energies
from fdjax.commands.main import fdjax_command
from fdjax.data import normalize
from fdjax.errors import UserError
from fdjax.graph.counting import group_runs, network_macs
from fdjax.graph.masks import MaskedGraph
from fdjax.graph.network import Layer
from fdjax.ops.fcmask import level_counts
from fdjax.ops.macs import cheapest_pointwise
from fdjax.pruning import gate_counts
from fdjax.pruning.block_choice import (
    block_units,
    check_choice,
    choose_blocks,
    coefficient_energy,
    fitting_blocks,
    frontier,
    with_blocks,
)
from fdjax.training.restore import restore
from fdjax.training.run import train
from fdjax.zoo import FCMASK, FrequencyPointwise, MobileNet
from tests.graph_networks import network_for
from tests.small_network import one_layer, one_unit, small
from tests.tiny_run import get_config


def network(**settings) -> MaskedGraph:
    """14x14 and 7x7 maps, one block everywhere."""
    return small(width=0.3, block=1, block_by_map=None, **settings)


def energies_of(graph: MaskedGraph, candidates, energy_of) -> dict:
    """What `side_energies` might measure: (layer, channels, block) -> [N, channels] for every masked side."""
    return {
        (layer.name, side): {block: energy_of(layer, channels, block) for block in fitting_blocks(layers, candidates)}
        for layers in block_units(graph).values()
        for layer in layers
        for side, channels in (("input", layer.in_channels), ("output", layer.out_channels))
        if graph.mask_of(layer.name, side)
    }


def strengths(layer: Layer, channels: int) -> np.ndarray:
    return np.random.default_rng([*map(ord, layer.name), channels]).uniform(0.5, 1.5, channels) ** 2


def white(layer: Layer, channels: int, block: int) -> np.ndarray:
    """All coefficients alike."""
    return np.tile(strengths(layer, channels) / block**2, (block**2, 1))


def smooth(layer: Layer, channels: int, block: int) -> np.ndarray:
    """Of maps that are constant in 14x14 pixels, with a little that is white."""
    energy = 0.01 * white(layer, channels, block)
    energy[0] += strengths(layer, channels)
    return energy


# Energy


@pytest.mark.parametrize("block", [1, 2, 7])
def test_energy_sums_to_the_mean_square_where_the_block_divides_the_map(block):
    x = jax.random.normal(jax.random.key(0), (3, 14, 14, 5)) * jnp.arange(5)
    energy = coefficient_energy(x, block)
    assert energy.shape == (block**2, 5)
    np.testing.assert_allclose(energy.sum(axis=0), jnp.square(x).mean(axis=(0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("block", [1, 2, 4, 5])
def test_energy_of_a_constant_map_is_that_of_its_mean_also_when_padded(block):
    energy = coefficient_energy(jnp.full((2, 7, 7, 1), 3.0), block)[:, 0]
    np.testing.assert_allclose(energy, [9.0, *[0] * (block**2 - 1)], atol=1e-5)


# Options of a unit


def random_energies(graph: MaskedGraph, block: int, seed: int) -> dict:
    """Falling along the coefficients, as those of images do."""
    rng = np.random.default_rng(seed)
    return {
        side: {block: rng.exponential(size=(block**2, mask.channels)) * 2.0 ** -np.arange(block**2)[:, None]}
        for mask in graph.masks.values()
        for side in mask.sides
    }


def lost_on(energy: np.ndarray, counts) -> float:
    return sum(energy[count:, channel].sum() for channel, count in enumerate(counts)) / energy.sum()


PRICES = 2.0 ** np.arange(-6, 5)


@pytest.mark.parametrize("levels", [None, (0, 1), (0, 2), (0,)])
@pytest.mark.parametrize("seed", range(3))
def test_tied_options_have_the_optimum_at_every_price(levels, seed):
    graph = one_unit(channels=3, wide=4, features=5, side=8, stride=2, block=2)
    energies = random_energies(graph, 2, seed)
    sides = [energies["a/expand", "output"][2], energies["a/project", "input"][2]]
    options = frontier(graph, "a", 2, energies, levels)
    (run,) = group_runs(graph).values()
    assert [layer.name for layer in run.layers] == ["a/expand", "a/depthwise", "a/project"]

    def macs(counts) -> int:
        return sum(run.macs(np.array(counts)).values())

    for option in options:
        counts = option.counts["a/wide"]
        assert option.macs == macs(counts)
        assert option.lost == pytest.approx(np.mean([lost_on(side, counts) for side in sides]))
    tried = [
        (np.mean([lost_on(side, counts) for side in sides]), macs(counts))
        for counts in itertools.product(level_counts(4, levels), repeat=4)
        if any(counts)
    ]
    dense = run.writer.dense_macs + run.reader.dense_macs
    for price in PRICES / dense:
        best = min(options, key=lambda option: option.lost + price * option.macs)
        assert best.lost + price * best.macs == pytest.approx(min(lost + price * cost for lost, cost in tried))
        assert best.lost <= min(lost for lost, cost in tried if cost <= best.macs) + 1e-9


@pytest.mark.parametrize("levels", [None, (0, 1), (0,)])
@pytest.mark.parametrize("sides", ["input", "output", "both"])
def test_options_of_a_layer_have_the_optimum_at_every_price(levels, sides):
    """The exact count of a layer is a product of its sides; brute force knows nothing of how they were found."""
    graph = one_layer(channels=3, features=2, side=4, block=2, sides=sides)
    energies = random_energies(graph, 2, seed=3)
    masked = [side for side in ("input", "output") if sides in ("both", side)]
    widths = {"input": 3, "output": 2}

    def both(counts: dict) -> tuple[float, int]:
        """Lost shares of the masked sides together, and MACs."""
        lost = sum(lost_on(energies["head", side][2], counts[side]) for side in counts)
        histograms = [
            np.bincount(np.array(counts.get(side, [4] * widths[side])), minlength=5) for side in ("input", "output")
        ]
        return lost, cheapest_pointwise((4, 4), 2, *histograms)[0]

    options = frontier(graph, "head", 2, energies, levels)
    found = []
    for option in options:
        counts = {side: option.counts[f"head/{side}"] for side in masked}
        found.append(both(counts))
        assert option.macs == found[-1][1]
        kept = np.prod([1 - lost_on(energies["head", side][2], counts[side]) for side in masked])
        assert option.lost == pytest.approx(1 - kept)
    accepted = level_counts(4, levels)
    tried = [
        both(counts)
        for flat in itertools.product(accepted, repeat=sum(widths[side] for side in masked))
        for counts in [{side: flat[-widths[side] :] if side == "output" else flat[:3] for side in masked}]
        if all(any(of_side) for of_side in counts.values())
    ]
    # Partial counts on both sides depend on each other; how they are found promises no more than to come near.
    tolerance = 0.02 if sides == "both" and len(accepted) > 2 else 1e-6
    for price in PRICES / graph.layers["head"].dense_macs:
        least = min(lost + price * macs for lost, macs in tried)
        assert min(lost + price * macs for lost, macs in found) == pytest.approx(least, rel=tolerance)


@pytest.mark.parametrize(("block", "kept"), [(1, (0, 1)), (2, (0, 4))])
def test_a_project_layer_takes_its_depthwise_layer_with_it(block, kept):
    """A block without an expand layer: its wide channels are the input of its project layer."""
    graph = network_for(MobileNet("mobilenetv1", 10, width=0.25, block=1, sides="input"), (32, 32, 3))
    energies = random_energies(graph, block, seed=0)
    for option in frontier(graph, "block00/project", block, energies, (0,)):
        assert set(option.counts["block00/project/input"].tolist()) <= {*kept}
        there = with_blocks(graph, {"block00/project": block})
        found = {of.name: of.total for of in network_macs(there, {**there.full_counts(), **option.counts}).layers}
        assert option.macs == found["block00/depthwise"] + found["block00/project"]


# The choice


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("levels", [None, (0, 1)])
def test_white_maps_get_single_pixels_and_smooth_ones_get_blocks(tied, levels):
    candidates = (1, 2, 7)
    graph = network(tied=tied)

    def chosen(energy_of, target: float) -> dict[str, int]:
        choice = choose_blocks(graph, energies_of(graph, candidates, energy_of), candidates, target, levels)
        assert choice.macs.ratio <= target
        counts = {path: kept for option in choice.chosen.values() for path, kept in option.counts.items()}
        gated, _ = gate_counts(choice.network, counts)  # nothing is pruned that costs more than it saves
        assert all(np.array_equal(gated[path], counts[path]) for path in counts)
        assert {name: option.block for name, option in choice.chosen.items()} == {
            name: choice.network.blocks[layers[0].name] for name, layers in block_units(choice.network).items()
        }
        return dict(choice.network.blocks)

    assert set(chosen(white, 0.4).values()) == {1}
    assert set(chosen(smooth, 0.2).values()) == {7}
    mixed = chosen(lambda layer, *rest: (white if layer.name.startswith("block00/") else smooth)(layer, *rest), 0.2)
    assert mixed == {name: 1 if name.startswith("block00") else 7 for name in mixed}


def test_a_target_of_1_keeps_everything():
    graph = network(tied=True)
    choice = choose_blocks(graph, energies_of(graph, (1, 2), white), (1, 2), 1.0)
    assert choice.macs.ratio == 1.0


def test_a_block_with_tied_masks_takes_one_block_that_fits_both_maps():
    graph = network(tied=True)
    assert graph.layers["block02/depthwise"].stride == (2, 2)
    layers = block_units(graph)["block02"]
    assert [layer.name for layer in layers] == ["block02/expand", "block02/project"]
    assert fitting_blocks(layers, (8, 1, 14, 7)) == (1, 7)
    assert [*block_units(network())] == [*graph.blocks]


@pytest.mark.parametrize(
    ("candidates", "target", "expected"),
    [
        ((8,), 0.5, "no candidate block fits the 7x7 map"),
        ((), 0.5, "given: none"),
        ((1, 17), 0.5, "from 1 to 16"),
        ((0,), 0.5, "from 1 to 16"),
        ((1,), 0.001, "every masked channel removed"),
    ],
)
def test_choices_that_cannot_be_made_are_refused(candidates, target, expected):
    with pytest.raises(ValueError, match=expected):
        check_choice(network(tied=True), candidates, target)


def test_a_target_that_empties_a_layer_is_refused():
    graph = network(tied=True)
    floor = network_macs(graph, {path: np.zeros(n, int) for path, (n, _) in graph.mask_sizes.items()}).ratio
    with pytest.raises(ValueError, match="every layer keeps a coefficient"):
        choose_blocks(graph, energies_of(graph, (1,), white), (1,), floor + 1e-4)


# Measuring

WIDE_SIDES = (("expand", "output"), ("project", "input"))


def test_energies_are_those_of_the_maps_that_masks_multiply(pretrained):
    """Oracle: what Flax itself records. Outputs are measured as batch norm leaves them, but for its shift."""
    restored = restore(*find_checkpoint(str(pretrained)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: np.asarray(x) * rng.uniform(0.5, 1.5, x.shape).astype(np.float32), restored.state.variables()
    )
    images = rng.integers(0, 256, (8, 28, 28, 1), np.uint8)
    asked = dataclasses.replace(network(tied=True), input_mean=(100.0,), input_std=(50.0,))
    energies = side_energies(restored.network, asked, variables, images, (1, 2))
    wide = [(f"block0{index}/{role}", side) for index in range(4) for role, side in WIDE_SIDES]
    assert {*energies} == {*wide, ("head", "input"), ("head", "output")}

    @jax.jit
    def record(variables):
        x = normalize(images, asked.input_mean, asked.input_std)
        dense = dataclasses.replace(restored.network, mode="off")
        return dense.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])[1]

    recorded = record(variables)
    maps = recorded["intermediates"]
    for (layer, side), module in {
        ("block02/expand", "output"): maps["block02"]["expand_norm"],
        ("block02/project", "input"): maps["block02"]["depthwise_norm"],
        ("head", "input"): maps["block03"],
    }.items():
        y = module["__call__"][0]
        expected = coefficient_energy(y - y.mean(axis=(0, 1, 2)), 2)
        np.testing.assert_allclose(energies[layer, side][2], expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(energies[layer, side][1][0], y.var(axis=(0, 1, 2)), rtol=1e-4, atol=1e-6)


# The command


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """The workdir of a run that has pretrained, for two steps."""
    workdir = tmp_path_factory.mktemp("blocks") / "pretrained"
    config = get_config()
    short = dataclasses.replace(config.pretrain, steps=2)
    train(dataclasses.replace(config, phases=("pretrain",), pretrain=short), str(workdir))
    return workdir


def test_the_flags_of_the_command_give_the_blocks_that_it_chose(pretrained, tmp_path, capsys):
    report, macs = tmp_path / "blocks.json", tmp_path / "macs.json"
    asked = ["--candidates", "1", "2", "7", "--tied", "--levels", "0,1,N", "--target-macs", "0.6", "--images", "40"]
    assert fdjax_command(["blocks", "--checkpoint", str(pretrained), *asked, "--json", str(report)]) == 0
    said, written = capsys.readouterr().out, json.loads(report.read_text())
    assert written["masks"] == {"sides": "both", "tied": True, "levels": "0,1,N"}
    assert written["num_images"] == 40
    assert written["macs"]["ratio"] <= written["target_macs"] == 0.6
    assert [unit["name"] for unit in written["units"]] == ["block00", "block01", "block02", "block03", "head"]
    for unit in written["units"]:
        assert [option["block"] for option in unit["options"]] == [1, 2, 7]
        assert {written["blocks"][layer] for layer in unit["layers"]} == {unit["block"]}
        assert unit["name"] in said
    assert shlex.join(written["flags"]) == said.splitlines()[-1]
    assert {"--learn.tied", "--learn.levels", "--learn.target-macs"} <= {*written["flags"]}

    arguments = ["macs", "--config", "tests/tiny_run.py", *written["flags"], "--json", str(macs)]
    assert fdjax_command(arguments) == 0
    layers = json.loads(macs.read_text())["layers"]
    assert {layer["name"]: layer["block"] for layer in layers if layer["block"]} == written["blocks"]


def test_mask_settings_are_the_runs_own_unless_given(pretrained, tmp_path, capsys):
    report = tmp_path / "blocks.json"
    assert (
        fdjax_command(
            ["blocks", "--checkpoint", str(pretrained), "--candidates", "1", "--images", "8", "--json", str(report)]
        )
        == 0
    )
    written = json.loads(report.read_text())
    assert written["masks"] == {"sides": "both", "tied": False, "levels": "all"}
    assert written["target_macs"] == get_config().learn.target_macs
    assert set(written["blocks"].values()) == {1}
    # The config's block_by_map would still stand.
    assert written["flags"][:3] == ["--learn.block", "1", "--learn.block-by-layer"]
    assert "block03/expand" in written["flags"] and "block00/expand" not in written["flags"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--candidates", "8"], "no candidate block fits the 7x7 map of block02/project"),
        (["--candidates", "17"], "from 1 to 16"),
        (["--target-macs", "0.001"], "every masked channel removed"),
        (["--target-macs", "2"], "above 0 and at most 1"),
        (["--levels", "1"], "0,1,N"),
        (["--sides", "all"], "'both'"),
        (["--images", "0"], "at least 1"),
        (["--json", "/does/not/exist/file.json"], "directory that exists"),
    ],
)
def test_wrong_flags_are_refused(pretrained, capsys, arguments, expected):
    with pytest.raises(SystemExit) as stop:
        fdjax_command(["blocks", "--checkpoint", str(pretrained), *arguments])
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert expected in said and "Traceback" not in said


def test_without_a_target_one_must_be_given(pretrained):
    restored = restore(*find_checkpoint(str(pretrained)))
    learn = dataclasses.replace(restored.config.learn, target_macs=None, lambda_=0.1)
    with pytest.raises(UserError, match="give one: --target-macs"):
        choose_blocks_of(restored, learn, (1,), num_images=8)


def test_a_target_that_only_empty_layers_reach_is_the_users_mistake(pretrained):
    restored = restore(*find_checkpoint(str(pretrained)))
    graph = restored.graph
    floor = network_macs(graph, {path: np.zeros(n, int) for path, (n, _) in graph.mask_sizes.items()}).ratio
    learn = dataclasses.replace(restored.config.learn, target_macs=floor + 1e-4)
    with pytest.raises(UserError, match="every layer keeps a coefficient"):
        choose_blocks_of(restored, learn, (1,), num_images=9)


def test_no_checkpoint_is_refused(tmp_path, capsys):
    for arguments, expected in (([], "--checkpoint"), (["--checkpoint", str(tmp_path)], "checkpoint")):
        with pytest.raises(SystemExit) as stop:
            fdjax_command(["blocks", *arguments])
        assert stop.value.code == 2
        assert expected in capsys.readouterr().err


# K = 1 in training


@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize("levels", [None, (0, 1)])
def test_a_layer_of_single_pixels_masks_channels(mode, levels):
    layer = FrequencyPointwise(3, 1, mode=mode, levels=levels)
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 5, 5, 4)).astype(np.float32), rng.normal(size=(4, 3)).astype(np.float32)
    inputs, outputs = np.float32([0, 0.3, 0.7, 1]), np.float32([0.4, 0.6, 1])

    def apply(inputs):
        return layer.apply({"params": {"kernel": kernel}, FCMASK: {"input": inputs, "output": outputs}}, x)

    rounded = mode != "soft"
    kept = [(mask >= 0.5).astype(np.float32) if rounded else mask for mask in (inputs, outputs)]
    np.testing.assert_allclose(apply(inputs), (x * kept[0]) @ kernel * kept[1], rtol=1e-5, atol=1e-5)
    if mode != "hard":
        slopes = jax.grad(lambda inputs: apply(inputs).sum())(inputs)
        np.testing.assert_allclose(slopes, ((x.sum(axis=(0, 1, 2))[:, None] * kernel) @ kept[1]), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("few_test_images")
@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
def test_blocks_of_single_pixels_learn_round_refine_and_count(pretrained, tmp_path, capsys, tied):
    """Plain channel pruning, in some of the layers or in all."""
    config = get_config()
    mixed = {"block_by_layer": (("block01/expand", 2), ("block01/project", 2))} if tied else {}
    learn = dataclasses.replace(
        config.learn, block=1, block_by_map=(), tied=tied, penalty="macs" if tied else "fcmask", **mixed
    )
    short = dataclasses.replace(config.pretrain, steps=2)
    config = dataclasses.replace(
        config, phases=("pretrain", "learn", "refine"), pretrain=short, learn=learn, refine=short
    )
    summary = train(config, str(tmp_path / "run"), init=str(pretrained))
    assert [phase["name"] for phase in summary["phases"]] == ["learn", "refine"]
    assert summary["macs"]["ratio"] == pytest.approx(learn.target_macs, rel=0.02)
    assert summary["macs"]["ratio"] < 1
    for layer in summary["layers"]:
        if layer["block"] == 1:
            assert layer["form"] != "bands"
            assert {len(of_side) for of_side in layer["kept_counts"].values() if of_side} == {2}

    with pytest.raises(SystemExit) as stop:
        fdjax_command(["blocks", "--checkpoint", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert "weights have been trained under masks" in capsys.readouterr().err
