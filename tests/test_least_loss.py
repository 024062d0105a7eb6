"""Rounding by what a level loses and costs: against brute force, on plain cases, and in a run."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from fdjax.checkpoint import find_checkpoint
from fdjax.config import LearnConfig
from fdjax.errors import UserError
from fdjax.pruning import harden_to_target, round_masks
from fdjax.pruning.least_loss import level_losses, price_at, round_by_loss
from fdjax.spec import tied_mask, unit_group_macs, units
from fdjax.training.restore import restore
from fdjax.training.run import train
from tests.small_network import small
from tests.tiny_run import get_config

LEVELS = (0, 1)
SPEC = small(width=0.3, tied=True, levels=LEVELS, block_by_map={})
TIED = {path: roles for roles in units(SPEC).values() if (path := tied_mask(roles))}


def random_masks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {path: rng.uniform(0, 1, channels).astype(np.float32) for path, (channels, _) in SPEC.mask_sizes.items()}


def energies(of_coefs) -> dict:
    """`of_coefs`: (rng, channels) -> energy [N, channels]; every side has its own."""
    rng = np.random.default_rng(1)
    return {
        (roles[role].name, side): {2: of_coefs(rng, SPEC.mask_sizes[path][0])}
        for path, roles in TIED.items()
        for role, side in (("expand", "output"), ("project", "input"))
    }


def white(rng: np.random.Generator, channels: int) -> np.ndarray:
    return rng.uniform(0.5, 1.5, (4, channels))


def test_every_channel_takes_the_level_of_least_loss_and_cost():
    masks, found, price = random_masks(), energies(white), 3.0
    counts = round_by_loss(SPEC, level_losses(SPEC, masks, found, LEVELS), LEVELS, price)
    dense = sum(layer.dense_macs for layer in SPEC.counted_layers)
    assert counts.keys() == TIED.keys()
    for path, roles in TIED.items():
        for channel, m in enumerate(masks[path]):
            # Levels 0, 1, 4 with N = 4: the mean fades from 0 to 0.5, the other three coefficients from 0.5 to 1.
            soft = np.clip([2 * m, *[2 * m - 1] * 3], 0, 1)
            objective = {}
            for level in (0, 1, 4):
                lost = 0.0
                for role, side in (("expand", "output"), ("project", "input")):
                    energy = found[roles[role].name, side][2]
                    all_soft = np.clip(np.stack([2 * masks[path], *[2 * masks[path] - 1] * 3]), 0, 1)
                    total = (all_soft**2 * energy).sum()
                    lost += sum((soft[n] - (n < level)) ** 2 * energy[n, channel] for n in range(4)) / total / 2
                macs = unit_group_macs(SPEC, roles, np.array([level]), narrow_transforms=False)
                objective[level] = lost + price * sum(macs.values()) / dense
            assert counts[path][channel] == min(objective, key=objective.__getitem__)


@pytest.mark.parametrize(("smooth", "level"), [(True, 1), (False, 4)])
def test_a_channel_keeps_its_mean_only_where_its_energy_lies_there(smooth: bool, level: int):
    """At 0.8 the nearest level is N; where nearly all is in the mean, the mean loses next to nothing for less."""
    masks = {path: np.full(channels, 0.8, np.float32) for path, (channels, _) in SPEC.mask_sizes.items()}
    assert all((round_masks(SPEC, masks, LEVELS)[path] == 4).all() for path in TIED)
    share = 1e-4 if smooth else 1.0

    def of_coefs(_, channels: int) -> np.ndarray:
        return np.array([1, share, share, share])[:, None] * np.ones(channels)

    counts = round_by_loss(SPEC, level_losses(SPEC, masks, energies(of_coefs), LEVELS), LEVELS, 0.05)
    for path in TIED:
        assert (counts[path] == level).all()


def test_without_a_price_whole_and_dead_channels_stay_and_with_any_the_count_falls():
    masks = {path: (np.arange(channels) % 2).astype(np.float32) for path, (channels, _) in SPEC.mask_sizes.items()}
    losses = level_losses(SPEC, masks, energies(white), LEVELS)
    free = round_by_loss(SPEC, losses, LEVELS, 0.0)
    for path in TIED:
        np.testing.assert_array_equal(free[path], 4 * masks[path])
    totals = [
        sum(kept.sum() for kept in round_by_loss(SPEC, losses, LEVELS, price_at(offset)).values())
        for offset in np.linspace(-0.99, 0.99, 21)
    ]
    assert totals == sorted(totals) and totals[0] == 0 and totals[-1] == sum(4 * len(masks[path]) for path in TIED)


@pytest.mark.parametrize("target", [0.35, 0.5, 0.65, 0.8])
def test_the_target_is_met(target: float):
    masks = random_masks()
    losses = level_losses(SPEC, masks, energies(white), LEVELS)
    hard = harden_to_target(SPEC, masks, target, levels=LEVELS, losses=losses)
    assert hard.macs.ratio == pytest.approx(target, rel=0.02)
    nearest = harden_to_target(SPEC, masks, target, levels=LEVELS)
    assert any((hard.counts[path] != nearest.counts[path]).any() for path in TIED)


@pytest.mark.usefixtures("few_test_images")
def test_a_run_measures_losses_and_its_checkpoints_round_alike(tmp_path):
    base = get_config()
    learn = dataclasses.replace(
        base.learn, tied=True, levels="0,1,N", penalty="macs", rounding="least_loss", block_by_map=(), target_macs=0.7
    )
    config = dataclasses.replace(base, phases=("pretrain", "learn", "refine"), learn=learn)
    summary = train(config, str(tmp_path / "run"))
    learned = next(phase for phase in summary["phases"] if phase["name"] == "learn")
    assert learned["ratio"] == summary["macs"]["ratio"] == pytest.approx(0.7, rel=0.05)
    checkpoints, newest = find_checkpoint(str(tmp_path / "run"))
    end_of_learn = restore(checkpoints, summary["phases"][0]["steps"] + learned["steps"])
    assert end_of_learn.done.level_losses and end_of_learn.hard is not None
    refined = restore(checkpoints, newest)
    assert not refined.done.level_losses and refined.hard is not None
    for path, counts in refined.hard.counts.items():
        np.testing.assert_array_equal(end_of_learn.hard.counts[path], counts)
    # From the checkpoint after learning: not inherited but measured again, and the same.
    learned_at = str(checkpoints.folder / str(summary["phases"][0]["steps"] + learned["steps"]))
    again = train(config, str(tmp_path / "again"), init=learned_at)
    kept = [{layer["name"]: layer["kept_counts"] for layer in found["layers"]} for found in (summary, again)]
    assert json.dumps(kept[0]) == json.dumps(kept[1])


def test_masks_must_be_tied():
    with pytest.raises(UserError, match=r"rounding must be 'nearest' where masks are not tied .*, got 'least_loss'"):
        LearnConfig(rounding="least_loss")
