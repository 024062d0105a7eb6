"""Numbers that are no numbers: a wrong answer where they are counted, the end of a run, and no start for anything."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdjax.checkpoint import CHECKPOINT_FOLDER, Checkpoints
from fdjax.checkpoints.imported import save_imported
from fdjax.commands.evaluate import eval_command
from fdjax.commands.main import fdjax_command
from fdjax.commands.train import train_command
from fdjax.errors import RunStopped, UserError
from fdjax.frozen.artifact import ARRAYS, CHECKSUM, MANIFEST, file_sha256
from fdjax.frozen.score import agreement, figures
from fdjax.training.build import build_network
from fdjax.training.devices import Devices
from fdjax.training.evaluate import make_evaluator
from fdjax.training.health import first_nonfinite, nonfinite_network
from fdjax.training.restore import restore
from fdjax.training.run import train
from fdjax.training.steps import _accuracy
from tests.frozen_checkpoints import CONFIG as CHECKPOINT_CONFIG
from tests.frozen_checkpoints import write_checkpoint
from tests.tiny_run import get_config

CONFIG = get_config()
LOGITS = st.lists(st.floats(width=32), min_size=12, max_size=12)


@given(LOGITS, st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_a_logit_that_is_not_finite_is_a_wrong_answer_everywhere(values, labels) -> None:
    logits, labels = np.array(values, np.float32).reshape(3, 4), np.array(labels)
    finite = np.array([all(np.isfinite(row)) for row in logits])
    right = finite & (np.where(finite[:, np.newaxis], logits, 0).argmax(axis=1) == labels)
    assert figures(logits, labels)["top1"] == pytest.approx(right.mean())
    assert float(_accuracy(jnp.asarray(logits), jnp.asarray(labels))) == pytest.approx(right.mean())
    assert agreement(logits, logits)["same_top1"] == pytest.approx(finite.mean())
    if not finite.all():
        assert not np.isfinite(figures(logits, labels)["loss"])


class Answers:
    """Gives its variable for logits, whatever the images."""

    def apply(self, variables, x, *, train):
        return jnp.broadcast_to(variables["logits"], (len(x), variables["logits"].shape[0]))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_the_evaluator_counts_it_wrong_too(wrong) -> None:
    _, graph = build_network(CONFIG, (28, 28, 1), 10)
    graph = dataclasses.replace(graph, input_mean=(0.0,), input_std=(1.0,))
    evaluate = make_evaluator(Answers(), graph, Devices(), batch_size=4)
    images, labels = np.zeros((6, 28, 28, 1), np.uint8), np.full(6, 3)
    logits = np.zeros(10, np.float32)
    logits[3] = 1
    assert evaluate({"logits": logits}, images, labels)["top1"] == 1
    for place in (3, 5):
        logits = np.zeros(10, np.float32)
        logits[3], logits[place] = 1, wrong
        found = evaluate({"logits": logits}, images, labels)
        assert found["top1"] == 0 and not np.isfinite(found["loss"])


def test_what_is_not_finite_is_named() -> None:
    tree = {"a": np.ones(2), "b": {"c": np.array([1, np.inf])}, "count": np.array(3)}
    assert first_nonfinite(tree) == "b/c"
    assert first_nonfinite({"a": np.ones(2)}) is None
    assert nonfinite_network({"params": tree}) == "the weight b/c is not finite"
    assert nonfinite_network({"fcmask": {"expand": np.array([np.nan])}}) == "the mask expand is not finite"
    assert nonfinite_network({"batch_stats": {"norm": {"var": np.array([-1.0])}}}) == (
        "the statistic norm/var is a variance below 0"
    )
    assert nonfinite_network({"batch_stats": {"norm": {"var": np.array([0.0]), "mean": np.array([-1.0])}}}) is None
    assert nonfinite_network({"lambda_": np.array(np.nan)}) == "the penalty's weight is not finite"


@pytest.mark.usefixtures("quick_runs")
@pytest.mark.parametrize(("steps", "rate"), [(1, "1e38"), (4, "1e30")])
def test_a_run_that_diverges_saves_nothing_and_stops_with_status_1(tmp_path, capsys, steps, rate) -> None:
    config = str(Path(__file__).with_name("tiny_run.py"))
    arguments = ["--config", config, "--workdir", str(tmp_path / "run"), "--phases", "pretrain"]
    more = ["--pretrain.steps", str(steps), "--pretrain.learning-rate", rate, "--pretrain.warmup-epochs", "0"]
    every_step = ["--checkpoint.every-epochs", "0.0001"]
    assert train_command([*arguments, *more, *every_step]) == 1
    printed = capsys.readouterr()
    assert "100.00%" not in printed.out
    (line,) = [line for line in printed.err.splitlines() if "error" in line]
    assert "step 1" in line and "pretrain" in line and "lower pretrain.learning_rate" in line
    assert not (tmp_path / "run" / "summary.json").exists()
    assert Checkpoints(tmp_path / "run" / CHECKPOINT_FOLDER).steps() == []


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    """(collection, number) -> the workdir of a checkpoint with that number in one of its arrays."""
    base = write_checkpoint(tmp_path_factory.mktemp("diverged") / "sound", "refine")
    sound = Checkpoints(base / CHECKPOINT_FOLDER)
    (step,) = sound.steps()
    state, meta = restore(sound, step).state, sound.meta(step)

    def write(collection: str, number: float, folder: Path) -> Path:
        tree = getattr(state, collection)
        leaves, structure = jax.tree.flatten(tree)
        last = max(at for at, leaf in enumerate(leaves) if leaf.ndim)
        leaves[last] = jnp.full_like(leaves[last], number)
        spoilt = state.replace(**{collection: jax.tree.unflatten(structure, leaves)})
        Checkpoints(folder / CHECKPOINT_FOLDER).save(step, spoilt, meta)
        return folder

    return write


@pytest.mark.parametrize("collection", ["params", "batch_stats", "fcmask", "weight_opt"])
def test_nothing_starts_from_a_checkpoint_that_is_not_finite(diverged, tmp_path, capsys, collection) -> None:
    workdir = str(diverged(collection, np.nan, tmp_path / "run"))
    out = str(tmp_path / "frozen")
    for command, arguments in (
        (fdjax_command, ["freeze", "--no-time", "--checkpoint", workdir, "--out", out]),
        (eval_command, ["--checkpoint", workdir]),
    ):
        with pytest.raises(SystemExit) as exit_:
            command(arguments)
        assert exit_.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert "diverged" in line and "not finite" in line
    with pytest.raises(UserError, match="diverged"):
        refine = dataclasses.replace(CHECKPOINT_CONFIG, phases=("pretrain", "learn", "refine", "scratch"))
        train(refine, str(tmp_path / "next"), init=workdir)
    assert not (tmp_path / "next").exists() and not (tmp_path / "frozen").exists()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_freezing_refuses_finite_weights_with_logits_that_are_not(diverged, tmp_path, capsys) -> None:
    workdir = diverged("params", 3e38, tmp_path / "run")
    with pytest.raises(SystemExit) as exit_:
        fdjax_command(["freeze", "--no-time", "--checkpoint", str(workdir), "--out", str(tmp_path / "frozen")])
    assert exit_.value.code == 2
    assert "logits that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "frozen").exists()


def test_predicting_and_evaluating_refuse_a_frozen_network_whose_logits_are_not_finite(tmp_path, capsys) -> None:
    from PIL import Image

    workdir = write_checkpoint(tmp_path / "run", "refine")
    frozen = tmp_path / "frozen"
    assert fdjax_command(["freeze", "--no-time", "--checkpoint", str(workdir), "--out", str(frozen)]) == 0
    with np.load(frozen / ARRAYS) as stored:
        arrays = {name: np.full_like(stored[name], np.nan) if "bias" in name else stored[name] for name in stored.files}
    np.savez(frozen / ARRAYS, **arrays)
    manifest = json.loads((frozen / MANIFEST).read_text())
    manifest["files"][ARRAYS] = file_sha256(frozen / ARRAYS)
    (frozen / MANIFEST).write_text(json.dumps(manifest))
    (frozen / CHECKSUM).write_text(f"{file_sha256(frozen / MANIFEST)}  {MANIFEST}\n")
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "picture.png")
    capsys.readouterr()
    for command, arguments in (
        (fdjax_command, ["predict", "--frozen", str(frozen), str(tmp_path / "picture.png")]),
        (eval_command, ["--frozen", str(frozen)]),
    ):
        with pytest.raises(SystemExit) as exit_:
            command(arguments)
        assert exit_.value.code == 2
        assert "not finite" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_not_imported(tmp_path) -> None:
    network, graph = build_network(CONFIG, (28, 28, 1), 10)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    variables = {
        name: jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes[name])
        for name in ("params", "batch_stats")
    }
    variables["params"]["classifier"]["bias"] = np.full(10, np.inf, np.float32)
    with pytest.raises(UserError, match="the weight classifier/bias is not finite"):
        save_imported(tmp_path / "out", CONFIG, graph, variables, {})
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quick_runs")
def test_masks_that_are_no_numbers_stop_the_run(tmp_path, monkeypatch) -> None:
    from fdjax.training import mask_control

    look = mask_control.MaskControl.look

    def spoil(self, state, *at):
        state, measured = look(self, state, *at)
        return state.replace(lambda_=state.lambda_ * np.float32(np.nan)), measured

    monkeypatch.setattr(mask_control.MaskControl, "look", spoil)
    with pytest.raises(RunStopped, match=r"mask .* is not finite at step \d+ of the run, in learn"):
        train(dataclasses.replace(CONFIG, phases=("pretrain", "learn")), str(tmp_path / "run"))
    steps = Checkpoints(tmp_path / "run" / CHECKPOINT_FOLDER)
    for step in steps.steps():
        assert nonfinite_network(restore(steps, step).state.collections()) is None
    assert steps.steps()
