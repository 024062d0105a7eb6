"""Statistics of batch norm for a pruned network: against NumPy, training mode, and networks that lose nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

import fdjax.checkpoints.statistics
from fdjax.checkpoint import find_checkpoint
from fdjax.checkpoints.given_masks import COEF_MASKS, GivenMasks
from fdjax.checkpoints.statistics import corrected_statistics, make_statistics
from fdjax.commands.main import fdjax_command
from fdjax.config import DistillConfig, WeightPhaseConfig
from fdjax.data import normalize
from fdjax.errors import UserError
from fdjax.pruning.profiled import prune_share, whole_masks
from fdjax.training.build import build_network, collection_of
from fdjax.training.restore import evaluate_restored, restore
from fdjax.training.run import train
from fdjax.zoo import FCMASK, FrequencyNetwork
from tests.frozen_checkpoints import CONFIG, write_checkpoint
from tests.frozen_networks import HASTE, random_variables, raw_images, with_preprocessing


@pytest.fixture(scope="module")
def measured():
    """A network with given masks, its variables, and the function that measures its statistics."""
    network, graph = build_network(CONFIG, (28, 28, 1), 10)
    assert isinstance(network, FrequencyNetwork)
    graph = with_preprocessing(graph)
    masked = GivenMasks(dataclasses.replace(network, batch_norm_momentum=0.0), graph)
    fcmask = collection_of(graph, graph.full_counts())
    variables = {**random_variables(network, graph, 0), FCMASK: fcmask, COEF_MASKS: floats(whole_masks(graph))}
    return masked, graph, variables, make_statistics(masked, graph)


def floats(masks) -> dict[str, np.ndarray]:
    return {path: np.asarray(mask, np.float32) for path, mask in masks.items()}


def pruned_masks(graph) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    scores = {path: rng.uniform(0.1, 1, (1, channels)) for path, (channels, _) in graph.mask_sizes.items()}
    return floats(prune_share(graph, scores, 0.4))


def test_the_first_norm_meets_all_images_of_all_batches(measured):
    _, graph, variables, statistics = measured
    images = raw_images(graph, 100, 0)  # Two batches.
    x = normalize(jnp.asarray(images), graph.input_mean, graph.input_std)
    stem = jax.lax.conv_general_dilated(
        x, variables["params"]["stem"]["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = statistics(variables, images)["stem_norm"]
    np.testing.assert_allclose(found["mean"], np.mean(stem, (0, 1, 2)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["var"], np.var(stem, (0, 1, 2)), rtol=1e-3)


def test_with_its_own_statistics_a_network_answers_as_in_training(measured, monkeypatch):
    masked, graph, variables, statistics = measured
    images, masks = raw_images(graph, 12, 1), pruned_masks(graph)
    x = normalize(jnp.asarray(images), graph.input_mean, graph.input_std)
    variables = {**variables, "batch_stats": to_float32(statistics(variables, images))}
    before = statistics(variables, images)
    after = statistics({**variables, COEF_MASKS: masks}, images)
    corrected = corrected_statistics(variables["batch_stats"], before, after)
    with monkeypatch.context() as patch:
        patch.setattr(fdjax.checkpoints.statistics, "_FLOOR", 0)
        exact = corrected_statistics(variables["batch_stats"], before, after)

    def logits(batch_stats, train):
        given = {**variables, COEF_MASKS: masks, "batch_stats": batch_stats}
        run = jax.jit(lambda given, x: masked.apply(given, x, train, ["batch_stats"])[0], compiler_options=HASTE)
        return np.asarray(run(given, x))

    trained = logits(variables["batch_stats"], True)
    np.testing.assert_allclose(logits(exact, False), trained, atol=1e-4)
    far = np.abs(logits(variables["batch_stats"], False) - trained).max()
    assert far > 5 * np.abs(logits(corrected, False) - trained).max()


def to_float32(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)


NUMBERS = st.floats(-1e3, 1e3, width=32)
VARIANCES = st.floats(0, 1e4, width=32)


def norm(mean: float, var: float) -> dict:
    return {"norm": {"mean": np.array([mean], np.float32), "var": np.array([var], np.float32)}}


@given(NUMBERS, VARIANCES, NUMBERS, VARIANCES)
@settings(deadline=None)
def test_a_network_that_loses_nothing_keeps_its_statistics(mean, var, measured_mean, measured_var):
    trained, same = norm(mean, var), norm(measured_mean, measured_var)
    found = corrected_statistics(trained, same, same)["norm"]
    assert found["var"] == trained["norm"]["var"]
    np.testing.assert_allclose(found["mean"], trained["norm"]["mean"], rtol=1e-6, atol=1e-9)


@given(*[st.tuples(NUMBERS, VARIANCES)] * 3)
@settings(deadline=None)
def test_corrected_statistics_are_finite_and_variances_not_negative(trained, before, after):
    trained, before, after = norm(*trained), norm(*before), norm(*after)
    found = corrected_statistics(trained, before, after)["norm"]
    assert np.isfinite(found["mean"]) and np.isfinite(found["var"]) and found["var"] >= 0


@given(NUMBERS, st.floats(0.1, 100), NUMBERS, st.floats(0.1, 100))
@settings(deadline=None)
def test_where_the_images_are_as_in_training_the_statistics_are_those_measured(mean, var, after_mean, share):
    trained = norm(mean, var)
    found = corrected_statistics(trained, trained, norm(after_mean, var * share))["norm"]
    np.testing.assert_allclose(found["mean"], after_mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["var"], var * share, rtol=0.02)


# The command


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("statistics") / "pretrained", "pretrain")


def prune(pretrained: Path, out: Path, *flags: str):
    report = out.with_suffix(".json")
    asked = ["prune", "--checkpoint", str(pretrained), "--method", "channel", "--images", "16", *flags]
    assert fdjax_command([*asked, "--out", str(out), "--json", str(report)]) == 0
    return restore(*find_checkpoint(str(out))), json.loads(report.read_text())


def statistics_of(restored) -> dict:
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(restored.state.batch_stats).items()}


def changed(restored, pretrained: Path) -> list[str]:
    before = statistics_of(restore(*find_checkpoint(str(pretrained))))
    return [path for path, leaf in statistics_of(restored).items() if not np.array_equal(leaf, before[path])]


def test_prune_corrects_the_norms_behind_what_it_removes(pretrained, tmp_path):
    restored, report = prune(pretrained, tmp_path / "out", "--target-macs", "0.7")
    paths = changed(restored, pretrained)
    assert report["recalibrated"] and restored.weights_adapted
    # Nothing is removed before the stem's norm, and something before the last.
    assert not [path for path in paths if path.startswith("stem_norm")] and "block01/project_norm/var" in paths
    assert evaluate_restored(restored)["top1"] == pytest.approx(report["top1"], abs=0.005)


def test_prune_leaves_the_statistics_alone_if_asked_or_if_nothing_is_removed(pretrained, tmp_path):
    short = ["--eval-limit", "60"]
    restored, report = prune(pretrained, tmp_path / "asked", "--target-macs", "0.7", "--no-recalibrate", *short)
    assert not changed(restored, pretrained) and not report["recalibrated"] and not restored.weights_adapted
    restored, report = prune(pretrained, tmp_path / "whole", "--percentile", "0", *short)
    assert report["recalibrated"] and report["macs"]["ratio"] == 1
    before = statistics_of(restore(*find_checkpoint(str(pretrained))))
    for path, leaf in statistics_of(restored).items():
        np.testing.assert_allclose(leaf, before[path], rtol=1e-6, atol=1e-7)


def test_a_corrected_network_is_not_taken_for_an_unpruned_one(pretrained, tmp_path, capsys):
    prune(pretrained, tmp_path / "out", "--target-macs", "0.7", "--eval-limit", "60")
    flags = ["--method", "channel", "--target-macs", "0.5", "--out", str(tmp_path / "again")]
    with pytest.raises(SystemExit, match="2"):
        fdjax_command(["prune", "--checkpoint", str(tmp_path / "out"), *flags])
    assert "or its batch norm corrected for them" in capsys.readouterr().err
    distilled = dataclasses.replace(
        CONFIG, phases=("refine",), refine=WeightPhaseConfig(steps=1), distill=DistillConfig(weight=0.5)
    )
    with pytest.raises(UserError, match="fdjax prune --no-recalibrate"):
        train(distilled, str(tmp_path / "refined"), str(tmp_path / "out"))
