"""Imported weights trained on: fine-tuning is a first phase like any other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed: it writes the weights that are imported here")

import fdjax  # noqa: E402
from fdjax.checkpoint import find_checkpoint  # noqa: E402
from fdjax.commands.main import fdjax_command  # noqa: E402
from fdjax.config import Config, DataConfig, DistillConfig, WeightPhaseConfig  # noqa: E402
from fdjax.data import random_part  # noqa: E402
from fdjax.errors import UserError  # noqa: E402
from fdjax.experiments.collect import read_run  # noqa: E402
from fdjax.frozen import freeze  # noqa: E402
from fdjax.frozen.bench import seeded_variables  # noqa: E402
from fdjax.graph.cuts import cutting_masks  # noqa: E402
from fdjax.reports.results import read_result  # noqa: E402
from fdjax.reports.words import outcome_words  # noqa: E402
from fdjax.training.build import build_network, hard_masks  # noqa: E402
from fdjax.training.checks import warn_of_chance  # noqa: E402
from fdjax.training.optimizers import weight_optimizer  # noqa: E402
from fdjax.training.restore import restore  # noqa: E402
from fdjax.training.run import train  # noqa: E402
from fdjax.training.state import init_variables  # noqa: E402
from fdjax.training.steps import balancing_weights, cross_entropy, labels_alone, with_class_weights  # noqa: E402
from tests.fake_runs import CONFIG as RUN  # noqa: E402
from tests.fake_runs import make_summary  # noqa: E402
from tests.tiny_run import get_config  # noqa: E402
from tests.torch_networks import randomise, small_mobilenetv2  # noqa: E402

TINY = get_config()
CONFIG = dataclasses.replace(
    TINY,
    model=dataclasses.replace(TINY.model, width=0.35, padding="torch"),
    phases=("pretrain", "learn", "refine"),
    distill=DistillConfig(weight=0.5),
    data=dataclasses.replace(TINY.data, class_weights="balanced"),
)


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    """Weights without a classifier, imported with a new one."""
    folder = tmp_path_factory.mktemp("imported")
    state = randomise(small_mobilenetv2(), 4).state_dict()
    torch.save({name: t for name, t in state.items() if not name.startswith("classifier")}, folder / "body.pth")
    given = ["--config", str(Path(__file__).parent / "tiny_run.py"), "--format", "torchvision", "--new-classifier"]
    more = ["--model.width", "0.35", "--input-mean", "73", "--input-std", "90", "--out", str(folder / "out")]
    assert fdjax_command(["import", *given, "--weights", str(folder / "body.pth"), *more]) == 0
    return folder / "out"


def test_a_run_trains_imported_weights_and_then_prunes_them(imported, tmp_path, capsys, quick_runs) -> None:
    summary = train(CONFIG, str(tmp_path / "run"), init=str(imported))
    assert "starting from weights imported from body.pth" in capsys.readouterr().out
    assert [phase["name"] for phase in summary["phases"]] == ["pretrain", "learn", "refine"]
    assert summary["dense_top1"] == summary["phases"][0]["top1"]
    assert summary["imported"]["weights"] == "body.pth"
    confusion = np.array(summary["confusion"])
    assert confusion.shape == (10, 10) and confusion.sum() == summary["num_examples"]
    assert confusion.trace() == round(summary["top1"] * summary["num_examples"])
    assert summary["class_names"][-1] == "Ankle boot"
    begun, ended = (restore(*find_checkpoint(str(path))) for path in (imported, tmp_path / "run"))
    assert ended.graph.input_mean == begun.graph.input_mean == (73.0,)
    assert ended.state.teacher  # the unpruned network taught
    result = read_result("run", CONFIG, summary)
    assert result.dense_origin == "imported, after fine-tuning"
    assert "Its weights were imported from body.pth and fine-tuned here." in outcome_words(result)


@pytest.mark.slow
def test_fine_tuning_alone_is_a_dense_run_that_freezes(imported, tmp_path, quick_runs) -> None:
    config = dataclasses.replace(CONFIG, phases=("pretrain",))
    summary = train(config, str(tmp_path / "run"), init=str(imported))
    assert summary["top1"] == summary["dense_top1"] == summary["phases"][0]["top1"]
    body = [
        restore(*find_checkpoint(str(path))).state.params["stem"]["kernel"] for path in (imported, tmp_path / "run")
    ]
    assert not np.array_equal(*body)
    said = outcome_words(read_result("run", config, summary))
    assert said.startswith("The dense network has ") and "fine-tuned here" in said
    command = ["freeze", "--no-time", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "frozen")]
    assert fdjax_command(command) == 0
    manifest = json.loads((tmp_path / "frozen" / "manifest.json").read_text())
    assert manifest["macs"]["ratio"] == 1
    # Blocks can be chosen from there, which needs weights that no mask has touched.
    assert not restore(*find_checkpoint(str(tmp_path / "run"))).weights_adapted
    # A further run goes on from there, and does not fine-tune again.
    pruned = train(CONFIG, str(tmp_path / "pruned"), init=str(tmp_path / "run"))
    assert [phase["name"] for phase in pruned["phases"]] == ["learn", "refine"]
    assert pruned["dense_top1"] == summary["top1"]
    said = outcome_words(read_result("pruned", CONFIG, pruned))
    assert said.startswith("The pruned network has ") and "fine-tuned by a run that this one started from" in said


@pytest.mark.slow
def test_what_is_said_first_of_a_run_that_goes_on_from_a_pruned_one(imported, tmp_path, quick_runs) -> None:
    first = train(CONFIG, str(tmp_path / "first"), init=str(imported))
    config = dataclasses.replace(CONFIG, phases=("refine",))
    second = train(config, str(tmp_path / "second"), init=str(tmp_path / "first"))
    result = read_result("second", config, second)
    said = outcome_words(result)
    assert said.startswith("The pruned network has ") and f"{second['macs']['ratio']:.3f} of the dense" in said
    assert f"The dense network has {100 * first['dense_top1']:.2f}%" in said
    assert "fine-tuned by a run that this one started from" in said
    assert second["macs"]["ratio"] == first["macs"]["ratio"] < 1
    # No report can be made of imported weights that no run has taken up.
    with pytest.raises(UserError, match=r"holds imported weights.*eval.py --checkpoint"):
        read_run(imported, "it", "")


@pytest.mark.parametrize(
    ("origin", "skipped", "expected"),
    [
        (None, 0, ""),
        ({"weights": "a.pth"}, 0, " Its weights were imported from a.pth and fine-tuned here."),
        ({"weights": "a.pth"}, 1, " Its weights were imported from a.pth and taken as they are."),
        (
            {"weights": "a.pth", "fine_tuned": True},
            1,
            " Its weights were imported from a.pth and fine-tuned by a run that this one started from.",
        ),
    ],
)
def test_the_first_paragraph_says_where_the_weights_are_from(origin, skipped: int, expected: str) -> None:
    summary = {**make_summary(skipped=skipped, top1=0.7, dense_top1=0.72), "imported": origin}
    said = outcome_words(read_result("a", RUN, summary))
    assert said.startswith("The pruned network has 70.00% of 2,000 test images right")
    assert said.endswith(f"The dense network has 72.00%: the pruned one has 2.00 points less.{expected}")


@pytest.mark.parametrize("phases", [("learn", "refine"), ("refine",)])
def test_a_new_classifier_has_to_be_trained_first(phases, imported, tmp_path) -> None:
    with pytest.raises(UserError, match="new classifier, which nothing has trained: begin with pretrain"):
        train(dataclasses.replace(CONFIG, phases=phases), str(tmp_path / "run"), init=str(imported))
    assert not (tmp_path / "run").exists()


def test_the_body_learns_at_a_share_of_the_rate() -> None:
    params = {"stem": {"kernel": jnp.ones((2, 2))}, "classifier": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    grads = jax.tree.map(jnp.ones_like, params)

    def update(body_rate: float, optimizer: str):
        made = weight_optimizer(
            WeightPhaseConfig(body_rate=body_rate, optimizer=optimizer), optax.constant_schedule(0.1)
        )
        return made.update(grads, made.init(params), params)[0]

    for optimizer in ("sgd", "adamw"):
        whole, part = update(1.0, optimizer), update(0.25, optimizer)
        np.testing.assert_allclose(part["stem"]["kernel"], 0.25 * whole["stem"]["kernel"], rtol=1e-6)
        for leaf in ("kernel", "bias"):
            np.testing.assert_array_equal(part["classifier"][leaf], whole["classifier"][leaf])
    with pytest.raises(UserError, match="body_rate must be a share from 0 to 1"):
        WeightPhaseConfig(body_rate=1.5)


def test_random_parts_are_windows_of_the_image() -> None:
    rows, columns = np.mgrid[0:24, 0:32].astype(np.float32)
    images = jnp.asarray(np.broadcast_to(np.stack([rows, columns, 0 * rows + 7], -1), (400, 24, 32, 3)))
    found = np.asarray(random_part(jax.random.key(3), images, 0.5))
    assert found.shape == images.shape
    np.testing.assert_allclose(found[..., 2], 7, atol=1e-4)  # what is constant stays so
    middle = found[:, 4:-4, 4:-4]
    high = np.diff(middle[..., 0], axis=1)[:, :, 0]
    wide = np.diff(middle[..., 1], axis=2)[:, 0]
    # Rows and columns are evenly spaced, and less than one apart.
    assert np.ptp(high, axis=1).max() < 1e-3 and np.ptp(wide, axis=1).max() < 1e-3
    area = high[:, 0] * wide[:, 0]
    assert 0.42 < area.min() < 0.55 and area.max() <= 1 + 1e-5 and 0.68 < area.mean() < 0.8
    assert found.min() >= 0 and found[..., 0].max() <= 23 + 1e-4 and found[..., 1].max() <= 31 + 1e-4
    whole = np.asarray(random_part(jax.random.key(3), images[:, :, :24], 1.0))
    assert np.abs(whole[..., 0] - images[:, :, :24, 0]).max() < 24 * (1 - (3 / 4) ** 0.5)


def test_random_parts_do_not_go_with_other_crops() -> None:
    with pytest.raises(UserError, match="crop_area must be 0 with random_resized_crop or crop_padding"):
        DataConfig(crop_area=0.5)
    assert Config(data=DataConfig(crop_area=0.5, crop_padding=0)).data.crop_area == 0.5


@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=60), seed=st.integers(0, 99))
def test_balanced_classes_count_alike_in_the_loss(labels: list[int], seed: int) -> None:
    targets, rng = np.array(labels), np.random.default_rng(seed)
    weights = balancing_weights(targets, 4)
    logits = jnp.asarray(rng.normal(size=(len(targets), 4)), jnp.float32)
    each = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, targets))
    expected = np.mean([each[targets == label].mean() for label in set(labels)])
    for given_labels in (jnp.asarray(targets), jax.nn.one_hot(targets, 4)):
        found = cross_entropy(logits, given_labels, class_weights=weights)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(weights[targets].mean(), 1, rtol=1e-5)


def test_an_objective_with_class_weights_weighs_the_labels() -> None:
    logits, labels = jnp.asarray([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), jnp.asarray([0, 1, 0])
    weights = balancing_weights(np.asarray(labels), 2)
    weighted = with_class_weights(labels_alone, weights)(None, logits)
    assert float(weighted(logits, labels, 0.1)) == float(cross_entropy(logits, labels, 0.1, weights))
    assert float(weighted(logits, labels, 0.1)) != float(cross_entropy(logits, labels, 0.1))


def test_a_network_at_chance_is_warned_of(capsys) -> None:
    warn_of_chance(0.11, 10)
    assert "a test accuracy of 11.00%, and guessing would give 10.00%" in capsys.readouterr().out
    warn_of_chance(0.3, 10)
    warn_of_chance(None, 10)
    assert not capsys.readouterr().out


def test_rounding_never_cuts_a_network_in_two() -> None:
    """Where nothing bypasses a tied mask, something of it is left, however low the masks have come."""
    config = dataclasses.replace(
        TINY,
        learn=dataclasses.replace(TINY.learn, tied=True, levels="0,N", group_multiple=8),
    )
    network, graph = build_network(config, (28, 28, 1), 10)
    fcmask = init_variables(network, (28, 28, 1), 0)["fcmask"]
    hard = hard_masks(config.learn, graph, jax.tree.map(jnp.zeros_like, fcmask), to_target=False)
    # The layers of the block without a residual connection, and the head.
    assert {path.split("/")[0] for path in graph.floors} == {"block02", "head"}
    for path, counts in hard.counts.items():
        assert (counts > 0).any() == (path in graph.floors)
    # What is left still reads the image; without floors nothing would.
    none = {path: np.zeros_like(counts) for path, counts in hard.counts.items()}
    for counts, reads in ((hard.counts, True), (none, False)):
        assert bool(freeze(graph, seeded_variables(graph), counts).program.macs()) == reads


def test_masks_with_a_bypass_do_not_cut() -> None:
    def network(variables, x):
        pool = lambda kernel, x: jax.nn.relu(jnp.einsum("bhwc,cd->bhwd", x, kernel))  # noqa: E731
        first = pool(variables["a"], x)
        around = first + pool(variables["c"], pool(variables["b"], first))
        return pool(variables["d"], around).mean(axis=(1, 2))

    kernels = {name: jnp.ones((4, 4)) for name in "abcd"}
    traced = fdjax.with_masks(fdjax.trace(network, kernels, jax.ShapeDtypeStruct((1, 4, 4, 4), jnp.float32)))
    layers = {path: {name for name, _ in mask.sides} for path, mask in traced.masks.items()}
    cutting = cutting_masks(traced.graph, traced.masks)
    assert any(names == {"b", "c"} for names in layers.values())
    for path, names in layers.items():
        assert (path in cutting) == (names != {"b", "c"}), names
