"""How examples reach the steps: in one dispatch or several, from the devices or the host, the figures are the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from fdjax.config import ComputeConfig
from fdjax.data import TrainingOrder
from fdjax.training.chunks import chunks_of
from fdjax.training.devices import Devices
from fdjax.training.feed import Feed
from fdjax.training.phases import plan_phases
from fdjax.training.run import train
from tests.tiny_run import PHASES, get_config

CONFIG = dataclasses.replace(get_config(), phases=("pretrain", "learn"))


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[dict, list[dict]]:
    """Summary and records of a run with one step a dispatch."""
    workdir = tmp_path_factory.mktemp("feed") / "plain"
    config = dataclasses.replace(CONFIG, compute=ComputeConfig(data_on_device="yes", steps_per_dispatch=1))
    return train(config, str(workdir)), records(workdir)


@pytest.mark.parametrize(
    "compute",
    [
        pytest.param(ComputeConfig(data_on_device="yes", steps_per_dispatch=4), id="four-steps-a-dispatch"),
        pytest.param(ComputeConfig(data_on_device="no"), id="from-the-host", marks=pytest.mark.slow),
    ],
)
def test_figures_do_not_depend_on_how_steps_are_fed(plain, tmp_path, compute):
    summary = train(dataclasses.replace(CONFIG, compute=compute), str(tmp_path / "run"))
    expected, expected_records = plain
    for name in ("top1", "dense_top1", "loss"):
        assert summary[name] == pytest.approx(expected[name], rel=1e-3, abs=2e-3)
    assert summary["macs"]["ratio"] == pytest.approx(expected["macs"]["ratio"], rel=1e-3)
    got = records(tmp_path / "run")
    place = ("step", "phase")
    assert [[r[k] for k in place] + sorted(r) for r in got] == [
        [r[k] for k in place] + sorted(r) for r in expected_records
    ]
    for record, other in zip(got, expected_records, strict=True):
        for name in ("train_loss", "train_top1", "test_loss", "validation_loss", "lambda", "macs_ratio"):
            assert record.get(name) == (pytest.approx(other[name], rel=1e-3) if name in other else None)


def chunks(steps_per_dispatch: int, phase: str, begin: int) -> list[tuple]:
    """The chunks of a phase of a run that alternates, as (first step, steps, program, examples)."""
    config = dataclasses.replace(get_config(), phases=PHASES)
    order = TrainingOrder(config.seed, np.arange(9000), config.data.batch_size)
    plan = next(p for p in plan_phases(config, order.per_epoch) if p.name == phase)
    # A stop every three steps, such as a record or a checkpoint.
    made = chunks_of(
        config, plan, begin, lambda step: step % 3 == 0 or step == plan.steps, steps_per_dispatch, order.rows
    )
    return [(chunk.first, chunk.steps, chunk.key, rows) for chunk, rows in made]


@pytest.mark.parametrize("begin", [0, 2])
@pytest.mark.parametrize("phase", ["pretrain", "alternate"])
def test_chunks_cover_a_phase_and_end_at_stops_and_changes_of_program(phase, begin):
    single = chunks(1, phase, begin)
    several = chunks(4, phase, begin)
    assert [first for first, *_ in single] == list(range(begin, get_config().pretrain.steps or 0))
    assert all(steps == 1 == len(rows) for _, steps, _, rows in single)
    at = begin
    for first, steps, _, rows in several:
        assert (first, steps) == (at, len(rows))
        assert 1 <= steps <= 4
        assert not any(step % 3 == 0 for step in range(first + 1, first + steps))
        at += steps
    assert [key for *_, key, _ in single] == [key for _, steps, key, _ in several for _ in range(steps)]
    np.testing.assert_array_equal(np.concatenate([c[3] for c in single]), np.concatenate([c[3] for c in several]))
    if phase == "pretrain":
        assert [steps for _, steps, *_ in several] == [3 - begin % 3, 3]
    else:  # Masks and weights take turns of one step.
        assert {key if key == "masks" else key[0] for *_, key, _ in several} == {"masks", "weights"}
        assert all(steps == 1 for _, steps, *_ in several)


class _Counted:
    """An array that notes which rows are read."""

    def __init__(self, array: np.ndarray):
        self._array, self.read = array, []
        self.shape, self.dtype, self.nbytes = array.shape, array.dtype, array.nbytes

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        self.read.extend(np.asarray(rows).tolist())
        return self._array[rows]


def examples(count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(0).integers(0, 256, (count, 2, 2, 1), np.uint8)
    return images, np.arange(count)


def test_the_host_feed_reads_the_rows_that_are_asked_for_and_keeps_their_order():
    images, labels = examples()
    source = _Counted(images)
    feed = Feed(Devices(), source, labels, resident=False, steps_per_dispatch=5)  # type: ignore[arg-type]
    assert (feed.resident, feed.longest) == (False, 1)
    assert source.read == []
    plan = np.random.default_rng(1).permutation(len(labels))[:32].reshape(4, 1, 8)
    given = list(feed.batches(enumerate(plan)))
    assert source.read == plan.ravel().tolist()
    assert [item for item, _ in given] == [0, 1, 2, 3]
    for (_, (some, their)), rows in zip(given, plan, strict=True):
        np.testing.assert_array_equal(some, images[rows[0]])
        np.testing.assert_array_equal(their, labels[rows[0]])


def test_the_host_feed_reads_little_ahead():
    images, labels = examples()
    source = _Counted(images)
    plan = np.arange(40).reshape(5, 1, 8)
    asked = []
    feed = Feed(Devices(), source, labels, resident=False)  # type: ignore[arg-type]
    batches = feed.batches((asked.append(item), rows) for item, rows in enumerate(plan))
    assert not asked
    next(batches)
    assert len(asked) <= 3
    batches.close()
    assert len(source.read) <= 3 * 8


def test_an_error_in_the_source_reaches_the_run():
    class Broken(_Counted):
        def __getitem__(self, rows):
            raise OSError("the disk is gone")

    images, labels = examples()
    feed = Feed(Devices(), Broken(images), labels, resident=False)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="the disk is gone"):
        list(feed.batches(enumerate(np.arange(16).reshape(2, 1, 8))))


def test_resident_examples_are_chosen_by_index_and_short_chunks_are_filled_up():
    images, labels = examples()
    feed = Feed(Devices(local=1), images, labels, resident=True, steps_per_dispatch=3)
    assert feed.longest == 3
    rows = np.arange(16).reshape(2, 8)
    ((item, (some, their, indices, count)),) = feed.batches([("both", rows)])
    assert (item, int(count), indices.shape) == ("both", 2, (3, 8))
    np.testing.assert_array_equal(jnp.asarray(some)[indices[:2]], images[rows])
    np.testing.assert_array_equal(jnp.asarray(their)[indices[:2]], labels[rows])


def test_small_data_lie_on_the_devices_and_large_ones_do_not():
    images, labels = examples()
    assert Feed(Devices(), images, labels).resident
    large = _Counted(images)
    large.nbytes = (2 << 30) + 1
    assert not Feed(Devices(), large, labels).resident  # type: ignore[arg-type]
