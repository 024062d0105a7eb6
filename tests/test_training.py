"""Whole runs: what moves and what does not, resuming, continuing, starting from another run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fdjax.checkpoint import CHECKPOINT_FOLDER, MANIFEST, Checkpoints, find_checkpoint
from fdjax.config import Config, DistillConfig, WeightPhaseConfig, continuation_problem
from fdjax.data import load_dataset
from fdjax.errors import RunInterrupted, RunStopped, UserError
from fdjax.experiments.collect import collect
from fdjax.provenance import commit, processor
from fdjax.training.build import build_network
from fdjax.training.datasets import open_data
from fdjax.training.feed import Waiting
from fdjax.training.optimizers import learning_rate_schedule
from fdjax.training.restore import Restored, evaluate_restored, load_restored_data, restore
from fdjax.training.run import train
from fdjax.training.state import create_state, init_variables, variable_shapes, whole_masks
from fdjax.training.steps import make_prepare, make_weight_step
from fdjax.zoo import FrequencyPointwise
from tests.tiny_run import PHASES, STEPS, get_config

ROOT = Path(__file__).parents[1]
SPEED = {"engine": "xla", "device": "cpu", "threads": 1, "batch": 1, "clock": "wall", "dense_ms": 2.0, "pruned_ms": 1.0,
         "ratio": 0.5, "problem": None, "advice": None}  # fmt: skip
CONFIG = get_config()


def start_of(phase: str) -> int:
    return PHASES.index(phase) * STEPS


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same(left, right) -> bool:
    """Bit for bit."""
    return all(a.tobytes() == b.tobytes() for a, b in zip(leaves(left), leaves(right), strict=True))


def at(workdir: Path, step: int) -> Restored:
    return restore(Checkpoints(workdir / CHECKPOINT_FOLDER), step)


def without_times(summary: dict) -> dict:
    phases = [{k: v for k, v in phase.items() if k != "seconds"} for phase in summary["phases"]]
    return {**{k: v for k, v in summary.items() if k != "seconds"}, "phases": phases}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The workdir of a run through all phases, uninterrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train(CONFIG, str(workdir))
    return workdir


def test_a_run_leaves_config_metrics_summary_and_plots(finished):
    assert Config.from_dict(json.loads((finished / "config.json").read_text())) == CONFIG
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert {record["phase"] for record in records} == set(PHASES)
    assert [record["step"] for record in records] == sorted(record["step"] for record in records)
    assert any("kept_counts" in record for record in records)
    summary = json.loads((finished / "summary.json").read_text())
    assert [phase["name"] for phase in summary["phases"]] == list(PHASES)
    assert [phase["steps"] for phase in summary["phases"]] == [STEPS] * len(PHASES)
    assert summary["dense_top1"] == summary["phases"][0]["top1"]
    # Before rounding there is another accuracy where masks were learned.
    assert {phase["name"] for phase in summary["phases"] if "soft_top1" in phase} == {"learn", "alternate"}
    ends = {record["phase"]: record for record in records if "test_top1" in record}
    for phase in summary["phases"]:
        end = ends[phase["name"]]
        assert (end["test_top1"], end.get("test_soft_top1")) == (phase["top1"], phase.get("soft_top1"))
    assert summary["top1"] == summary["phases"][-1]["top1"]
    assert summary["num_examples"] == 2000
    assert {path.name for path in finished.glob("*.png")} == {
        "layer_macs.png",
        "kept_counts.png",
        "fcmask.png",
        "history.png",
    }


def test_a_finished_run_can_be_recorded(finished, tmp_path):
    """The summary has what `fdjax results` reads, the code and the machine among it."""
    summary = json.loads((finished / "summary.json").read_text())
    (result,) = collect([finished], tmp_path / "out").results
    rounding = next(phase for phase in summary["phases"] if phase["name"] == "alternate")
    assert (result.soft_top1, result.rounded_top1) == (rounding["soft_top1"], rounding["top1"])
    assert (result.dense_top1, result.pruned_top1) == (summary["dense_top1"], summary["top1"])
    assert (result.commit, result.processor) == (commit(), processor())
    assert result.name == "finished" and result.phases == ", ".join(PHASES)
    assert (tmp_path / "out" / "tradeoff.png").exists()


def test_the_target_is_met_within_2_percent_after_each_mask_phase(finished):
    phases = {phase["name"]: phase for phase in json.loads((finished / "summary.json").read_text())["phases"]}
    for name in ("learn", "alternate", "refine", "scratch"):
        assert phases[name]["ratio"] == pytest.approx(CONFIG.learn.target_macs, rel=0.02)
    assert phases["pretrain"]["ratio"] == 1.0


def test_learn_moves_masks_and_nothing_else(finished):
    before, after = at(finished, start_of("learn")).state, at(finished, start_of("alternate")).state
    assert same(before.params, after.params)
    assert same(before.batch_stats, after.batch_stats)
    assert not same(before.fcmask, after.fcmask)
    assert all(((mask >= 0) & (mask <= 1)).all() for mask in leaves(after.fcmask))


@pytest.mark.parametrize("phase", ["refine", "scratch"])
def test_hard_phases_move_weights_and_not_masks(finished, phase):
    first, last = at(finished, start_of(phase) + 2).state, at(finished, start_of(phase) + STEPS).state
    assert same(first.fcmask, last.fcmask)
    assert not same(first.params, last.params)
    assert not same(first.batch_stats, last.batch_stats)


def test_alternate_moves_one_collection_at_a_time_and_frees_batch_norm_late(finished):
    # Turns of one step each: masks, weights, masks, weights, ...; checkpoints lie two steps apart.
    begin = start_of("alternate")
    states = {step: at(finished, begin + step).state for step in (0, 2, 4, 6)}
    assert same(states[0].batch_stats, states[2].batch_stats)
    assert not same(states[2].params, states[4].params)
    assert not same(states[2].fcmask, states[4].fcmask)
    assert not same(states[2].batch_stats, states[6].batch_stats)


def test_masks_are_rounded_before_refinement_and_scratch_keeps_them_with_new_weights(finished):
    refined, scratch = at(finished, start_of("scratch")), at(finished, start_of("scratch") + STEPS)
    assert same(refined.state.fcmask, scratch.state.fcmask)
    assert refined.hard is not None
    sizes = refined.graph.mask_sizes
    for path, counts in refined.hard.counts.items():
        keys = path.split("/")
        mask = refined.state.fcmask
        for key in keys:
            mask = mask[key]
        np.testing.assert_allclose(np.asarray(mask) * sizes[path][1], counts, atol=1e-4)
    assert not same(refined.state.params, scratch.state.params)


def test_evaluating_the_checkpoint_repeats_the_summary(finished):
    summary = json.loads((finished / "summary.json").read_text())
    again = evaluate_restored(restore(*find_checkpoint(str(finished))))
    for name in ("top1", "loss", "num_examples", "macs", "layers", "dense_top1"):
        assert json.loads(json.dumps(again[name])) == summary[name]


def test_best_is_chosen_on_the_validation_share_within_the_last_phase(finished):
    checkpoints, step = find_checkpoint(str(finished), "best")
    assert checkpoints.meta(step)["phase"]["name"] == "scratch"
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert any("validation_top1" in record for record in records)


def test_the_same_command_on_a_finished_run_does_nothing(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    summary = train(CONFIG, str(finished))
    assert "nothing to do" in capsys.readouterr().out
    assert summary == json.loads((finished / "summary.json").read_text())
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}


def test_a_copy_of_a_finished_run_is_known_as_finished_whatever_the_times_of_its_files(finished, tmp_path):
    """A sweep compares the times of the config and the summary."""
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    os.utime(copy / "summary.json", (1, 1))
    train(CONFIG, str(copy))
    assert (copy / "summary.json").stat().st_mtime_ns >= (copy / "config.json").stat().st_mtime_ns


def test_killed_in_every_phase_and_resumed_it_ends_bit_for_bit_the_same(finished, tmp_path):
    workdir = tmp_path / "killed"
    command = [
        sys.executable, "train.py", "--config", "tests/tiny_run.py", "--workdir", str(workdir),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for phase in PHASES:
        wanted = workdir / CHECKPOINT_FOLDER / str(start_of(phase) + 2) / MANIFEST
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            deadline = time.monotonic() + 240
            while not wanted.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            _, errors = process.communicate()
        assert wanted.exists(), errors
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (workdir, finished)]
    assert without_times(summaries[0]) == without_times(summaries[1])
    end = len(PHASES) * STEPS
    assert same(at(workdir, end).state, at(finished, end).state)


@pytest.mark.usefixtures("few_test_images")
def test_a_run_goes_on_with_a_longer_or_a_further_phase(tmp_path):
    short = dataclasses.replace(CONFIG, phases=("pretrain", "learn"))
    train(short, str(tmp_path / "run"))
    longer = dataclasses.replace(short, learn=dataclasses.replace(short.learn, steps=STEPS + 2))
    summary = train(longer, str(tmp_path / "run"))
    assert [(p["name"], p["steps"]) for p in summary["phases"]] == [("pretrain", STEPS), ("learn", STEPS + 2)]
    further = dataclasses.replace(longer, phases=("pretrain", "learn", "refine"))
    summary = train(further, str(tmp_path / "run"))
    assert [p["name"] for p in summary["phases"]] == ["pretrain", "learn", "refine"]
    with pytest.raises(UserError, match="holds another run"):
        train(dataclasses.replace(further, seed=5), str(tmp_path / "run"))


@pytest.mark.usefixtures("few_test_images")
def test_init_takes_weights_and_skips_what_that_run_has_done(finished, tmp_path):
    pretrained = tmp_path / "pretrained"
    train(dataclasses.replace(CONFIG, phases=("pretrain",)), str(pretrained))
    config = dataclasses.replace(CONFIG, phases=("pretrain", "learn", "refine"))
    summary = train(config, str(tmp_path / "pruned"), init=str(pretrained))
    assert [phase["name"] for phase in summary["phases"]] == ["learn", "refine"]
    assert summary["dense_top1"] == json.loads((pretrained / "summary.json").read_text())["top1"]
    learned = at(tmp_path / "pruned", STEPS).state
    assert same(learned.params, at(pretrained, STEPS).state.params)
    # Resumed without --init, it still knows what it skipped.
    assert train(config, str(tmp_path / "pruned")) == summary

    with pytest.raises(UserError, match="has already done pretrain"):
        train(dataclasses.replace(CONFIG, phases=("pretrain",)), str(tmp_path / "none"), init=str(pretrained))
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, width=0.6))
    with pytest.raises(UserError, match="does not fit"):
        train(wider, str(tmp_path / "none"), init=str(pretrained))
    assert not (tmp_path / "none").exists()


def test_what_init_has_done_and_phases_without_masks_ask_for_nothing(finished, tmp_path, monkeypatch):
    """Neither for images to stop by nor for measured times."""
    monkeypatch.setattr("fdjax.training.loop.table_of", lambda *given: pytest.fail("times are measured"))
    timed = dataclasses.replace(CONFIG.learn, target_time=0.01, tied=True, levels="0,N", engine="xla")
    data = dataclasses.replace(CONFIG.data, validation=0.0)
    config = dataclasses.replace(CONFIG, learn=timed, data=data, phases=("pretrain",))
    pretrained = tmp_path / "pretrained"
    train(config, str(pretrained))
    patient = dataclasses.replace(config.pretrain, patience=2)
    config = dataclasses.replace(config, phases=("pretrain", "refine"), pretrain=patient)
    (phase,) = train(config, str(tmp_path / "run"), init=str(pretrained))["phases"]
    assert phase["name"] == "refine"


def test_a_finished_run_that_was_stopped_while_it_was_timed_is_timed(finished, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    monkeypatch.setattr("fdjax.training.measure.frozen_speed", lambda *given: {**SPEED})
    before = json.loads((copy / "summary.json").read_text())
    assert before["macs"]["total"] < before["macs"]["dense"] and before["time"] is None
    timed = dataclasses.replace(CONFIG, checkpoint=dataclasses.replace(CONFIG.checkpoint, time=True))
    assert train(timed, str(copy))["time"] == SPEED
    after = json.loads((copy / "summary.json").read_text())
    assert {**after, "versions": 0} == {**before, "time": SPEED, "versions": 0}


def test_falls_of_the_rate_that_come_at_the_same_step_all_count():
    phase = WeightPhaseConfig(
        learning_rate=1.0, schedule="step", step_at=(0.3, 0.5, 0.8), step_factor=0.1, warmup_epochs=6
    )
    schedule = learning_rate_schedule(phase, 100, 10)
    rates = [float(schedule(step)) for step in (59, 61, 79, 81)]
    np.testing.assert_allclose(rates, [59 / 60, 0.01, 0.01, 0.001], rtol=1e-5)


@pytest.mark.usefixtures("few_test_images")
def test_refinement_can_start_from_a_run_that_ended_with_learn(tmp_path):
    learned = train(dataclasses.replace(CONFIG, phases=("pretrain", "learn")), str(tmp_path / "learned"))
    refined = train(
        dataclasses.replace(CONFIG, phases=("refine",)), str(tmp_path / "refined"), str(tmp_path / "learned")
    )
    assert refined["macs"] == learned["macs"]
    assert refined["layers"] == learned["layers"]


@pytest.mark.slow  # The test of a further phase covers most of it.
@pytest.mark.usefixtures("quick_runs")
def test_settings_of_phases_that_have_not_begun_may_change(tmp_path):
    begun = dataclasses.replace(CONFIG, phases=("pretrain",))
    train(begun, str(tmp_path / "run"))
    learn = dataclasses.replace(CONFIG.learn, optimizer="adam", learning_rate=0.02, sides="input", levels="0,1,N")
    refine = dataclasses.replace(CONFIG.refine, optimizer="adamw", learning_rate=0.001)
    changed = dataclasses.replace(CONFIG, phases=("pretrain", "learn", "refine"), learn=learn, refine=refine)
    summary = train(changed, str(tmp_path / "run"))
    assert [phase["name"] for phase in summary["phases"]] == ["pretrain", "learn", "refine"]
    restored = restore(*find_checkpoint(str(tmp_path / "run")))
    assert all(path.endswith("/input") for path in restored.graph.mask_sizes)
    for path, counts in restored.hard.counts.items():
        assert set(counts.tolist()) <= {0, 1, restored.graph.mask_sizes[path][1]}


@pytest.mark.usefixtures("few_test_images")
@pytest.mark.slow
def test_tied_masks_with_expected_macs_as_penalty(tmp_path):
    learn = dataclasses.replace(CONFIG.learn, tied=True, penalty="macs", block_by_map=())
    config = dataclasses.replace(CONFIG, phases=("pretrain", "learn", "refine"), learn=learn)
    summary = train(config, str(tmp_path / "run"))
    assert summary["macs"]["ratio"] == pytest.approx(CONFIG.learn.target_macs, rel=0.02)
    kept = [layer["kept_counts"] for layer in summary["layers"] if layer["name"].endswith("expand")]
    assert all(counts["input"] is None for counts in kept)
    assert any(counts["output"] is not None for counts in kept)


@pytest.mark.usefixtures("few_test_images")
@pytest.mark.slow
def test_a_target_by_the_papers_count(tmp_path):
    learn = dataclasses.replace(CONFIG.learn, target_convention="paper", target_macs=0.9)
    summary = train(dataclasses.replace(CONFIG, phases=("pretrain", "learn"), learn=learn), str(tmp_path / "run"))
    assert summary["macs"]["paper_ratio"] == pytest.approx(0.9, rel=0.02)
    assert summary["target_convention"] == "paper"


@pytest.mark.usefixtures("few_test_images")
@pytest.mark.slow
def test_a_fixed_lambda_without_a_target(tmp_path):
    learn = dataclasses.replace(CONFIG.learn, target_macs=None, lambda_=0.5, gate="none")
    summary = train(dataclasses.replace(CONFIG, phases=("pretrain", "learn"), learn=learn), str(tmp_path / "run"))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {record["lambda"] for record in records if "lambda" in record} == {0.5}
    assert not any(layer["released"] for layer in summary["layers"])


@pytest.mark.usefixtures("few_test_images")
@pytest.mark.slow
def test_with_an_aim_lambda_is_constant_and_the_cost_comes_down(tmp_path):
    whole = {"tied": True, "levels": "0,N", "penalty": "macs", "gate": "none", "target_macs": 0.6}
    how = {"approach": "aim", "optimizer": "adam", "learning_rate": 0.02, "steps": 60}
    pretrain = dataclasses.replace(CONFIG.pretrain, steps=1)
    learn = dataclasses.replace(CONFIG.learn, **whole, **how)
    train(
        dataclasses.replace(CONFIG, phases=("pretrain", "learn"), learn=learn, pretrain=pretrain), str(tmp_path / "run")
    )
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {record["step"] - 1: record for record in records if "expected_ratio" in record}
    assert {record["lambda"] for record in found.values()} == {200.0}
    assert found[20]["expected_ratio"] == pytest.approx(1 - 0.4 * 20 / (learn.ramp * 60), abs=0.1)
    assert found[60]["expected_ratio"] == pytest.approx(0.6, abs=0.1)


@pytest.mark.usefixtures("few_test_images")
def test_a_damaged_checkpoint_is_passed_over_and_written_again(tmp_path, capsys):
    config = dataclasses.replace(CONFIG, phases=("pretrain",))
    first = train(config, str(tmp_path / "run"))
    checkpoints = Checkpoints(tmp_path / "run" / CHECKPOINT_FOLDER)
    largest = max((checkpoints.folder / str(STEPS)).rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    again = train(config, str(tmp_path / "run"))
    assert "damaged" in capsys.readouterr().err
    assert without_times(again) == without_times(first)
    assert find_checkpoint(str(tmp_path / "run"))[1] == STEPS


@pytest.mark.usefixtures("quick_runs")
def test_a_run_that_diverges_stops_and_says_so(tmp_path):
    wild = dataclasses.replace(CONFIG.pretrain, learning_rate=1e30)
    with pytest.raises(RunStopped, match=r"diverged; lower pretrain\.learning_rate"):
        train(dataclasses.replace(CONFIG, phases=("pretrain",), pretrain=wild), str(tmp_path / "run"))


def test_a_target_below_what_remains_without_masked_channels_is_refused(tmp_path):
    learn = dataclasses.replace(CONFIG.learn, target_macs=0.01)
    with pytest.raises(UserError, match="every masked channel removed"):
        train(dataclasses.replace(CONFIG, learn=learn), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("few_test_images")
def test_fewer_steps_than_are_done_and_another_init_are_refused(finished, tmp_path):
    config = dataclasses.replace(CONFIG, phases=("pretrain",))
    train(config, str(tmp_path / "run"))
    shorter = dataclasses.replace(config, pretrain=dataclasses.replace(config.pretrain, steps=STEPS - 2))
    with pytest.raises(UserError, match="more than the 4 that the config asks for"):
        train(shorter, str(tmp_path / "run"))
    with pytest.raises(UserError, match="begun with no --init"):
        train(config, str(tmp_path / "run"), init=str(finished))


@pytest.mark.usefixtures("few_test_images")
@pytest.mark.slow
def test_profile_traces_some_steps_and_changes_nothing_else(tmp_path, capsys):
    config = dataclasses.replace(CONFIG, phases=("pretrain",))
    traced = train(config, str(tmp_path / "traced"), profile=2)
    folder = tmp_path / "traced" / "profile" / "pretrain"
    assert f"traced 2 steps into {folder}" in capsys.readouterr().out
    (trace,) = folder.rglob("*.xplane.pb")
    assert trace.stat().st_size > 0
    plain = train(config, str(tmp_path / "plain"))
    assert not (tmp_path / "plain" / "profile").exists()
    assert without_times(traced) == without_times(plain)


def test_variables_are_those_of_plain_jax_and_masks_need_no_weights():
    layer: Any = FrequencyPointwise(5, 2)
    variables = init_variables(layer, (4, 4, 3), 7)
    plain = jax.jit(layer.init)(jax.random.key(7), jnp.zeros((1, 4, 4, 3)))
    chex.assert_trees_all_equal(variables, dict(plain))
    chex.assert_trees_all_equal(whole_masks(layer, (4, 4, 3)), variables["fcmask"])
    chex.assert_trees_all_equal_shapes_and_dtypes(variable_shapes(layer, (4, 4, 3)), variables)


def test_a_step_in_bfloat16_keeps_its_state_in_float32():
    dataset = load_dataset(CONFIG.data.name)
    images, labels = jnp.asarray(dataset.train_images[:16]), jnp.asarray(dataset.train_labels[:16], jnp.int32)
    network, graph = build_network(CONFIG, dataset.image_shape, dataset.num_classes)
    graph = dataclasses.replace(graph, input_mean=(80.0,), input_std=(90.0,))
    optimizer = optax.sgd(0.02, momentum=0.9, nesterov=True)
    variables = init_variables(network, dataset.image_shape, 0)
    before = create_state(variables, 0, optimizer, optax.identity())
    types, outcomes = [leaf.dtype for leaf in jax.tree.leaves(before)], {}
    for precision in ("float32", "bfloat16"):
        prepare = make_prepare(graph, crop_padding=2, flip=True, precision=precision)
        assert prepare(jax.random.key(0), images).dtype == precision
        step = jax.jit(make_weight_step(dataclasses.replace(network, mode="off"), optimizer, prepare))
        state, metrics = step(before, images, labels)
        assert [leaf.dtype for leaf in jax.tree.leaves(state)] == types
        assert metrics["loss"].dtype == np.float32
        assert all(np.isfinite(leaf).all() for leaf in leaves((state.params, state.batch_stats, state.weight_opt)))
        outcomes[precision] = state, float(metrics["loss"])
    (single, loss), (half, half_loss) = outcomes["float32"], outcomes["bfloat16"]
    assert half_loss == pytest.approx(loss, rel=0.03)
    assert not same(single.params, half.params)
    for name in ("params", "batch_stats"):
        for a, b, old in zip(*(leaves(getattr(state, name)) for state in (half, single, before)), strict=True):
            assert np.linalg.norm(a - b) <= 0.1 * max(float(np.linalg.norm(b)), float(np.linalg.norm(old)), 0.1)


# A teacher

TAUGHT = dataclasses.replace(CONFIG, phases=("pretrain", "learn", "refine"), distill=DistillConfig(weight=0.5))
# One step of refinement, for runs that only have to begin.
BRIEF = dataclasses.replace(CONFIG, phases=("refine",), refine=dataclasses.replace(CONFIG.refine, steps=1))


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    """The workdir of a run that asked for a teacher when pretraining was done."""
    workdir = tmp_path_factory.mktemp("taught") / "run"
    train(dataclasses.replace(CONFIG, phases=("pretrain",)), str(workdir))
    train(TAUGHT, str(workdir))
    return workdir


def test_the_teacher_is_the_pretrained_network_and_does_not_move(taught):
    pretrained = at(taught, STEPS).state
    assert pretrained.teacher == {}
    expected = {"params": pretrained.params, "batch_stats": pretrained.batch_stats}
    for step in (STEPS + 2, 2 * STEPS, 2 * STEPS + 2, 3 * STEPS):
        assert same(at(taught, step).state.teacher, expected)
    assert not same(at(taught, 3 * STEPS).state.params, pretrained.params)


def test_without_weight_there_is_no_teacher(finished, taught):
    assert all(at(finished, start_of(phase) + STEPS).state.teacher == {} for phase in PHASES)
    # The teacher has made a difference from the first steps on.
    losses = []
    for workdir in (finished, taught):
        records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        losses.append([record["train_loss"] for record in records if "train_loss" in record and record["step"] <= 8])
    assert losses[0][:3] == losses[1][:3] and losses[0][3] != losses[1][3]


@pytest.mark.parametrize("step", [STEPS + 2, 2 * STEPS + 2])
def test_a_taught_run_that_was_interrupted_ends_bit_for_bit_the_same(taught, tmp_path, step):
    workdir = tmp_path / "run"
    shutil.copytree(taught, workdir)
    (workdir / "summary.json").unlink()
    Checkpoints(workdir / CHECKPOINT_FOLDER).discard_after(step)
    again = train(TAUGHT, str(workdir))
    assert without_times(again) == without_times(json.loads((taught / "summary.json").read_text()))
    assert same(at(workdir, 3 * STEPS).state, at(taught, 3 * STEPS).state)


def test_a_teacher_may_be_asked_for_until_pretraining_is_over():
    untaught = dataclasses.replace(TAUGHT, distill=DistillConfig())
    assert continuation_problem(untaught, TAUGHT, "pretrain") is None
    for phase in ("learn", "refine", None):
        assert continuation_problem(untaught, TAUGHT, phase) == "distill.weight is 0.0 there and 0.5 here"
    here, moved, none = (
        dataclasses.replace(
            TAUGHT,
            data=dataclasses.replace(TAUGHT.data, unlabelled=folder, validation=0.0),
            distill=DistillConfig(weight=1.0),
        )
        for folder in ("/here", "/there", None)
    )
    assert continuation_problem(here, moved, "refine") is None
    assert "data.unlabelled is '/here' there and None here" in str(continuation_problem(here, none, "refine"))


@pytest.mark.parametrize("phase", ["alternate", "refine", "scratch"])
@pytest.mark.parametrize("steps", [2, STEPS])
def test_weights_that_were_trained_under_masks_are_no_teacher(finished, tmp_path, phase, steps):
    source = finished / CHECKPOINT_FOLDER / str(start_of(phase) + steps)
    config = dataclasses.replace(BRIEF, phases=("learn", "refine"), distill=TAUGHT.distill)
    said = rf"^distill\.weight is 0\.5, but --init, a run that ends in {phase}, has .*, or give --distill\.weight 0$"
    with pytest.raises(UserError, match=said):
        train(config, str(tmp_path / "run"), init=str(source))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("few_test_images")
@pytest.mark.slow
def test_weights_that_were_trained_under_masks_are_no_teacher_two_runs_later(finished, tmp_path):
    """Also if the first run was stopped in the midst of it, and the second one has only learned masks since."""
    alternating = finished / CHECKPOINT_FOLDER / str(start_of("alternate") + 4)
    learn = dataclasses.replace(CONFIG.learn, steps=1)
    train(dataclasses.replace(CONFIG, phases=("learn",), learn=learn), str(tmp_path / "learned"), str(alternating))
    with pytest.raises(UserError, match="holds no unpruned network"):
        train(dataclasses.replace(BRIEF, distill=TAUGHT.distill), str(tmp_path / "run"), init=str(tmp_path / "learned"))


@pytest.mark.usefixtures("few_test_images")
@pytest.mark.parametrize("phase", ["pretrain", "learn"])
def test_init_from_unpruned_weights_makes_them_the_teacher(finished, tmp_path, phase):
    source = start_of(phase) + STEPS
    train(
        dataclasses.replace(BRIEF, distill=TAUGHT.distill),
        str(tmp_path / "run"),
        init=str(finished / CHECKPOINT_FOLDER / str(source)),
    )
    begun, unpruned = at(tmp_path / "run", 1).state, at(finished, source).state
    assert same(begun.teacher, {"params": unpruned.params, "batch_stats": unpruned.batch_stats})
    assert not same(begun.params, unpruned.params)


@pytest.mark.usefixtures("few_test_images")
@pytest.mark.slow
def test_init_from_a_taught_run_hands_its_teacher_on(taught, tmp_path):
    train(dataclasses.replace(BRIEF, distill=TAUGHT.distill), str(tmp_path / "run"), init=str(taught))
    begun = at(tmp_path / "run", 1).state
    assert same(begun.teacher, at(taught, 3 * STEPS).state.teacher)
    assert not same(begun.teacher["params"], begun.params)


@pytest.mark.usefixtures("few_test_images")
@pytest.mark.slow
def test_init_from_a_taught_run_leaves_the_teacher_behind_where_none_is_asked_for(taught, tmp_path):
    train(BRIEF, str(tmp_path / "run"), init=str(taught))
    restored = restore(*find_checkpoint(str(tmp_path / "run")))
    assert restored.state.teacher == {}
    longer = dataclasses.replace(BRIEF, refine=dataclasses.replace(BRIEF.refine, steps=2))
    assert train(longer, str(tmp_path / "run"))["phases"][-1]["steps"] == 2


def test_a_damaged_picture_in_an_evaluation_costs_no_training(tmp_path, monkeypatch, quick_runs):
    def damaged(*_, **__):
        raise UserError("3.png is a damaged image")

    config = dataclasses.replace(CONFIG, phases=("pretrain",))
    with monkeypatch.context() as patch:
        patch.setattr("fdjax.training.measure.Measurements.evaluate", damaged)
        with pytest.raises(UserError, match=r"3\.png is a damaged image \(the training up to here is saved"):
            train(config, str(tmp_path / "run"))
    restored = at(tmp_path / "run", Checkpoints(tmp_path / "run" / CHECKPOINT_FOLDER).steps()[-1])
    assert restored.phase_step > 0
    train(config, str(tmp_path / "run"))
    train(config, str(tmp_path / "whole"))
    assert same(*(at(tmp_path / name, STEPS).state.params for name in ("run", "whole")))


def test_a_damaged_picture_in_training_costs_no_training(tmp_path, monkeypatch, quick_runs):
    """Where pictures are read while the network trains."""
    over = Waiting.over

    def damaged(self, batches):
        for place, batch in enumerate(over(self, batches)):
            if place == 3:
                raise UserError("3.png is a damaged image")
            yield batch

    rare = dataclasses.replace(CONFIG.checkpoint, every_epochs=1.0)
    config = dataclasses.replace(CONFIG, phases=("pretrain",), checkpoint=rare)
    with monkeypatch.context() as patch:
        patch.setattr(Waiting, "over", damaged)
        with pytest.raises(UserError, match=r"3\.png is a damaged image \(the training up to here is saved"):
            train(config, str(tmp_path / "run"))
    assert Checkpoints(tmp_path / "run" / CHECKPOINT_FOLDER).steps() == [3]
    train(config, str(tmp_path / "run"))
    train(config, str(tmp_path / "whole"))
    assert same(*(at(tmp_path / name, STEPS).state.params for name in ("run", "whole")))


def test_an_evaluation_in_which_a_run_is_stopped_is_done_when_it_goes_on(tmp_path, monkeypatch, quick_runs):
    every = dataclasses.replace(CONFIG.checkpoint, evaluate_every_epochs=CONFIG.checkpoint.every_epochs)
    config = dataclasses.replace(CONFIG, phases=("pretrain",), checkpoint=every)

    def stopped(*_, **__):
        raise RunInterrupted("stopped", 143)

    with monkeypatch.context() as patch:
        patch.setattr("fdjax.training.measure.Measurements.evaluate", stopped)
        with pytest.raises(RunInterrupted):
            train(config, str(tmp_path / "run"))
    assert Checkpoints(tmp_path / "run" / CHECKPOINT_FOLDER).steps() == [2]
    train(config, str(tmp_path / "run"))
    train(config, str(tmp_path / "whole"))
    curves = []
    for name in ("run", "whole"):
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        curves.append([(r["step"], r["validation_top1"]) for r in records if "validation_top1" in r])
    assert curves[0] == curves[1] and [step for step, _ in curves[0]] == [2, 4, 6]


# Fewer training images


@pytest.mark.parametrize("limit", [101, 95])
def test_the_same_images_are_held_out_whatever_the_order_of_classes(monkeypatch, limit):
    """A network that was started from another one has that one's order, and the data set its own."""
    whole, data = load_dataset("fashion_mnist_subset"), dataclasses.replace(CONFIG.data, train_limit=limit)
    monkeypatch.setattr("fdjax.training.datasets.open_dataset", lambda *_, **__: whole)
    config, order = dataclasses.replace(CONFIG, data=data), whole.class_names[::-1]
    graph = SimpleNamespace(class_names=order, input_shape=whole.image_shape, num_classes=10)
    trained_on = open_data(data, config.seed).in_order_of(order)
    monkeypatch.setattr("fdjax.training.restore.check_data", lambda *_: None)
    again = load_restored_data(SimpleNamespace(config=config, graph=graph))  # type: ignore[arg-type]
    np.testing.assert_array_equal(again.train_images, trained_on.train_images)
    np.testing.assert_array_equal(again.train_labels, trained_on.train_labels)


def test_a_run_on_a_part_of_the_training_set(tmp_path, capsys):
    data = dataclasses.replace(CONFIG.data, train_limit=101, validation=0.2)
    config = dataclasses.replace(CONFIG, phases=("pretrain",), data=data)
    train(config, str(tmp_path / "run"))
    said = capsys.readouterr().out
    assert "81 training, 20 validation, 2,000 test images" in said
    assert f"{STEPS} steps of 16 (1.2 epochs)" in said
    restored = restore(*find_checkpoint(str(tmp_path / "run")))
    assert (restored.done.num_train, restored.phase.steps_per_epoch) == (101, 5)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (end,) = (record for record in records if "test_top1" in record and record["step"] == STEPS)
    held_out, test = (evaluate_restored(restored, split) for split in ("validation", "test"))
    assert (held_out["num_examples"], test["num_examples"]) == (20, 2000)
    assert (held_out["top1"], held_out["loss"]) == (end["validation_top1"], end["validation_loss"])
    assert (test["top1"], test["loss"]) == (end["test_top1"], end["test_loss"])
    fewer = dataclasses.replace(config, data=dataclasses.replace(data, train_limit=100))
    with pytest.raises(UserError, match=r"data\.train_limit is 101 there and 100 here"):
        train(fewer, str(tmp_path / "run"))


def test_a_limit_is_no_matter_of_the_test_set(finished):
    """It can be measured where the training images are not all there."""
    restored = at(finished, STEPS)
    data = dataclasses.replace(restored.config.data, train_limit=1_000_000)
    limited = dataclasses.replace(restored, config=dataclasses.replace(restored.config, data=data))
    assert evaluate_restored(limited)["num_examples"] == 2000
    with pytest.raises(UserError, match=r"data\.train_limit is 1,000,000"):
        evaluate_restored(limited, "validation")
