"""Filter pruning: scores against other formulations, budgets against enumeration, networks that shrink exactly."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
from hypothesis import given
from hypothesis import strategies as st

from fdjax.checkpoint import find_checkpoint
from fdjax.checkpoints.filter_pruning import block_losses, contributions, inner_maps, layer_window
from fdjax.checkpoints.imported import save_trained
from fdjax.commands.main import fdjax_command
from fdjax.config import Config, DataConfig, DistillConfig, LearnConfig, ModelConfig, WeightPhaseConfig
from fdjax.data import describe_source
from fdjax.errors import UserError
from fdjax.graph.counting import network_macs
from fdjax.ops.dct import dct_basis
from fdjax.pruning.filters import (
    METHODS,
    Measured,
    block_macs,
    choose_rates,
    haar,
    keep_filters,
    one_share,
    prunable,
    rates,
    strongest,
)
from fdjax.training.build import build_network, collection_of
from fdjax.training.restore import Past, restore
from fdjax.training.run import train
from fdjax.training.summary import describe
from fdjax.zoo import FCMASK, MobileNet, ResNet, resnet
from tests.frozen_networks import HASTE, random_variables, raw_images, with_preprocessing
from tests.graph_networks import network_for


def measured(seed: int, filters: int = 6, size: tuple[int, int] = (4, 6), images: int = 3) -> Measured:
    rng = np.random.default_rng(seed)
    return Measured(
        rng.normal(size=(3, 3, 2, filters)),
        np.maximum(rng.normal(size=(images, *size, filters)), 0),
        rng.normal(size=(40, filters)),
    )


def test_l1_is_the_sum_of_absolute_weights() -> None:
    found = METHODS["l1"](measured(0))
    kernel = measured(0).kernel
    expected = [sum(abs(kernel[i, j, c, d]) for i in range(3) for j in range(3) for c in range(2)) for d in range(6)]
    np.testing.assert_allclose(found, expected)


def test_the_dct_score_agrees_with_our_own_basis() -> None:
    given_maps = measured(1, size=(4, 4))
    basis = dct_basis(4, np.float64)
    coefs = np.einsum("nab,iabd->ind", basis, given_maps.maps)
    np.testing.assert_allclose(METHODS["dct"](given_maps), np.abs(coefs).sum(axis=1).mean(axis=0))


def test_the_haar_transform_is_the_dct_of_2x2_blocks() -> None:
    maps = np.random.default_rng(0).normal(size=(4, 6, 3))
    low, high = haar(maps)
    blocks = maps.reshape(2, 2, 3, 2, 3).transpose(0, 2, 1, 3, 4).reshape(6, 2, 2, 3)
    coefs = np.einsum("nij,bijc->nbc", dct_basis(2, np.float64), blocks)
    np.testing.assert_allclose(low, coefs[0])
    # The same bands, the signs and order apart.
    np.testing.assert_allclose(np.sort(np.abs(high), axis=0), np.sort(np.abs(coefs[1:].reshape(18, 3)), axis=0))
    np.testing.assert_allclose(np.square(low).sum(0) + np.square(high).sum(0), np.square(maps).sum((0, 1)))
    assert haar(np.ones((3, 5, 1)))[0].shape == (6, 1)


def test_random_scores_are_an_order_of_the_layers_own() -> None:
    found = [METHODS["random"](measured(seed, filters=40)) for seed in (0, 0, 1)]
    assert sorted(found[0]) == [*range(40)]
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


def test_fpwt_by_pairwise_distances() -> None:
    layer = measured(2)
    found = METHODS["fpwt"](layer)
    low, high = haar(layer.maps.mean(axis=0))
    shares = np.square(low).sum(0) / (np.square(low).sum(0) + np.square(high).sum(0))
    expected = np.zeros(6)
    for band, share in ((low, shares), (high, 1 - shares)):
        cosine = np.abs(1 - scipy.spatial.distance.squareform(scipy.spatial.distance.pdist(band.T, "cosine")))
        expected += share * (cosine.sum(axis=1) - 1) / 5
    np.testing.assert_allclose(found, 1 - expected)


def test_fpwt_finds_the_filter_that_repeats_another() -> None:
    layer = measured(3, size=(8, 8))
    maps = layer.maps.copy()
    maps[..., 4] = 2 * maps[..., 1]
    maps[..., 5] = 0
    scores = METHODS["fpwt"](dataclasses.replace(layer, maps=maps))
    assert set(np.argsort(scores)[:3]) == {1, 4, 5} and ((scores >= 0) & (scores <= 1)).all()


@given(st.integers(0, 50))
def test_thinet_removes_what_changes_the_output_least_step_by_step(seed: int) -> None:
    layer = measured(seed, filters=5)
    order = np.argsort(METHODS["thinet"](layer))
    assert sorted(order) == list(range(5))
    for place in range(5):
        removed = list(order[:place])

        def change(channel: int, removed=removed) -> float:
            return float(np.square(layer.contributions[:, [*removed, channel]].sum(axis=1)).sum())

        rest = [channel for channel in range(5) if channel not in removed]
        assert change(order[place]) == pytest.approx(min(map(change, rest)))


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.data())
def test_the_strongest_filters_stay(scores: list[float], data) -> None:
    count = data.draw(st.integers(1, len(scores)))
    kept = strongest(np.array(scores), count)
    assert len(kept) == count and (np.diff(kept) > 0).all()
    assert min(np.array(scores)[kept]) >= max(np.delete(scores, kept), default=-np.inf)


# Budgets

GRAPH = network_for(ResNet("resnet20", 10), (32, 32, 3))


def macs_left(left: dict[str, int]) -> int:
    """By the arithmetic of the paper on residual networks: two 3x3 layers a block, the first at its output's size."""
    total = 32 * 32 * 9 * 3 * 16
    for place, inner in enumerate(left.values()):
        stage = place // 3
        channels, outputs, side = 16 << max(0, (place - 1) // 3), 16 << stage, 32 >> stage
        total += side**2 * 9 * inner * (channels + outputs)
    return total


@given(st.floats(0.1, 1))
def test_one_share_comes_as_near_as_shares_can(target: float) -> None:
    left = one_share(GRAPH, target)
    dense = macs_left({name: layers[0].out_channels for name, layers in prunable(GRAPH).items()})
    assert dense == network_macs(GRAPH, {}).to_dict()["dense"]
    tried = [
        {name: max(1, round(share * layers[0].out_channels)) for name, layers in prunable(GRAPH).items()}
        for share in np.linspace(0, 1, 65)
    ]
    nearest = min(abs(macs_left(some) / dense - target) for some in tried)
    assert abs(macs_left(left) / dense - target) <= nearest + 1e-12


@pytest.mark.parametrize("variant", ["resnet20", "resnet50"])
def test_a_blocks_macs_are_those_of_the_smaller_network(variant: str) -> None:
    pixels = 32 if variant == "resnet20" else 64
    network = ResNet(variant, 10, block=1)
    graph = network_for(network, (pixels, pixels, 3))
    widths = [layers[0].out_channels for layers in prunable(graph).values()]
    # The first, one that halves the map, and the last.
    for place in (0, 3, len(widths) - 1):
        name = [*prunable(graph)][place]
        smaller = [*widths[:place], 5, *widths[place + 1 :]]
        saved = block_macs(graph, name, widths[place]) - block_macs(graph, name, 5)
        new = network_for(dataclasses.replace(network, inner_channels=tuple(smaller)), (pixels, pixels, 3))
        assert (
            network_macs(graph, graph.full_counts()).to_dict()["dense"] - saved
            == (network_macs(new, new.full_counts()).to_dict()["dense"])
        )


def test_rates_are_the_best_of_all_on_the_hull() -> None:
    """Against enumeration on a network of three blocks: no choice with as few MACs loses less than the one found."""
    variant = resnet.Variant((1, 1, 1), 8, 3, 1, False, 8, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.VARIANTS, "three", variant)
        graph = network_for(ResNet("three", 10), (8, 8, 3))
    rng = np.random.default_rng(0)
    losses = {name: np.sort(rng.exponential(size=len(rates(layers[0].out_channels))))[::-1].tolist()
              for name, layers in prunable(graph).items()}  # fmt: skip
    dense = sum(layer.dense_macs for layer in graph.counted_layers.values())

    def cost(left: dict[str, int]) -> tuple[float, float]:
        total = sum(
            losses[name][rates(prunable(graph)[name][0].out_channels).index(count)] for name, count in left.items()
        )
        saved = sum(
            block_macs(graph, name, prunable(graph)[name][0].out_channels) - block_macs(graph, name, count)
            for name, count in left.items()
        )
        return total, (dense - saved) / dense

    every = [
        cost(dict(zip(losses, counts, strict=True)))
        for counts in itertools.product(*(rates(layers[0].out_channels) for layers in prunable(graph).values()))
    ]
    for target in (0.3, 0.5, 0.8):
        found = cost(choose_rates(graph, losses, target))
        assert found[1] <= target
        assert all(lost >= found[0] - 1e-9 for lost, ratio in every if ratio <= found[1])


def test_what_cannot_be_reached_or_pruned_is_said() -> None:
    with pytest.raises(ValueError, match=r"can reach 0\.0\d+x of the MACs, not 0.01x"):
        one_share(GRAPH, 0.01)
    with pytest.raises(ValueError, match=r"can reach 0\.\d+x of the MACs, not 0.01x"):
        choose_rates(GRAPH, {name: [0.0] * 8 for name in prunable(GRAPH)}, 0.01)
    with pytest.raises(ValueError, match="mobilenetv2_small has none; prune its channels"):
        prunable(network_for(MobileNet("mobilenetv2_small", 10, block=2), (28, 28, 1)))
    with pytest.raises(ValueError, match="resnext29 has groups"):
        prunable(network_for(ResNet("resnext29", 10), (32, 32, 3)))


# Networks


@pytest.fixture(scope="module", params=["basic", "bottleneck"])
def trained(request):
    variants = {
        "basic": resnet.Variant((1, 1), 8, 3, 1, False, 8, 0),
        "bottleneck": resnet.Variant((1, 1), 8, 3, 1, False, 8, 2),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, variant in variants.items():
            patch.setitem(resnet.VARIANTS, name, variant)
        network = ResNet(request.param, 5, block=1, mode="off")
        graph = with_preprocessing(network_for(network, (8, 8, 3)))
        yield network, graph, {**random_variables(network, graph, 0), FCMASK: collection_of(graph, graph.full_counts())}


def logits(network: ResNet, variables: dict, images: np.ndarray) -> np.ndarray:
    graph = network_for(network, (8, 8, 3))
    variables = {**variables, FCMASK: collection_of(graph, graph.full_counts())}
    x = jnp.asarray(images, jnp.float32) / 100
    return np.asarray(jax.jit(network.apply, compiler_options=HASTE)(variables, x))


def test_the_smaller_network_is_the_larger_one_with_silent_filters(trained) -> None:
    network, graph, variables = trained
    rng = np.random.default_rng(0)
    kept = {
        layer.name: np.sort(rng.permutation(layer.out_channels)[:count])
        for layers, count in zip(prunable(graph).values(), (3, 10), strict=True)
        for layer in layers
    }
    smaller = keep_filters(graph, variables, kept)
    silent = jax.tree.map(np.array, variables)
    for name, filters in kept.items():
        gone = np.setdiff1d(np.arange(silent["params"][name.split("/")[0]][f"{name.split('/')[1]}_norm"]["bias"].size),
                            filters)  # fmt: skip
        norm = silent["params"][name.split("/")[0]][f"{name.split('/')[1]}_norm"]
        norm["scale"][gone] = norm["bias"][gone] = 0
    images = raw_images(graph, 2, 0)
    found = logits(dataclasses.replace(network, inner_channels=(3, 10)), smaller, images)
    np.testing.assert_allclose(found, logits(network, silent, images), rtol=2e-4, atol=2e-4)
    # What it was made of is as it was.
    assert variables["params"]["block00"]["conv1"]["kernel"].shape[-1] == 8


def test_contributions_sum_to_the_next_layers_output(trained) -> None:
    network, graph, variables = trained
    images = raw_images(graph, 4, 0)
    maps = inner_maps(network, graph, variables, images)
    layer = prunable(graph)["block01"][0]
    following = graph.layers["block01/conv2"]
    kernel = np.asarray(variables["params"]["block01"]["conv2"]["kernel"])
    found = contributions(maps[layer.name], kernel, layer_window(graph, following), np.random.default_rng(5))
    whole = jax.lax.conv_general_dilated(
        maps[layer.name], kernel, following.stride, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    rng = np.random.default_rng(5)
    rows, columns = (rng.integers(0, length, 40) for length in following.out_size)
    outputs = rng.integers(0, kernel.shape[-1], 40)
    expected = np.asarray(whole)[np.repeat(np.arange(4), 10), rows, columns, outputs]
    np.testing.assert_allclose(found.sum(axis=1), expected, rtol=1e-3, atol=1e-4)


def test_a_block_that_keeps_all_filters_loses_nothing(trained) -> None:
    network, graph, variables = trained
    images = raw_images(graph, 16, 0)
    scores = {layer.name: np.arange(layer.out_channels) for layers in prunable(graph).values() for layer in layers}
    losses = block_losses(network, graph, variables, scores, images, np.arange(16) % 5)
    for lost in losses.values():
        assert lost[-1] == pytest.approx(0, abs=1e-5) and max(map(abs, lost[:-1])) > 1e-3


# The command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A ResNet-20 of half the width, with random weights, as a run that has pretrained leaves it."""
    folder = tmp_path_factory.mktemp("resnet20")
    config = Config(model=ModelConfig(name="resnet20", width=0.5), learn=LearnConfig(block=1))
    shape, classes = describe_source(config.data.name)
    network, graph = build_network(config, shape, len(classes))
    graph = dataclasses.replace(graph, input_mean=(73.0,), input_std=(90.0,), class_names=classes)
    save_trained(folder, config, graph, random_variables(network, graph, 0), Past(dense_top1=0.5))
    return folder


@pytest.mark.parametrize("rates", ["one", "search"])
def test_a_pruned_checkpoint_is_a_smaller_network_that_can_be_refined(checkpoint, tmp_path, quick_runs, rates) -> None:
    out, report = tmp_path / "pruned", tmp_path / "report.json"
    flags = ["--images", "32", "--eval-limit", "64", "--target-macs", "0.5", "--rates", rates]
    asked = ["prune", "--checkpoint", str(checkpoint), "--method", "fpwt", *flags]
    assert fdjax_command([*asked, "--out", str(out), "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    # The accuracy of pretraining is that on all test images, with which a sample is not compared.
    assert found["num_examples"] == 64 and found["dense_top1"] is None
    assert found["ratio"] <= 0.5 if rates == "search" else found["ratio"] == pytest.approx(0.5, abs=0.05)
    restored = restore(*find_checkpoint(str(out)))
    assert sum(layer.dense_macs for layer in restored.graph.counted_layers.values()) == found["macs"]["after"]
    assert list(restored.config.model.inner_channels) == [n["after"] for n in found["filters"].values()]
    assert restored.finished_phases() == ["pretrain"]
    if rates == "search":
        return
    config = dataclasses.replace(
        restored.config, phases=("refine",), refine=WeightPhaseConfig(steps=2), data=DataConfig(batch_size=16)
    )
    taught = dataclasses.replace(config, distill=DistillConfig(weight=0.5))
    with pytest.raises(UserError, match="filters have been removed from the network of --init"):
        train(taught, str(tmp_path / "taught"), init=str(out))
    summary = train(config, str(tmp_path / "refined"), init=str(out))
    assert summary["macs"]["dense"] == found["macs"]["after"] and summary["dense_top1"] == 0.5
    assert (summary["pruned_by"], summary["unpruned_macs"]) == ("fpwt", found["macs"]["before"])
    assert f"dense:  50.00% top-1 at {found['macs']['before'] / 1e6:.2f} M MACs" in describe(summary)
    assert (
        fdjax_command(
            ["freeze", "--no-time", "--checkpoint", str(tmp_path / "refined"), "--out", str(tmp_path / "frozen")]
        )
        == 0
    )
    again = ["prune", "--checkpoint", str(tmp_path / "refined"), "--method", "l1", *flags[:4], "--target-macs", "0.8"]
    assert fdjax_command([*again, "--out", str(tmp_path / "twice")]) == 0
    past = restore(*find_checkpoint(str(tmp_path / "twice"))).done
    assert (past.dense_top1, past.unpruned_macs, past.pruned_by) == (0.5, found["macs"]["before"], "l1")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--method", "l2", "--target-macs", "0.5"), "no pruning method 'l2'; accepted are channel"),
        (("--method", "l1", "--target-macs", "0.01"), "not 0.01x"),
        (("--method", "l1", "--percentile", "30"), "give --target-macs RATIO"),
        (("--method", "l1", "--target-macs", "0.5", "--out", "."), "is not empty"),
        (("--method", "l1", "--target-macs", "0.5", "--scope", "global"), "--scope is for masks, and --method l1"),
        (("--method", "l1", "--target-macs", "0.5", "--convention", "paper"), "--convention is for masks"),
        (("--method", "l1", "--target-macs", "0.5", "--block", "2"), "--block is for masks"),
        (("--method", "l1", "--target-macs", "0.5", "--images", "0"), "--images must be at least 1, got 0"),
        (("--method", "l1", "--target-macs", "0.5", "--eval-limit", "0"), "--eval-limit must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(checkpoint, tmp_path, capsys, monkeypatch, flags, says) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("")
    out = () if "--out" in flags else ("--out", "new")
    with pytest.raises(SystemExit) as stop:
        fdjax_command(["prune", "--checkpoint", str(checkpoint), "--images", "8", *flags, *out])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1 and says in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
