"""Phases that end when the validation accuracy no longer rises."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdjax.checkpoint import CHECKPOINT_FOLDER, Checkpoints
from fdjax.config import CheckpointConfig, Config
from fdjax.errors import RunInterrupted, UserError
from fdjax.training.early_stopping import BestSoFar
from fdjax.training.measure import Measurements
from fdjax.training.restore import Restored, restore
from fdjax.training.run import train
from tests.tiny_run import get_config

TINY = get_config()
EVERY_STEP = 16 / 9000
CONFIG = dataclasses.replace(
    TINY,
    phases=("pretrain",),
    pretrain=dataclasses.replace(TINY.pretrain, steps=8, patience=2),
    refine=dataclasses.replace(TINY.refine, steps=2),
    checkpoint=CheckpointConfig(every_epochs=3 * EVERY_STEP, evaluate_every_epochs=EVERY_STEP, keep=2, time=False),
)
# By the step of pretraining after which the validation images are looked at.
SCORES = {1: 0.5, 2: 0.7, 3: 0.7, 4: 0.6, 5: 0.9, 6: 0.9, 7: 0.9, 8: 0.9, 9: 0.6, 10: 0.65}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, quick_runs: int) -> dict[str, int]:
    """Validation accuracies as `SCORES` has them; {"stop": STEP} stops a run once, when it is about to look there."""
    orders: dict[str, int] = {}
    evaluate = Measurements.evaluate

    def look(self, phase, state, done, *, finished, split):
        figures, macs = evaluate(self, phase, state, done, finished=finished, split=split)
        step = int(state.step) - phase.start
        if split is self.validation and phase.name == "pretrain":
            if finished:  # At the end of the phase, with its best weights.
                return {**figures, "top1": ENDED["validation_top1"]}, macs
            if orders.get("stop") == step:
                del orders["stop"]
                raise RunInterrupted("stopped", 130)
            figures = {**figures, "top1": SCORES[step]}
        return figures, macs

    monkeypatch.setattr(Measurements, "evaluate", look)
    return orders


def at(workdir: Path, step: int) -> Restored:
    return restore(Checkpoints(workdir / CHECKPOINT_FOLDER), step)


def same(left, right) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


# Step 3 is no better than step 2, and as good: of the two its checkpoint is the one that is kept.
ENDED = {"at": 4, "best": 3, "validation_top1": 0.7, "evaluations": 2}


def test_a_phase_ends_early(scripted, tmp_path, capsys) -> None:
    summary = train(CONFIG, str(tmp_path / "whole"))
    assert summary["phases"][0]["stopped"] == ENDED
    said = capsys.readouterr().out
    assert "ends after 4 of 8 steps" in said and "step 3, 70.00% of the validation images" in said
    end = at(tmp_path / "whole", 8)
    assert int(end.state.step) == 8 and end.done.best is None
    assert optax.tree_utils.tree_get_all_with_path(end.state.weight_opt, "count")[0][1] == 8  # Rates go on from here.

    # Two steps more, which are no better: the best is still that of the whole phase.
    longer = dataclasses.replace(CONFIG, pretrain=dataclasses.replace(CONFIG.pretrain, steps=10))
    (phase,) = train(longer, str(tmp_path / "whole"))["phases"]
    assert phase["stopped"] == {"at": 10, "best": 8, "validation_top1": 0.7, "evaluations": 2}
    assert same(at(tmp_path / "whole", 10).state.params, end.state.params)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_the_same_and_the_next_phase_goes_on_from_the_best(scripted, tmp_path) -> None:
    refine = dataclasses.replace(CONFIG, phases=("pretrain", "refine"))
    whole = train(refine, str(tmp_path / "whole"))
    assert [phase["name"] for phase in whole["phases"]] == ["pretrain", "refine"]
    for stop in (2, 3, 4):
        scripted["stop"] = stop
        with pytest.raises(RunInterrupted):
            train(refine, str(tmp_path / f"{stop}"))
        assert not scripted and train(refine, str(tmp_path / f"{stop}"))["phases"][0]["stopped"] == ENDED
        assert same(at(tmp_path / f"{stop}", 10).state, at(tmp_path / "whole", 10).state)

    # The same run without patience has those weights after step 3.
    patient = dataclasses.replace(CONFIG.pretrain, patience=None)
    every = dataclasses.replace(CONFIG.checkpoint, every_epochs=EVERY_STEP, keep=100)
    train(dataclasses.replace(CONFIG, pretrain=patient, checkpoint=every), str(tmp_path / "long"))
    early, best, last = at(tmp_path / "whole", 8), at(tmp_path / "long", 3), at(tmp_path / "long", 8)
    for name in ("params", "batch_stats"):
        assert same(getattr(early.state, name), getattr(best.state, name))
        assert not same(getattr(early.state, name), getattr(last.state, name))


def test_it_needs_validation_images_and_weights_that_train(tmp_path) -> None:
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, validation=0.0))
    with pytest.raises(UserError, match=r"pretrain.patience is 2.*no validation images.*--data.validation"):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    for phase in ("pretrain", "refine", "scratch"):
        with pytest.raises(UserError, match="at least 1"):
            dataclasses.replace(getattr(CONFIG, phase), patience=0)
    with pytest.raises(UserError, match="patience"):
        dataclasses.replace(CONFIG.alternate, patience=2)


@given(st.lists(st.integers(0, 3), min_size=1))
def test_the_best_is_the_highest_and_of_equals_the_last(scores: list[int]) -> None:
    seen = None
    for step, score in enumerate(scores):
        seen = dataclasses.asdict(BestSoFar.after(seen, step, score / 4))
    best = BestSoFar(**seen)  # type: ignore[arg-type]
    highest = max(scores)
    assert best.top1 == highest / 4
    assert best.step == max(step for step, score in enumerate(scores) if score == highest)
    assert best.since == len(scores) - 1 - scores.index(highest)
    assert Config.from_dict(CONFIG.to_dict()) == CONFIG
