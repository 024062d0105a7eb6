"""The short form of `python -m tools.faults`: damage to all that is read; the result is right or refused."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from fdjax.frozen.artifact import freeze_network
from fdjax.training.network import graph_variables
from fdjax.training.restore import open_checkpoint
from tests.frozen_checkpoints import write_checkpoint
from tools.faults.__main__ import plan, try_fault
from tools.faults.damage import BYTES, change_json
from tools.faults.victims import of_configs, of_data, of_frozen
from tools.faults.worker import Outcome, Worker

FAULTS = 90


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


def test_damage_of_every_kind_is_noticed_or_harmless(tmp_path, worker) -> None:
    _, _, restored = open_checkpoint(str(write_checkpoint(tmp_path / "run", "refine")))
    assert restored.hard is not None
    variables = graph_variables(restored.graph, restored.state.params, restored.state.batch_stats)
    freeze_network(restored.graph, variables, restored.hard.counts).save(tmp_path / "frozen")
    victims = [victim for family in (of_frozen, of_data, of_configs) for victim in family(tmp_path, worker)]
    results = [try_fault(victim, seed, tmp_path, worker) for victim, seed in plan(victims, FAULTS)]
    assert [entry for entry in results if entry["result"] == "wrong"] == []
    found = {entry["result"] for entry in results}
    assert found == {"right", "refused"} and len(results) >= FAULTS - len(victims)


def test_every_way_to_damage_a_file_changes_it(tmp_path) -> None:
    for number, way in enumerate(BYTES):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "other").write_bytes(b"other")
        file, content = folder / "file", bytes(range(1, 200))
        file.write_bytes(content)
        assert way(file, random.Random(0))
        assert not file.is_file() or file.read_bytes() != content, way.__name__


def test_json_is_changed_in_one_place() -> None:
    for seed in range(50):
        value, said = change_json({"a": [1, 2, {"b": "text"}], "c": 3}, random.Random(seed))
        assert said and value != {"a": [1, 2, {"b": "text"}], "c": 3}


@pytest.mark.parametrize(
    ("outcome", "problem"),
    [
        (Outcome(0, "fine", "", 1.0, 0), None),
        (Outcome(2, "", "error: no such file; give another", 1.0, 0), None),
        (Outcome(None, "", "Traceback ...\nKeyError: 'x'", 1.0, 0), "ended by KeyError: 'x'"),
        (Outcome(1, "", "Traceback (most recent call last)\nerror: x", 1.0, 0), "printed a traceback"),
        (Outcome(2, "", "", 1.0, 0), "exit status 2 without a word"),
        (Outcome(-11, "", "", 1.0, 0), "exit status -11"),
        (Outcome(2, "", "error: " + "line\n" * 20, 1.0, 0), "a message of 20 lines"),
    ],
)
def test_what_counts_as_wrong(outcome: Outcome, problem: str | None) -> None:
    assert outcome.problem() == problem
