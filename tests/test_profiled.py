"""Profiled pruning: masks and counts against brute force, masks of any form on a network, and the two commands."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fdjax.checkpoint import find_checkpoint
from fdjax.checkpoints import given_masks
from fdjax.checkpoints.calibrate import evaluation_sample, side_energies
from fdjax.checkpoints.freeze import hard_masks_of
from fdjax.checkpoints.given_masks import COEF_MASKS, GivenMasks
from fdjax.checkpoints.profiling import sensitivity_counts
from fdjax.checkpoints.prune import mask_flags
from fdjax.commands.main import fdjax_command
from fdjax.commands.train import TrainArguments
from fdjax.config import WeightPhaseConfig, load_config
from fdjax.data import load_dataset, normalize, read_pictures
from fdjax.data.batches import seeded_permutation
from fdjax.errors import UserError
from fdjax.graph.counting import network_macs
from fdjax.graph.masks import SIDES
from fdjax.ops.fcmask import coef_mask
from fdjax.ops.macs import explicit_mask_macs, pointwise_macs
from fdjax.pruning.block_choice import coefficient_energy
from fdjax.pruning.profiled import (
    METHODS,
    SCOPES,
    Pruned,
    band_scores,
    contiguous_share,
    gate_masks,
    mask_energies,
    mask_macs,
    masks_of_counts,
    prefix_counts,
    prune_share,
    prune_to_target,
    score,
    whole_masks,
)
from fdjax.training.build import build_network, collection_of, hard_network
from fdjax.training.restore import evaluate_restored, restore
from fdjax.training.run import train
from fdjax.zoo import FCMASK
from tests.fake_runs import DENSE_MACS, make_run
from tests.frozen_checkpoints import CONFIG, write_checkpoint
from tests.frozen_networks import HASTE, random_variables, raw_images, with_preprocessing
from tests.small_network import small

GRAPHS = {
    "both": small(width=0.3),
    "tied": small(width=0.3, tied=True),
}
SHARES = st.floats(0, 1)
SEEDS = st.integers(0, 2**31)


def energies(graph, seed: int) -> dict[str, np.ndarray]:
    """Falling with frequency, on the whole; few values, so that some are equal."""
    rng = np.random.default_rng(seed)
    return {
        path: rng.integers(0, 9, (num_coefs, channels)) / (1 + np.arange(num_coefs)[:, None] // 2)
        for path, (channels, num_coefs) in graph.mask_sizes.items()
    }


def pieces(method: str, mask: np.ndarray) -> np.ndarray:
    """What of a mask is pruned as one piece: a truth value each, after making sure that it is one piece."""
    axis = {"channel": 0, "random_channel": 0, "coefficient": 1}.get(method)
    if axis is None:
        return mask.ravel()
    assert (mask.any(axis=axis) == mask.all(axis=axis)).all()
    return np.asarray(mask.any(axis=axis))


# Masks


@pytest.mark.parametrize("method", METHODS)
@given(seed=SEEDS, share=SHARES)
def test_of_every_side_that_share_goes_and_the_highest_scores_stay(method, seed, share):
    graph = GRAPHS["both"]
    scores = score(method, energies(graph, seed))
    masks = prune_share(graph, scores, share)
    assert masks.keys() == graph.mask_sizes.keys()
    for path, (channels, num_coefs) in graph.mask_sizes.items():
        assert masks[path].shape == (num_coefs, channels) and masks[path].dtype == bool
        kept, of = pieces(method, masks[path]), scores[path].ravel()
        assert abs(len(kept) - kept.sum() - share * len(kept)) <= 0.5 or kept.sum() == 1
        assert of[kept].min() >= of[~kept].max(initial=-np.inf)


@pytest.mark.parametrize("method", METHODS)
@given(seed=SEEDS, share=SHARES)
def test_of_the_network_that_share_goes_and_every_side_keeps_its_strongest_piece(method, seed, share):
    graph = GRAPHS["tied"]
    measured = energies(graph, seed)
    masks = prune_share(graph, score(method, measured), share, "global")
    kept = np.concatenate([pieces(method, mask) for mask in masks.values()])
    spared = len(masks)  # At most one piece a side is kept against its score.
    assert -0.5 <= kept.sum() - (1 - share) * len(kept) <= spared + 0.5
    assert all(mask.any() for mask in masks.values())
    # One threshold on scores over the mean of their side; the strongest piece of each side aside.
    threshold = {"kept": np.inf, "pruned": -np.inf}
    for path, mask in masks.items():
        of = METHODS[method](measured[path]).ravel()
        relative, stays = of / (of.mean() or 1), pieces(method, mask)
        if stays.sum() > 1:
            threshold["kept"] = min(threshold["kept"], relative[stays].min())
        threshold["pruned"] = max(threshold["pruned"], relative[~stays].max(initial=-np.inf))
    assert threshold["kept"] >= threshold["pruned"]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
@given(seed=SEEDS, shares=st.tuples(SHARES, SHARES))
def test_what_a_higher_share_keeps_a_lower_one_keeps_too(method, scope, seed, shares):
    graph = GRAPHS["tied"]
    scores = score(method, energies(graph, seed))
    fewer, more = (prune_share(graph, scores, share, scope) for share in sorted(shares))
    assert all((more[path] <= fewer[path]).all() for path in more)


@given(seed=SEEDS, share=SHARES, scope=st.sampled_from(SCOPES))
def test_bands_are_low_frequency_prefixes_and_channels_are_whole(seed, share, scope):
    graph = GRAPHS["both"]
    measured = energies(graph, seed)
    for method in ("band", "channel", "random_channel"):
        masks = prune_share(graph, score(method, measured), share, scope)
        counts = prefix_counts(masks)
        assert counts is not None
        for path, mask in masks.items():
            for channel, count in enumerate(counts[path]):
                assert mask[:, channel].tolist() == [n < count for n in range(len(mask))]
                assert method == "band" or count in (0, len(mask))


@given(energy=st.lists(st.lists(st.integers(0, 20), min_size=3, max_size=3), min_size=4, max_size=4))
def test_band_keeps_the_most_energy_of_all_prefixes_with_as_many_coefficients(energy):
    """Brute force over all kept counts of three channels, at every threshold that lies between two scores."""
    energy = np.array(energy, float)
    scores = band_scores(energy)
    kept_energy = np.pad(energy.cumsum(axis=0), ((1, 0), (0, 0)))  # [count, channel]
    best: dict[int, float] = {}
    for counts in itertools.product(range(5), repeat=3):
        kept = sum(kept_energy[count, channel] for channel, count in enumerate(counts))
        best[sum(counts)] = max(best.get(sum(counts), 0), kept)
    values = np.unique(scores)
    for threshold in (values[1:] + values[:-1]) / 2:
        above = scores > threshold
        counts = prefix_counts({"side": above})
        assert counts is not None
        assert energy[above].sum() == pytest.approx(best[int(above.sum())])


def test_energies_of_sides_that_share_a_mask_are_averaged_as_shares():
    graph = GRAPHS["tied"]
    rng = np.random.default_rng(0)
    measured, expected = {}, {}
    for name in graph.blocks:
        for side in SIDES:
            path = graph.mask_of(name, side)
            if path:
                channels, num_coefs = graph.mask_sizes[path]
                energy = rng.uniform(0, 100, (num_coefs, channels))
                measured[name, side] = {graph.blocks[name]: energy}
                expected.setdefault(path, []).append(energy / energy.sum())
    found = mask_energies(graph, measured)
    assert len(expected["block00/wide"]) == 2 and len(expected["head/input"]) == 1
    for path, sides in expected.items():
        np.testing.assert_allclose(found[path], sum(sides) / len(sides))


# Counts


def loops(size, block, input_mask, output_mask) -> tuple[int, int]:
    """(products, transforms), block by block, coefficient by coefficient, channel by channel."""
    products = transforms = 0
    for _ in itertools.product(range(0, size[0], block), range(0, size[1], block)):
        for n in range(block * block):
            for c in range(input_mask.shape[1]):
                products += sum(bool(input_mask[n, c] and kept) for kept in output_mask[n])
            transforms += block * block * int(input_mask[n].sum() + output_mask[n].sum())
    return products, transforms


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), SEEDS)
def test_any_masks_are_counted_as_loops_count_them(block, height, width, channels, features, seed):
    rng = np.random.default_rng(seed)
    masks = [rng.random((block**2, of)) < 0.6 for of in (channels, features)]
    products, transforms = loops((height, width), block, *masks)
    input_mask, output_mask = masks
    pruned, paper = explicit_mask_macs((height, width), block, input_mask, output_mask)
    assert paper == products + transforms
    whole = all((mask.any(axis=0) == mask.all(axis=0)).all() for mask in masks)
    if whole:  # Channels are multiplied pixel by pixel: nothing is padded.
        products = height * width * int(masks[0].any(axis=0).sum() * masks[1].any(axis=0).sum())
    assert pruned == products
    released = explicit_mask_macs((height, width), block, input_mask, output_mask, released=True)
    assert released == (pruned, pruned if whole else paper)


@given(st.integers(1, 3), st.integers(1, 7), st.booleans(), SEEDS)
def test_prefixes_are_counted_as_kept_counts_are(block, side, released, seed):
    rng = np.random.default_rng(seed)
    counts = [rng.choice([0, int(rng.integers(0, block**2 + 1)), block**2], channels) for channels in (4, 3)]
    input_mask, output_mask = (np.arange(block**2)[:, None] < count for count in counts)
    macs = pointwise_macs((side, side), block, *counts, released=released)
    assert explicit_mask_macs((side, side), block, input_mask, output_mask, released) == (macs.pruned, macs.paper_total)


def sides_of(graph, layer, masks) -> list[np.ndarray]:
    """The masks [N, channels] of both sides of a wrapped layer; ones where it has none."""
    found = []
    for side, channels in zip(SIDES, (layer.in_channels, layer.out_channels), strict=True):
        path = graph.mask_of(layer.name, side)
        found.append(masks[path] if path else np.ones((graph.blocks[layer.name] ** 2, channels), bool))
    return found


@pytest.mark.parametrize("name", GRAPHS)
def test_a_network_is_the_sum_of_its_layers(name):
    """Masks that are no prefixes, against loops over layers; prefixes, against the count of kept counts."""
    graph = GRAPHS[name]
    masks = prune_share(graph, score("channel_coefficient", energies(graph, 3)), 0.4)
    assert prefix_counts(masks) is None
    pruned = paper = 0
    for layer in graph.counted_layers.values():
        products, transforms = layer.dense_macs, 0
        if layer.name in graph.blocks:
            block = graph.blocks[layer.name]
            products, transforms = loops((block, block), block, *sides_of(graph, layer, masks))
            blocks = layer.in_size[0] * layer.in_size[1] // block**2
            products, transforms = blocks * products, blocks * transforms
        pruned, paper = pruned + products, paper + products + transforms
    macs = mask_macs(graph, masks)
    assert (macs.pruned, macs.paper_total, macs.total) == (pruned, paper, None)
    with pytest.raises(ValueError, match="only those have a dense form"):
        macs.ratio("total")

    counts = prefix_counts(prune_share(graph, score("band", energies(graph, 3)), 0.4))
    assert counts is not None
    fields = network_macs(graph, counts).to_dict()
    found = mask_macs(graph, masks_of_counts(graph, counts)).to_dict()
    assert all(found[key] == fields[key] for key in ("dense", "pruned", "paper_total", "total", "ratio"))


@pytest.mark.parametrize("name", ["both", "tied"])
def test_the_gate_releases_what_is_no_cheaper_by_the_papers_count(name):
    graph = GRAPHS[name]
    masks = prune_share(graph, score("channel_coefficient", energies(graph, 1)), 0.35)
    gated, released = gate_masks(graph, masks, "paper")
    assert released and len(released) < len(graph.blocks)
    after = mask_macs(graph, gated, released)
    assert after.paper_total < mask_macs(graph, masks).paper_total
    for of in graph.masks.values():
        path = of.path
        for layer, _ in of.sides:
            if layer in released:
                assert (gated[path] == masks[path].any(axis=0)).all()
            else:
                assert (gated[path] == masks[path]).all()
    # Releasing any other layer (a block, when tied), or none of these, costs more or as much.
    groups = [tuple(layer for layer, _ in of.sides) for of in graph.masks.values()]
    for group in dict.fromkeys(groups):
        paths = {of.path for of in graph.masks.values() if {layer for layer, _ in of.sides} & {*group}}
        turned = {*released} ^ {*group}
        source = masks if group[0] in released else {p: np.tile(m.any(axis=0), (len(m), 1)) for p, m in masks.items()}
        other = {**gated, **{path: source[path] for path in paths}}
        assert mask_macs(graph, other, turned).paper_total >= after.paper_total


def test_without_transforms_nothing_is_released_and_others_have_no_dense_form():
    graph = GRAPHS["tied"]
    masks = prune_share(graph, score("channel_coefficient", energies(graph, 1)), 0.2)
    assert gate_masks(graph, masks, "bare") == (masks, ())
    with pytest.raises(ValueError, match="only those have a dense form"):
        gate_masks(graph, masks, "total")


# Targets


def explicit_ratio(graph, masks) -> float:
    """MACs over dense MACs, no transforms."""
    pruned = 0
    for name, layer in graph.counted_layers.items():
        if name not in graph.blocks:
            pruned += layer.dense_macs
            continue
        inputs, outputs = sides_of(graph, layer, masks)
        pruned += explicit_mask_macs(layer.in_size, graph.blocks[name], inputs, outputs)[0]
    return pruned / sum(layer.dense_macs for layer in graph.counted_layers.values())


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=8)
@given(seed=st.integers(0, 9), targets=st.tuples(st.floats(0.65, 1), st.floats(0.65, 1)))
def test_a_lower_target_has_fewer_macs_and_no_share_comes_nearer(method, seed, targets):
    graph = GRAPHS["tied"]
    scores = score(method, energies(graph, seed))
    low, high = (prune_to_target(graph, scores, target) for target in sorted(targets))
    assert low.macs.pruned <= high.macs.pruned and low.share >= high.share
    tried = [explicit_ratio(graph, prune_share(graph, scores, share)) for share in np.linspace(0, 1, 21)]
    for target, found in zip(sorted(targets), (low, high), strict=True):
        assert abs(found.macs.ratio("bare") - target) <= min(abs(ratio - target) for ratio in tried) + 1e-12


@pytest.mark.parametrize("convention", ["paper", "total"])
@pytest.mark.parametrize("name", GRAPHS)
def test_bands_meet_a_target_with_transforms_after_the_gate(name, convention):
    graph = GRAPHS[name]
    found = prune_to_target(graph, score("band", energies(graph, 0)), 0.75, convention=convention)
    assert found.macs.ratio(convention) == pytest.approx(0.75, rel=0.02)
    counts = prefix_counts(found.masks)
    assert counts is not None
    assert found.released
    for layer in found.released:
        for side in SIDES:
            assert np.isin(graph.side_counts(counts, layer, side), (0, graph.blocks[layer] ** 2)).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_target_out_of_reach_is_refused_with_the_lowest(method):
    graph = GRAPHS["both"]
    scores = score(method, energies(graph, 0))
    one_piece = {
        path: np.isin(np.arange(of.size), of.argmax()).reshape(of.shape) & np.ones(graph.mask_sizes[path][::-1], bool)
        for path, of in scores.items()
    }
    lowest = mask_macs(graph, one_piece).ratio("bare")
    with pytest.raises(ValueError, match=f"cannot be met: .* {lowest:.3f}x of the MACs remain"):
        prune_to_target(graph, scores, lowest - 1e-6)
    assert prune_to_target(graph, scores, lowest).macs.ratio("bare") == pytest.approx(lowest)


# Contiguity


def test_contiguity_of_masks_counted_by_hand():
    """2x2 blocks: coefficients 1 and 2 are one diagonal."""
    masks = {
        "a": np.array([[1, 1, 1, 0, 1], [1, 0, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 1]], bool),
        "b": np.array([[1, 0], [0, 1], [0, 0], [0, 0]], bool),
    }
    found = contiguous_share(masks)
    # Of a: whole, {0, 2}, {0, 1}, nothing, {0, 3}; of b: {0}, {1}.
    assert (found["channels"], found["partial"]) == (7, 5)
    assert found["contiguous"] == pytest.approx(4 / 7)
    assert found["contiguous_by_diagonal"] == pytest.approx(5 / 7)
    assert found["partial_contiguous"] == pytest.approx(2 / 5)
    assert found["partial_by_diagonal"] == pytest.approx(3 / 5)
    assert found["partial_by_chance"] == pytest.approx((3 / 6 + 2 / 4) / 5)
    assert [side["mask"] for side in found["sides"]] == ["a", "b"]


def test_without_partial_channels_there_is_no_chance():
    found = contiguous_share({"a": np.ones((4, 3), bool)})
    assert (found["contiguous"], found["partial"], found["partial_contiguous"]) == (1, 0, 0)


def test_sensitivity_takes_every_count_or_every_diagonal():
    assert sensitivity_counts(4) == [1, 2, 3]
    assert sensitivity_counts(16) == [1, 3, 6, 10, 13, 15]


# On a network


@pytest.fixture(scope="module")
def subject():
    """A network with masks on both sides, variables and images, and what it makes of them under given masks."""
    config = dataclasses.replace(CONFIG, learn=dataclasses.replace(CONFIG.learn, tied=False, levels="all"))
    network, graph = build_network(config, (28, 28, 1), 10)
    graph = with_preprocessing(graph)
    images = normalize(jnp.asarray(raw_images(graph, 3, 0)), graph.input_mean, graph.input_std)
    variables = random_variables(network, graph, 0)
    apply = jax.jit(GivenMasks(network, graph).apply)

    def under(masks) -> np.ndarray:
        given = {path: jnp.asarray(mask, jnp.float32) for path, mask in masks.items()}
        return np.asarray(apply({**variables, COEF_MASKS: given}, images))

    return network, graph, variables, images, under


def own(network, variables, images, fcmask) -> np.ndarray:
    return np.asarray(jax.jit(network.apply)({**variables, FCMASK: fcmask}, images))


def test_whole_masks_leave_the_dense_network(subject):
    network, graph, variables, images, under = subject
    nothing_pruned = collection_of(graph, graph.full_counts())
    dense = own(dataclasses.replace(network, mode="off"), variables, images, nothing_pruned)
    np.testing.assert_allclose(under(whole_masks(graph)), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["channel", "band"])
def test_prefixes_and_channels_give_the_network_with_hard_masks(subject, method):
    network, graph, variables, images, under = subject
    masks = prune_share(graph, score(method, energies(graph, 5)), 0.3)
    counts = prefix_counts(masks)
    assert counts is not None
    hard = own(hard_network(network, graph, counts), variables, images, collection_of(graph, counts))
    np.testing.assert_allclose(under(masks), hard, rtol=1e-4, atol=1e-4)
    assert np.abs(under(whole_masks(graph)) - hard).max() > 0.1


def test_masks_of_any_values_are_multiplied(subject):
    """The soft network is another formulation: what it makes of FCMasks, given as coefficient masks."""
    network, graph, variables, images, under = subject
    rng = np.random.default_rng(0)
    fcmasks = {path: jnp.asarray(rng.uniform(0.3, 1, n), jnp.float32) for path, (n, _) in graph.mask_sizes.items()}
    masks = {path: coef_mask(fcmasks[path], num_coefs) for path, (_, num_coefs) in graph.mask_sizes.items()}
    collection = jax.tree.map(jnp.asarray, collection_of(graph, graph.full_counts()))
    for path, mask in fcmasks.items():
        *folders, name = path.split("/")
        place = collection
        for folder in folders:
            place = place[folder]
        place[name] = mask
    soft = own(dataclasses.replace(network, mode="soft"), variables, images, collection)
    np.testing.assert_allclose(under(masks), soft, rtol=1e-4, atol=1e-4)


def test_energy_without_the_mean_taken_out_is_the_mean_square(subject):
    """About the mean and as it is, an energy differs in coefficient 0 alone, by the square of the channel's mean."""
    network, graph, variables, _, _ = subject
    images = raw_images(graph, 4, 1)
    about, plain = (
        side_energies(network, graph, {**variables, FCMASK: collection_of(graph, graph.full_counts())}, images, (2, 7),
                      about_mean=about_mean)
        for about_mean in (True, False)
    )  # fmt: skip
    # Of maps that the block divides: what is padded is no longer about the mean.
    for place, block in ((("block00/expand", "input"), 2), (("block01/project", "output"), 2), (("head", "input"), 7)):
        gained = plain[place][block] - about[place][block]
        scale = plain[place][block].max()
        assert (gained[0] > -1e-5 * scale).all() and gained[0].max() > 0.01 * scale
        np.testing.assert_allclose(gained[1:], 0, atol=1e-5 * scale)
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3)) + 3
    shifted = coefficient_energy(x, 2) - coefficient_energy(x - x.mean(axis=(0, 1, 2)), 2)
    np.testing.assert_allclose(shifted[0], jnp.square(x.mean(axis=(0, 1, 2))), rtol=1e-4)


# The commands


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """The workdir of a run that has pretrained, as far as a checkpoint says."""
    return write_checkpoint(tmp_path_factory.mktemp("profiled") / "pretrained", "pretrain")


SHORT = ["--images", "16", "--eval-limit", "60"]


@pytest.fixture(scope="module")
def report(pretrained, tmp_path_factory) -> dict:
    """Everything that `fdjax profile` measures, and the folder of its pictures."""
    folder = tmp_path_factory.mktemp("report")
    make_run(folder / "runs" / "learned")
    (folder / "runs" / "unfinished").mkdir()
    files = ["--json", "report.json", "--plot", "curves.png", "--sensitivity-plot", "sensitivity.png"]
    asked = [word if word.startswith("--") else str(folder / word) for word in files]
    runs = ["--runs", str(folder / "runs" / "learned"), str(folder / "runs" / "unfinished")]
    options = ["--ratios", "0.9", "0.7", "--resolutions", "14", "--contiguity", "--sensitivity", "--methods", *METHODS]
    assert fdjax_command(["profile", "--checkpoint", str(pretrained), *SHORT, *asked, *runs, *options]) == 0
    return {"folder": folder, **json.loads((folder / "report.json").read_text())}


def test_profile_reports_accuracy_by_method_and_ratio(report, pretrained):
    graph = restore(*find_checkpoint(str(pretrained))).graph
    assert report["settings"]["tied"] and report["settings"]["num_examples"] == 60
    assert report["settings"]["num_images"] == 16
    assert [*report["methods"]] == [*METHODS]
    assert report["dense"]["macs"] == network_macs(graph, graph.full_counts()).to_dict()["dense"]
    for method in ("channel", "band", "channel_coefficient"):
        points = report["methods"][method]
        assert [point["target"] for point in points] == [0.9, 0.7]
        for point in points:
            assert point["macs"]["bare_ratio"] == pytest.approx(point["target"], rel=0.02)
            assert point["macs"]["bare_ratio"] < point["macs"]["paper_ratio"]
            assert 60 * point["top1"] == pytest.approx(round(60 * point["top1"]), abs=1e-3)
            assert (point["macs"]["total"] is None) == (method == "channel_coefficient")
    for name in ("curves.png", "sensitivity.png"):
        assert (report["folder"] / name).read_bytes().startswith(b"\x89PNG")


def test_profile_lists_a_run_without_a_summary_and_reports_the_rest(report):
    (run,), (left_out,) = report["runs"], report["runs_left_out"]
    # The run has masks, 0.5x MACs, and 0.8 of them without transforms; ratios are to the dense MACs profiled here.
    scale = DENSE_MACS / report["dense"]["macs"]
    assert run["name"] == "learned" and run["kind"].startswith("learned: tied")
    assert [run[key] / scale for key in ("bare_ratio", "paper_ratio", "ratio")] == pytest.approx([0.4, 0.75, 0.5])
    assert (run["top1"], run["rounded_top1"], run["soft_top1"]) == (0.70, 0.40, 0.65)
    assert left_out["run"].endswith("unfinished") and "no readable summary.json" in left_out["reason"]


def test_profile_measures_smaller_input(report, pretrained):
    restored = restore(*find_checkpoint(str(pretrained)))
    (point,) = report["resolutions"]
    assert point["size"] == 14 and point["ratio"] == point["macs"] / report["dense"]["macs"]
    blocks_of_one = dataclasses.replace(restored.config.learn, block=1, block_by_map=())
    _, small = build_network(dataclasses.replace(restored.config, learn=blocks_of_one), (14, 14, 1), 10)
    assert point["macs"] == network_macs(small, small.full_counts()).to_dict()["dense"]
    # Of the same 60 images, resized one by one.
    rows = np.sort(seeded_permutation(2000, restored.config.seed, 7)[:60])
    dataset = load_dataset("fashion_mnist_subset")
    pictures = [Image.fromarray(dataset.test_images[row, ..., 0]) for row in rows]
    halves = np.stack([np.asarray(picture.resize((14, 14), Image.Resampling.BILINEAR)) for picture in pictures])
    x = normalize(jnp.asarray(halves[..., None]), restored.graph.input_mean, restored.graph.input_std)
    plain = jax.jit(restored.network.without_masks().apply, compiler_options=HASTE)
    logits = np.asarray(plain(restored.state.variables(), x))
    assert point["top1"] == pytest.approx(np.mean(logits.argmax(axis=1) == dataset.test_labels[rows]))


def test_profile_measures_contiguity_and_sensitivity(report):
    found = report["contiguity"]
    assert found["share"] == 0.3 and found["paper"] == 0.988
    assert 0 <= found["contiguous"] <= found["contiguous_by_diagonal"] <= 1
    # Masks of block02 cannot be tied: its two maps have different blocks.
    names = ["block00", "block01", "block02/expand", "block02/project", "block03", "head"]
    assert [row["name"] for row in report["sensitivity"]] == names
    for row in report["sensitivity"]:
        assert row["top1"][str(row["num_coefs"])] == report["dense"]["top1"]
        assert [int(count) for count in row["top1"]] == [*sensitivity_counts(row["num_coefs"]), row["num_coefs"]]


def test_contiguity_alone_draws_no_curves(pretrained, tmp_path, capsys):
    file = tmp_path / "report.json"
    asked = ["--contiguity", "--images", "16", "--eval-limit", "10", "--json", str(file)]
    assert fdjax_command(["profile", "--checkpoint", str(pretrained), *asked]) == 0
    report = json.loads(file.read_text())
    assert report["methods"] == {} and report["sensitivity"] is None
    assert f"{report['contiguity']['contiguous']:.1%} are low-frequency prefixes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--methods", "chanel"], "no pruning method 'chanel' (did you mean 'channel'?); accepted are channel, coef"),
        (["--ratios", "0"], "--ratios must be above 0 and at most 1, got 0"),
        (["--ratios", "1.5"], "got 1.5"),
        (
            ["--ratios", "0.001"],
            "no method reaches 0.001x MACs: with the strongest piece of every side",
        ),
        (["--resolutions", "14", "28"], "--resolutions must be from 1 to 27, below the network's 28, got 28"),
        (["--resolutions", "0"], "got 0"),
        (["--calibration", "/does/not/exist"], "the folder of pictures /does/not/exist is not there"),
        (["--images", "0"], "--images must be at least 1, got 0"),
        (["--eval-limit", "0"], "--eval-limit must be at least 1, got 0"),
        (["--block", "8"], "block 8 is larger than the 7x7 map of layer"),
        (["--json", "/does/not/exist/file.json"], "directory that exists"),
        (["--plot", "curves.txt"], "ends in .png"),
        (["--plot", "curves.png", "--contiguity"], "name the --methods"),
        (["--sensitivity-plot", "picture.png"], "give both"),
    ],
)
def test_profile_refuses_what_it_cannot_do_in_one_line(pretrained, capsys, arguments, expected):
    assert expected in refused(capsys, ["profile", "--checkpoint", str(pretrained), *SHORT[:2], *arguments])


def refused(capsys, arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        fdjax_command(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert len(said.splitlines()) == 1 and "Traceback" not in said
    return said


@pytest.fixture(scope="module")
def pruned(pretrained, tmp_path_factory) -> tuple[Path, dict]:
    """A pruned checkpoint, and the report of `fdjax prune`."""
    folder = tmp_path_factory.mktemp("pruned")
    out, report = folder / "out", folder / "report.json"
    flags = ["--method", "band", "--target-macs", "0.7", "--out", str(out), "--json", str(report)]
    assert fdjax_command(["prune", "--checkpoint", str(pretrained), *flags, "--images", "16"]) == 0
    return out, json.loads(report.read_text())


def test_prune_writes_a_checkpoint_that_meets_the_target(pruned, pretrained):
    out, report = pruned
    restored, before = restore(*find_checkpoint(str(out))), restore(*find_checkpoint(str(pretrained)))
    assert (restored.phase.name, restored.phase_step) == ("refine", 0)
    assert restored.macs().ratio == pytest.approx(0.7, rel=0.02)
    assert restored.macs().to_dict() == report["macs"]
    assert tuple(restored.done.released) == hard_masks_of(restored).released
    assert restored.weights_adapted and restored.done.dense_top1 == before.done.dense_top1
    for mine, theirs in zip(*(jax.tree.leaves(of.state.params) for of in (restored, before)), strict=True):
        assert np.array_equal(mine, theirs)
    # Evaluated with hard FCMasks, by eval.py's own way, it is what arbitrary masks gave.
    assert evaluate_restored(restored)["top1"] == pytest.approx(report["top1"], abs=0.002)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """A folder with folders of pictures, and the pictures."""
    folder, images = tmp_path_factory.mktemp("pictures"), load_dataset("fashion_mnist_subset").test_images[:30]
    for at, image in enumerate(images):
        (folder / str(at // 10)).mkdir(exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / str(at // 10) / f"{at:02d}.png")
    return folder, images


@pytest.mark.slow
def test_without_a_data_set_masks_are_found_and_judged_by_pictures(pretrained, pictures, tmp_path, monkeypatch, capsys):
    def absent(*_):
        raise UserError("the data set is not there")

    monkeypatch.setattr(given_masks, "load_restored_data", absent)
    folder, images = pictures
    asked = ["--checkpoint", str(pretrained), "--calibration", str(folder)]
    assert "is not there" in refused(capsys, ["profile", *asked])
    asked += ["--agreement", str(folder)]
    report, pruned = tmp_path / "report.json", tmp_path / "pruned.json"
    curves = ["--methods", "band", "--ratios", "0.8", "--json", str(report), "--plot", str(tmp_path / "curves.png")]
    assert fdjax_command(["profile", *asked, *curves]) == 0
    found = json.loads(report.read_text())
    assert found["measure"] == "agreement" and found["dense"]["top1"] == 1
    assert found["settings"]["num_images"] == found["settings"]["num_examples"] == 30

    out = ["--method", "band", "--target-macs", "0.7", "--out", str(tmp_path / "out"), "--json", str(pruned)]
    assert fdjax_command(["prune", *asked, *out]) == 0
    found = json.loads(pruned.read_text())
    classes = []
    for checkpoint in (pretrained, tmp_path / "out"):
        restored = restore(*find_checkpoint(str(checkpoint)))
        network, variables = restored.evaluation()
        x = normalize(jnp.asarray(images), restored.graph.input_mean, restored.graph.input_std)
        logits = jax.jit(network.apply, compiler_options=HASTE)(variables, x)
        classes.append(np.asarray(logits).argmax(axis=1))
    assert found["top1"] is None and found["agreement"] == pytest.approx(np.mean(classes[0] == classes[1]))
    assert f"for {100 * found['agreement']:.2f}% of 30 pictures" in capsys.readouterr().out


def test_refinement_keeps_the_masks_of_a_pruned_checkpoint(pruned, tmp_path, quick_runs):
    out, report = pruned
    refine = WeightPhaseConfig(steps=2, learning_rate=0.01)
    config = dataclasses.replace(CONFIG, phases=("refine",), refine=refine)
    summary = train(config, str(tmp_path / "refined"), str(out))
    restored, before = (restore(*find_checkpoint(str(of))) for of in (tmp_path / "refined", out))
    assert restored.phase_step == 2 and restored.weights_adapted
    assert hard_masks_of(restored).counts.keys() == hard_masks_of(before).counts.keys()
    for path, counts in hard_masks_of(before).counts.items():
        assert np.array_equal(hard_masks_of(restored).counts[path], counts)
    assert restored.done.released == before.done.released
    assert summary["macs"] == report["macs"]
    kernels = [of.state.params["block01"]["project"]["kernel"] for of in (restored, before)]
    assert not np.array_equal(*kernels)
    other = dataclasses.replace(config, learn=dataclasses.replace(config.learn, sides="input"))
    with pytest.raises(UserError, match=r"masks of other settings; give --learn\.sides both, or another"):
        train(other, str(tmp_path / "refined"))


def test_masks_of_other_settings_are_refused(pruned, tmp_path):
    other = dataclasses.replace(CONFIG, phases=("refine",), learn=dataclasses.replace(CONFIG.learn, block_by_map=()))
    with pytest.raises(UserError, match=r"masks of other settings; give --learn\.block-by-map 7 7, or start"):
        train(other, str(tmp_path / "refined"), str(pruned[0]))
    assert not (tmp_path / "refined").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--method", "band"], "give either --target-macs RATIO, such as 0.5, or --percentile P"),
        (["--method", "band", "--target-macs", "0.5", "--percentile", "30"], "give either --target-macs"),
        (["--method", "band", "--target-macs", "0"], "--target-macs must be above 0 and at most 1, got 0"),
        (["--method", "band", "--percentile", "101"], "--percentile must be from 0 to 100, got 101"),
        (["--method", "bands", "--target-macs", "0.5"], "no pruning method 'bands' (did you mean 'band'?)"),
        (
            ["--method", "band", "--target-macs", "0.01"],
            "--method band: a target of 0.01 cannot be met: with only the str",
        ),
        (["--method", "channel_coefficient", "--target-macs", "0.7"], "sparse, with no dense form to write"),
        (["--method", "coefficient", "--percentile", "30", "--scope", "global"], "not low-frequency prefixes"),
    ],
)
def test_prune_refuses_what_it_cannot_do_and_writes_nothing(pretrained, tmp_path, capsys, arguments, expected):
    out = tmp_path / "out"
    said = refused(capsys, ["prune", "--checkpoint", str(pretrained), "--out", str(out), "--images", "16", *arguments])
    assert expected in said
    assert not out.exists()


def test_sparse_masks_are_refused_with_a_target_of_the_papers_convention(pretrained, tmp_path, capsys, monkeypatch):
    def sparse(graph, *_, **__):
        sizes = graph.mask_sizes.items()
        masks = {path: np.tile(np.arange(num_coefs)[:, None] > 0, size) for path, (size, num_coefs) in sizes}
        return Pruned(masks, 0.3, (), macs=None)  # type: ignore[arg-type]

    monkeypatch.setattr("fdjax.checkpoints.prune.prune_to_target", sparse)
    flags = ["--method", "coefficient", "--target-macs", "0.7", "--convention", "paper", "--images", "16"]
    arguments = ["prune", "--checkpoint", str(pretrained), "--out", str(tmp_path / "out"), *flags]
    assert "no low-frequency prefixes" in refused(capsys, arguments)


def test_the_printed_flags_give_the_settings_of_the_masks_whatever_the_config():
    config = load_config("quickstart_paper")
    assert config.learn.block_by_map
    for target in ({}, {"target_macs": None, "lambda_": 0.0}):
        wanted = dataclasses.replace(config.learn, block=2, block_by_map=(), block_by_layer=(), **target)
        defaults = TrainArguments(config="c", workdir="w", settings=config)
        found = tyro.cli(TrainArguments, args=mask_flags(wanted), default=defaults).settings.learn
        assert found == wanted


@pytest.mark.parametrize("flags", [("--percentile", "30"), ("--target-macs", "0.7", "--convention", "paper")])
def test_settings_for_learning_masks_do_not_matter(tmp_path, flags):
    """Those of configs/quickstart.py and of a target of time, which a pruned checkpoint has no use for."""
    learn = dataclasses.replace(CONFIG.learn, approach="aim", target_time=0.5, levels="0,N", optimizer="adam")
    trained = write_checkpoint(tmp_path / "trained", "pretrain", config=dataclasses.replace(CONFIG, learn=learn))
    out = ["--method", "channel", "--out", str(tmp_path / "out"), "--images", "16", "--eval-limit", "16"]
    assert fdjax_command(["prune", "--checkpoint", str(trained), *flags, *out]) == 0
    assert restore(*find_checkpoint(str(tmp_path / "out"))).macs().ratio < 1


def test_pictures_that_are_not_drawn_are_not_read(pictures, monkeypatch):
    from fdjax.data import unlabelled

    read, whole = [], unlabelled.load_image
    monkeypatch.setattr(unlabelled, "load_image", lambda file, *how: [read.append(file), whole(file, *how)][1])
    found = read_pictures(pictures[0], (28, 28, 1), rows=lambda count: np.arange(count)[[7, 2]])
    assert [Path(file).name for file in read] == ["07.png", "02.png"]
    np.testing.assert_array_equal(found, pictures[1][[7, 2]])


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 5))
def test_the_sample_to_evaluate_on_is_drawn_and_in_order(count, limit, seed):
    rows = evaluation_sample(count, seed, limit)
    assert len(rows) == min(count, limit) and np.all(np.diff(rows) > 0) and set(rows) <= set(range(count))
    assert limit < 10 or count < 2 * limit or not np.array_equal(rows, np.arange(limit))


def test_prune_overwrites_nothing(pretrained, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    flags = ["--method", "band", "--target-macs", "0.7", "--out", str(tmp_path)]
    assert "is not empty" in refused(capsys, ["prune", "--checkpoint", str(pretrained), *flags])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_weights_that_were_trained_under_masks_are_not_profiled(tmp_path, capsys):
    refined = write_checkpoint(tmp_path / "refined", "refine")
    for command in (["profile"], ["prune", "--method", "band", "--target-macs", "0.7", "--out", str(tmp_path / "out")]):
        said = refused(capsys, [command[0], "--checkpoint", str(refined), *command[1:]])
        assert "trained under masks" in said
