"""Checkpoints that are written while the run goes on, and steps that are skipped because they are not finite."""

from __future__ import annotations

import dataclasses
import functools
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax.checkpoint import Checkpoints
from fdjax.errors import RunStopped
from fdjax.training import run as training_run
from fdjax.training.run import train
from fdjax.training.saving import BackgroundSaves
from fdjax.training.steps import labels_alone
from fdjax.training.stopping import Stopping
from fdjax.training.workdir import METRICS_FILE, SAVED_FILE
from tests.tiny_run import get_config


class Held(Checkpoints):
    """Checkpoints that are not written before `let_go` is set."""

    def __init__(self, folder):
        super().__init__(folder)
        self.let_go = threading.Event()

    def save(self, *arguments):
        assert self.let_go.wait(30)
        super().save(*arguments)


def test_what_is_saved_is_the_state_of_that_step_although_its_buffers_are_donated(tmp_path) -> None:
    checkpoints = Held(tmp_path / "checkpoints")
    saves = BackgroundSaves(checkpoints, tmp_path, Stopping())
    state = {"a": jnp.arange(1000.0)}
    saves.begin(3, state, {"name": "third"}, None)
    state = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf * 0 - 1, s), donate_argnums=0)(state)
    assert float(state["a"][5]) == -1 and checkpoints.steps() == []
    checkpoints.let_go.set()
    saves.wait()
    assert checkpoints.steps() == [3] and checkpoints.meta(3)["name"] == "third"
    restored = checkpoints.restore(3, {"a": np.zeros(1000, np.float32)})
    np.testing.assert_array_equal(restored["a"], np.arange(1000.0))
    assert json.loads((tmp_path / SAVED_FILE).read_text()) == {"step": 3}


def test_a_save_waits_for_the_one_before_it_and_says_once_that_it_failed(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
    (tmp_path / "file").write_text("no folder")
    saves = BackgroundSaves(checkpoints, tmp_path, Stopping())
    saves.begin(1, {"a": np.zeros(3)}, {}, None)
    with pytest.raises(RunStopped, match="step 1 cannot be saved"):
        saves.begin(2, {"a": np.zeros(3)}, {}, None)
    saves.wait()
    assert not (tmp_path / SAVED_FILE).exists()


def nan_at(steps, state, x):
    """The plain objective, but not a number at some steps of a run."""
    plain = labels_alone(state, x)
    bad = jnp.isin(state.step, jnp.array(steps))
    return lambda *arguments, **more: plain(*arguments, **more) + jnp.where(bad, jnp.nan, 0)


@pytest.mark.usefixtures("quick_runs")
def test_steps_that_are_not_finite_are_skipped_on_request(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(training_run, "labels_alone", functools.partial(nan_at, (1, 2)))
    config = dataclasses.replace(get_config(), phases=("pretrain",))
    with pytest.raises(RunStopped, match="the loss is nan"):
        train(config, str(tmp_path / "stops"))
    skipping = dataclasses.replace(config, skip_nonfinite=True)
    train(skipping, str(tmp_path / "goes_on"))
    assert "were not finite and are skipped" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "goes_on" / METRICS_FILE).read_text().splitlines()]
    assert sum(record.get("skipped", 0) for record in records) == 2
    losses = [record["train_loss"] for record in records if "train_loss" in record]
    assert losses and np.isfinite(losses).all()
    every = range(config.pretrain.steps or 1000)
    monkeypatch.setattr(training_run, "labels_alone", functools.partial(nan_at, tuple(every)))
    with pytest.raises(RunStopped, match=r"none of the last \d+ steps was finite"):
        train(skipping, str(tmp_path / "never_goes_on"))
