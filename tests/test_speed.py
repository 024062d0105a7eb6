"""The time of the pruned network that a run ends with: what is measured, when, and in which words."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from fdjax.checkpoint import find_checkpoint
from fdjax.frozen import Stopwatch
from fdjax.frozen import speed as frozen_speeds
from fdjax.training import measure
from fdjax.training.restore import restore
from fdjax.training.run import train
from fdjax.training.speed import frozen_speed, speed_words
from tests.frozen_checkpoints import CONFIG, write_checkpoint

SPEED = {
    "engine": "xla", "device": "cpu", "threads": 1, "batch": 8, "clock": "processor", "dense_ms": 2.0,
    "pruned_ms": 1.0, "ratio": 0.5, "problem": None, "advice": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    return restore(*find_checkpoint(str(write_checkpoint(tmp_path_factory.mktemp("pruned"), "refine"))))


@pytest.fixture
def bench_says(monkeypatch):
    """Replaces the measurement; returns what is benched, and lets a test say how long the pruned network takes."""
    seen: dict[str, Any] = {"ms": 1.0}

    def bench(networks, engines, *, batch, threads):
        seen.update(networks, engines=engines, batch=batch)
        times = {"dense": 2.0, "pruned": seen["ms"]}
        return [{"clock": "wall", "ms": times[name], "time_ratio": times[name] / 2} for name in networks]

    monkeypatch.setattr(frozen_speeds, "bench_engines", bench)
    return seen


def test_the_pruned_network_is_timed_beside_the_dense_one(pruned):
    learn = dataclasses.replace(CONFIG.learn, engine_batch=2)
    found = frozen_speed(learn, pruned.graph, pruned.state, pruned.hard.counts)
    assert found is not None and json.loads(json.dumps(found)) == found
    assert (found["engine"], found["device"], found["batch"]) == ("xla", "cpu", 2)
    assert found["threads"] >= 1 and found["clock"] in ("processor", "wall")
    assert found["dense_ms"] > 0 and found["ratio"] == found["pruned_ms"] / found["dense_ms"]
    assert (found["advice"] is not None) == (found["ratio"] > 1.02)


def test_what_is_benched_is_the_network_as_it_stands(pruned, bench_says):
    frozen_speed(dataclasses.replace(CONFIG.learn, engine_batch=8), pruned.graph, pruned.state, pruned.hard.counts)
    assert bench_says["batch"] == 8
    sizes = [sum(array.size for array in bench_says[name].arrays.values()) for name in ("pruned", "dense")]
    assert sizes[0] < sizes[1]


def test_a_network_that_is_not_pruned_is_not_timed(pruned, bench_says):
    assert frozen_speed(CONFIG.learn, pruned.graph, pruned.state, pruned.graph.full_counts()) is None
    assert "batch" not in bench_says


def test_masks_that_take_minutes_to_compile_are_not_timed(pruned, bench_says, monkeypatch):
    monkeypatch.setattr(frozen_speeds, "_MOST_PARTIAL_COUNTS", 1)
    found = frozen_speed(CONFIG.learn, pruned.graph, pruned.state, pruned.hard.counts)
    assert found is not None and found["ratio"] is found["pruned_ms"] is None and "batch" not in bench_says
    words = speed_words(found)
    assert words.startswith("not measured") and "fdjax bench" in words and "--learn.levels 0,N" in words
    # Whole channels are: only counts between none and all are slow to compile.
    raised = {
        path: np.where(count > 0, pruned.graph.mask_sizes[path][1], 0) for path, count in pruned.hard.counts.items()
    }
    raised["block01/wide"][0] = 0
    measured = frozen_speed(CONFIG.learn, pruned.graph, pruned.state, raised)
    assert measured is not None and measured["ratio"] == 0.5


def test_under_the_gate_by_time_forms_are_chosen_by_time(pruned, bench_says, monkeypatch):
    asked = []

    def choose(self, candidates):
        asked.append(self.batch)
        return next(iter(candidates))

    monkeypatch.setattr(Stopwatch, "choose", choose)
    learn = dataclasses.replace(CONFIG.learn, engine_batch=4)
    frozen_speed(learn, pruned.graph, pruned.state, pruned.hard.counts)
    assert asked == []
    frozen_speed(dataclasses.replace(learn, gate="time"), pruned.graph, pruned.state, pruned.hard.counts)
    assert set(asked) == {4}


@pytest.mark.parametrize(
    ("settings", "named", "not_named"),
    [
        (
            {},
            (
                "--learn.gate time --learn.engine xla --learn.engine-batch 8",
                "--learn.levels 0,N",
                "--learn.group-multiple 8",
            ),
            (),
        ),
        ({"gate": "time"}, ("--learn.levels 0,N",), ("--learn.gate ",)),
        ({"levels": "0,N"}, ("--learn.gate time",), ("--learn.levels",)),
        ({"tied": False}, ("--learn.gate time", "--learn.group-multiple 8"), ()),
        ({"gate": "time", "levels": "0,N", "group_multiple": 16}, ("a wider network",), ("--learn",)),
    ],
)
def test_a_slower_network_is_told_what_else_to_ask_for(pruned, bench_says, settings, named, not_named):
    learn = dataclasses.replace(CONFIG.learn, engine_batch=8, **settings)
    bench_says["ms"] = 3.0
    found = frozen_speed(learn, pruned.graph, pruned.state, pruned.hard.counts)
    assert found is not None
    words = speed_words(found)
    assert "1.50x the time, slower than the dense network; try " in words and len(words.splitlines()) == 1
    assert all(name in words for name in named) and not any(name in words for name in not_named)
    bench_says["ms"] = 1.0
    faster = frozen_speed(learn, pruned.graph, pruned.state, pruned.hard.counts)
    assert faster is not None and faster["advice"] is None and "slower" not in speed_words(faster)


def test_the_line_names_the_engine_the_threads_and_the_batch():
    assert speed_words(SPEED) == "1 ms for 8 images, frozen, by xla on cpu, 1 thread; dense 2 ms: 0.50x the time"
    other = {**SPEED, "device": "NVIDIA H100", "threads": None, "batch": 1}
    assert speed_words(other).startswith("1 ms for 1 image, frozen, by xla on NVIDIA H100; dense")


@pytest.mark.parametrize("asked", [True, False])
def test_a_run_that_has_pruned_ends_with_its_time(tmp_path, monkeypatch, capsys, quick_runs, asked):
    def measured(learn, graph, state, counts):
        assert learn.engine_batch == 8 and any(np.min(count) == 1 for count in counts.values())
        # The result is safe before anything can go wrong here.
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["top1"] >= 0
        return SPEED

    monkeypatch.setattr(measure, "frozen_speed", measured)
    learned = write_checkpoint(tmp_path / "learned", "learn")
    config = dataclasses.replace(
        CONFIG,
        phases=("refine",),
        data=dataclasses.replace(CONFIG.data, batch_size=16),
        learn=dataclasses.replace(CONFIG.learn, engine_batch=8),
        refine=dataclasses.replace(CONFIG.refine, steps=1),
        checkpoint=dataclasses.replace(CONFIG.checkpoint, time=asked),
    )
    summary = train(config, str(tmp_path / "run"), init=str(learned))
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["time"] == (SPEED if asked else None)
    said = capsys.readouterr().out
    assert (f"time:   {speed_words(SPEED)}\n" in said) == asked
    # Asked for or not, it is the same run; a time that was not measured is measured when it is asked for.
    again = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, time=not asked))
    assert train(again, str(tmp_path / "run"), init=str(learned)) == {**summary, "time": SPEED}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["time"] == SPEED
