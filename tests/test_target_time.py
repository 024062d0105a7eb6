"""A target of time: the table it speaks of, what masks are expected to take by it, rounding until the clock agrees."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from fdjax.config import LearnConfig
from fdjax.errors import UserError
from fdjax.frozen import Stopwatch
from fdjax.frozen.choice import layers_of
from fdjax.frozen.one_core import times_on_one_core
from fdjax.pruning.timed import RunTimes, TimeTable, between, expected_parts, expected_time, grid, soft_ratio
from fdjax.training import checks, rounding, time_table
from fdjax.training.build import hard_masks
from fdjax.training.run import train
from fdjax.training.speed import speed_words
from fdjax.training.time_table import check_timed, measure_table, same_times, table_of
from tests.frozen_checkpoints import CONFIG, write_checkpoint
from tests.frozen_networks import frozen_of, random_variables
from tests.small_network import small
from tests.test_frozen import TIED, make

LEARN = LearnConfig(block=2, tied=True, levels="0,1,N", target_time=0.6, penalty="macs")
SPEC = small(tied=True, levels=LEARN.counts_below_whole, block_by_map={})
OVERHEAD = 0.05


class FakeClock(Stopwatch):
    """Says that a program takes a microsecond for a thousand MACs, and some for a call."""

    def now(self, candidates, *, part):
        return {name: OVERHEAD + program.macs() / 1e6 for name, (program, _) in candidates.items()}


@pytest.fixture
def fake_clock(monkeypatch):
    monkeypatch.setattr(time_table, "Stopwatch", FakeClock)
    monkeypatch.setattr(time_table.runtime, "times_cache_dir", lambda: None)


@pytest.fixture(scope="module")
def table():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(time_table, "Stopwatch", FakeClock)
        patched.setattr(time_table.runtime, "times_cache_dir", lambda: None)
        return measure_table(LEARN, SPEC)


def flat(seed: int, highest: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: rng.uniform(0, highest, c).clip(0, 1).astype(np.float32) for path, (c, _) in SPEC.mask_sizes.items()}


# Between points


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.floats(0, 1), st.floats(0, 1))
def test_between_points_a_plane_is_read_exactly(plane, a, b):
    places, (first, second) = (0, 8, 24, 40), sorted((40 * a, 40 * b), reverse=True)
    points = [(i, j) for i, j in itertools.product(range(4), repeat=2) if j <= i]
    values = {(i, j): plane[0] + plane[1] * places[i] + plane[2] * places[j] for i, j in points}
    expected = plane[0] + plane[1] * first + plane[2] * second
    assert between(places, values, (first, second)) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 2), st.integers(8, 100), st.sampled_from((1, 8, 16)))
def test_the_envelope_lies_below_every_time_and_touches_the_ends(seed, axes, channels, multiple):
    widths, points = grid(channels, axes, multiple)
    assert widths[0] == 0 and widths[-1] == channels and all(width % multiple == 0 for width in widths[:-1])
    rng = np.random.default_rng(seed)
    times = tuple(float(sum(point)) + rng.uniform(0, 1) for point in points)
    run = RunTimes("m", (), channels, (0, 1, 4) if axes == 2 else (0, 4), widths, points, times)
    shares = np.asarray(widths, float)[np.asarray(points)] / channels
    envelope = (shares @ run.planes[:, :-1].T + run.planes[:, -1]).max(axis=1)
    assert (envelope <= np.asarray(times) + 1e-6).all()
    assert envelope[0] == pytest.approx(times[0]) and envelope[-1] == pytest.approx(times[-1])


# The table


def test_the_table_says_what_was_measured(table):
    assert table.ratio(SPEC, SPEC.full_counts()) == pytest.approx(1)
    ones = {path: jnp.ones(c) for path, (c, _) in SPEC.mask_sizes.items()}
    assert float(expected_time(SPEC, ones, table)) == pytest.approx(1, abs=1e-5)
    assert 0 < table.least < 0.6
    again = TimeTable.from_dict(json.loads(json.dumps(table.to_dict())))
    assert again == table


def test_soft_masks_that_are_hard_take_what_the_table_says(table):
    hard = hard_masks(LEARN, SPEC, unflatten_dict(flat(0, 1.4), sep="/"), to_target=False, table=table)
    sizes = SPEC.mask_sizes
    levels = {path: SPEC.levels_of(path, LEARN.counts_below_whole) for path in sizes}
    masks = {path: np.searchsorted(levels[path], c) / (len(levels[path]) - 1) for path, c in hard.counts.items()}
    parts = expected_parts(SPEC, {path: jnp.asarray(m, jnp.float32) for path, m in masks.items()}, table)
    runs, outside = table.parts(SPEC, hard.counts)
    assert soft_ratio(table, parts) * table.dense_ms - float(parts.outside) == pytest.approx(runs, rel=1e-5)
    assert hard.time == pytest.approx((runs + outside) / table.dense_ms)


def test_expected_time_comes_down_with_every_mask(table):
    masks = {path: jnp.asarray(mask) for path, mask in flat(1, 1.0).items()}
    value, slopes = jax.value_and_grad(lambda m: expected_time(SPEC, m, table))(masks)
    assert 0 < float(value) < 1
    assert all((np.asarray(slope) >= 0).all() and np.asarray(slope).any() for slope in slopes.values())


@pytest.mark.parametrize("target", [0.5, 0.8])
def test_rounding_meets_a_target_by_the_table(table, target):
    learn = dataclasses.replace(LEARN, target_time=target)
    hard = hard_masks(learn, SPEC, unflatten_dict(flat(2, 1.2), sep="/"), to_target=True, table=table)
    assert hard.time == pytest.approx(target, rel=0.06)
    # Outside of the timed runs channels stay whole or go.
    sizes = SPEC.mask_sizes
    assert all(np.isin(hard.counts[path], (0, sizes[path][1])).all() for path in ("head/input", "head/output"))


def test_masks_are_rounded_anew_until_the_clock_agrees(table, fake_clock, monkeypatch, capsys):
    asked = []

    def slower(graph, weights, counts, stopwatch):
        asked.append(table.ratio(graph, counts))
        return 0.1 + 1.1 * asked[-1], {}

    monkeypatch.setattr(rounding, "measured_ratio", slower)
    hard = rounding.gated_masks(LEARN, SPEC, unflatten_dict(flat(3, 1.2), sep="/"), table, learned=True)
    assert 1 < len(asked) <= 6 and 0.1 + 1.1 * hard.time == pytest.approx(0.6, rel=0.03)
    said = capsys.readouterr().out
    assert "of the dense network's, asked for 0.6 (xla, 1 image at once, one thread" in said and "missed" not in said


def test_a_target_that_is_missed_by_far_is_said(table, fake_clock, monkeypatch, capsys):
    monkeypatch.setattr(rounding, "measured_ratio", lambda *_: (0.3, {}))
    rounding.gated_masks(LEARN, SPEC, unflatten_dict(flat(3, 1.2), sep="/"), table, learned=True)
    said = capsys.readouterr().out
    assert "time: 0.300x of the dense network's, asked for 0.6" in said and "the target was missed" in said


def test_where_no_masks_are_faster_than_none_there_are_none(table, fake_clock, monkeypatch, capsys):
    monkeypatch.setattr(rounding, "measured_ratio", lambda *_: (1.3, {}))
    hard = rounding.gated_masks(LEARN, SPEC, unflatten_dict(flat(3, 1.2), sep="/"), table, learned=True)
    full = SPEC.full_counts()
    assert hard.macs.ratio == 1 and all((hard.counts[path] == full[path]).all() for path in full)
    assert "time: 1.300x of the dense network's: on xla at 1 image no pruning saves time" in capsys.readouterr().out


# Runs


def test_a_run_to_a_target_of_time_says_what_was_measured(tmp_path, fake_clock, quick_runs, capsys):
    learned = write_checkpoint(tmp_path / "learned", "learn")
    config = dataclasses.replace(
        CONFIG,
        phases=("refine",),
        data=dataclasses.replace(CONFIG.data, batch_size=16),
        learn=dataclasses.replace(CONFIG.learn, target_time=0.7),
        refine=dataclasses.replace(CONFIG.refine, steps=1),
        checkpoint=dataclasses.replace(CONFIG.checkpoint, time=True),
    )
    summary = train(config, str(tmp_path / "run"), init=str(learned))
    assert summary["target_time"] == summary["time"]["target"] == 0.7 and summary["target_macs"] is None
    assert summary["time"]["ratio"] == pytest.approx(0.7, rel=0.03) and summary["time"]["threads"] == 1
    said = capsys.readouterr().out
    assert f"time:   {speed_words(summary['time'])}\n" in said and ", asked for 0.7" in said


@pytest.mark.slow
def test_a_run_that_goes_on_steers_by_the_same_table(tmp_path, fake_clock, quick_runs, capsys):
    learned = write_checkpoint(tmp_path / "learned", "learn")
    config = dataclasses.replace(
        CONFIG,
        phases=("refine",),
        data=dataclasses.replace(CONFIG.data, batch_size=16),
        learn=dataclasses.replace(CONFIG.learn, target_time=0.7),
        refine=dataclasses.replace(CONFIG.refine, steps=1),
    )
    train(config, str(tmp_path / "run"), init=str(learned))
    assert "measuring times" in capsys.readouterr().out
    longer = dataclasses.replace(config, refine=dataclasses.replace(config.refine, steps=2))
    train(longer, str(tmp_path / "run"), init=str(learned))
    assert "measuring times" not in capsys.readouterr().out


@pytest.mark.slow
def test_one_core_is_a_process_of_its_own():
    network, graph = make(**TIED)
    frozen = frozen_of(graph, random_variables(network, graph, 0), graph.full_counts())
    part = {"part": layers_of(frozen)["block01"]}
    assert times_on_one_core(part, 1, "xla", part=True)["part"] > 0
    with pytest.raises(UserError, match="there is no engine 'tvm'"):
        times_on_one_core(part, 1, "tvm", part=True)


# What is refused


def test_a_time_that_cannot_be_reached_is_one_line(fake_clock, table):
    learn = dataclasses.replace(LEARN, target_time=0.005)
    with pytest.raises(UserError) as refused:
        measure_table(learn, SPEC)
    said = str(refused.value)
    assert (
        f"with every masked channel removed {table.least:.3f} of the dense network's time remain (xla, 1 image" in said
    )
    assert len(said.splitlines()) == 1


def test_times_are_measured_again_for_other_masks_or_another_engine(table):
    assert table_of(LEARN, SPEC, table) is table and same_times(LEARN, dataclasses.replace(LEARN, target_time=0.7))
    for field, value in (("engine", "native"), ("engine_batch", 8), ("levels", "0,N"), ("exclude", ("head",))):
        assert not same_times(LEARN, dataclasses.replace(LEARN, **{field: value}))
    with pytest.raises(UserError, match="with every masked channel removed"):
        table_of(dataclasses.replace(LEARN, target_time=0.005), SPEC, table)


def test_masks_whose_time_cannot_be_told_are_refused(monkeypatch):
    learn = LearnConfig(block=2, target_time=0.6)
    with pytest.raises(UserError, match=r"give --learn\.tied, with --learn\.levels 0,N or 0,1,N"):
        check_timed(learn, small(block_by_map={}))
    check_timed(dataclasses.replace(learn, levels="0,N"), small(block_by_map={}))
    monkeypatch.setattr(checks.jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"learn\.target_time is given, and several processes"):
        checks.check_gate(LEARN)


@pytest.mark.parametrize(
    "fields", [{"target_time": 0.0}, {"target_time": 1.5}, {"target_time": 0.5, "target_convention": "paper"}]
)
def test_wrong_targets_are_refused(fields):
    with pytest.raises(UserError, match=r"LearnConfig\.target_"):
        LearnConfig(**fields)


def test_a_target_of_time_needs_no_other_target_beside_it():
    assert LearnConfig(tied=True, levels="0,N", target_macs=None, target_time=0.5).target == 0.5
    with pytest.raises(ValueError, match="lambda_"):
        LearnConfig(target_macs=None)


def test_with_a_target_of_time_groups_are_as_wide_as_the_engine_likes():
    assert LearnConfig(tied=True).multiple == 1 and LEARN.multiple == 8
    assert dataclasses.replace(LEARN, engine="onnxruntime").multiple == 16
    assert dataclasses.replace(LEARN, group_multiple=4).multiple == 4
