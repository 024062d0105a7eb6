"""The gate by measured time: what is slower pruned is released before refinement, and the target is still met."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from fdjax.config import LearnConfig
from fdjax.errors import UserError
from fdjax.frozen.choice import Stopwatch
from fdjax.training import checks, rounding
from fdjax.training.build import hard_masks, hard_masks_by_time
from fdjax.training.run import train
from tests.frozen_checkpoints import CONFIG, write_checkpoint
from tests.small_network import small
from tests.tiny_run import get_config

LEARN = LearnConfig(block=2, tied=True, levels="0,1,N", target_macs=0.6)
SPEC = small(tied=True, levels=LEARN.counts_below_whole, block_by_map={})


class FakeStopwatch(Stopwatch):
    """Finds some layers slower pruned than released."""

    slower: frozenset[str] = frozenset({"block01", "head"})

    def measure(self, layer, candidates):
        return {
            name: 1.0 + name.startswith("released") * (-0.5 if layer in self.slower else 0.5) for name in candidates
        }


@pytest.fixture
def whole_network(monkeypatch):
    """Lets a test say what the whole network takes of the dense one's time, measurement by measurement."""
    says = [0.8]
    monkeypatch.setattr(rounding, "speed_on", lambda *_, **__: {"ratio": says.pop(0) if len(says) > 1 else says[0]})
    return says


def masks():
    rng = np.random.default_rng(0)
    return unflatten_dict({path: rng.uniform(0, 1, c) for path, (c, _) in SPEC.mask_sizes.items()}, sep="/")


def partial(counts: np.ndarray, num_coefs: int) -> bool:
    return bool(((counts > 0) & (counts < num_coefs)).any())


def test_slower_layers_are_released_and_the_rest_meets_the_target():
    by_macs = hard_masks(LEARN, SPEC, masks(), to_target=True)
    by_time = hard_masks_by_time(LEARN, SPEC, masks(), FakeStopwatch())
    sizes = SPEC.mask_sizes
    assert partial(by_macs.counts["block01/wide"], sizes["block01/wide"][1])
    assert partial(by_time.counts["block02/wide"], sizes["block02/wide"][1])
    for path in ("block01/wide", "head/input", "head/output"):
        assert not partial(by_time.counts[path], sizes[path][1])
    assert {"block01/expand", "block01/project", "head"} <= set(by_time.released)
    assert by_time.macs.ratio == pytest.approx(0.6, rel=0.02) and by_time.offset < by_macs.offset


def test_where_nothing_is_slower_it_is_the_gate_by_macs():
    stopwatch = FakeStopwatch()
    stopwatch.slower = frozenset()
    by_time = hard_masks_by_time(LEARN, SPEC, masks(), stopwatch)
    # While masks are learned they are rounded by MACs, whatever the gate.
    for gate in ("macs", "time"):
        by_macs = hard_masks(dataclasses.replace(LEARN, gate=gate), SPEC, masks(), to_target=True)
        assert by_time.released == by_macs.released and by_time.macs == by_macs.macs


def test_a_run_refines_what_the_gate_by_time_left(tmp_path, monkeypatch, capsys, quick_runs, whole_network):
    monkeypatch.setattr(FakeStopwatch, "slower", frozenset({"block01"}))
    monkeypatch.setattr(rounding, "Stopwatch", FakeStopwatch)
    learned = write_checkpoint(tmp_path / "learned", "learn")
    config = dataclasses.replace(
        CONFIG,
        phases=("refine",),
        data=dataclasses.replace(CONFIG.data, batch_size=16),
        learn=dataclasses.replace(CONFIG.learn, gate="time"),
        refine=dataclasses.replace(CONFIG.refine, steps=1),
    )
    summary = train(config, str(tmp_path / "run"), init=str(learned))
    assert "released for being slower pruned" in capsys.readouterr().out
    for layer in summary["layers"]:
        if layer["name"] in ("block01/expand", "block01/project"):
            assert layer["released"]
            for counts in layer["kept_counts"].values():
                assert counts is None or not any(counts[1:-1])
    (refined,) = summary["phases"]
    assert refined["ratio"] == summary["macs"]["ratio"] == pytest.approx(0.7, rel=0.05)


@pytest.mark.slow
def test_a_run_that_learns_under_the_gate_by_time_refines_what_it_left(tmp_path, monkeypatch, whole_network):
    monkeypatch.setattr(FakeStopwatch, "slower", frozenset({"block01"}))
    monkeypatch.setattr(rounding, "Stopwatch", FakeStopwatch)
    base = get_config()
    learn = dataclasses.replace(base.learn, tied=True, penalty="macs", gate="time", block_by_map=())
    config = dataclasses.replace(base, phases=("pretrain", "learn", "refine"), learn=learn)
    summary = train(config, str(tmp_path / "run"))
    assert {layer["name"] for layer in summary["layers"] if layer["released"]} >= {"block01/expand", "block01/project"}
    assert summary["phases"][-1]["ratio"] == summary["macs"]["ratio"] == pytest.approx(0.7, rel=0.05)


@pytest.mark.parametrize(
    ("ratios", "kept"),
    [
        ([1.01, 0.5], "as learned"),
        ([1.3, 0.9], "whole channels"),
        ([1.3, 1.02], "whole channels"),
        ([1.03, 1.025], "nothing"),
        ([1.3, 1.4], "nothing"),
        ([1.3, None], "nothing"),
        ([None, 0.5], "as learned"),
    ],
)
def test_a_network_that_is_slower_as_a_whole_is_pruned_less_or_not(monkeypatch, whole_network, capsys, ratios, kept):
    monkeypatch.setattr(FakeStopwatch, "slower", frozenset())
    monkeypatch.setattr(rounding, "Stopwatch", FakeStopwatch)
    whole_network[:] = ratios
    hard = rounding.gated_masks(dataclasses.replace(LEARN, gate="time"), SPEC, masks(), learned=True)
    parts = any(partial(count, SPEC.mask_sizes[path][1]) for path, count in hard.counts.items())
    assert parts == (kept == "as learned") and (hard.macs.ratio == 1) == (kept == "nothing")
    said = capsys.readouterr().out
    assert ("and these are kept" in said) == (kept == "whole channels")
    assert ("on xla at 1 image no pruning saves time, so nothing is pruned" in said) == (kept == "nothing")
    assert ("every layer released for being slower pruned; 1.000x MACs" in said) == (kept == "nothing")
    assert ("every layer, but for the channels that are removed whole," in said) == (kept == "whole channels")


def test_where_only_whole_channels_are_pruned_the_gate_has_nothing_to_release(monkeypatch, whole_network, capsys):
    monkeypatch.setattr(rounding, "Stopwatch", FakeStopwatch)
    whole_network[:] = [0.7]
    learn = dataclasses.replace(LEARN, levels="0,N", gate="time")
    network = small(tied=True, levels=learn.counts_below_whole, block_by_map={})
    hard = rounding.gated_masks(learn, network, masks(), learned=True)
    assert hard.macs.ratio < 1 and {*hard.released} == {*network.wrapped_layers}
    assert "gate: nothing released for being slower pruned" in capsys.readouterr().out


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checks.jax, "process_count", lambda: 2)
    base = get_config()
    config = dataclasses.replace(base, learn=dataclasses.replace(base.learn, gate="time"))
    with pytest.raises(UserError, match="several processes would measure different times"):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
