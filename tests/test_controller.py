"""The controller on lambda, on masks simulated in numpy: it brings them down evenly, to the target, and holds them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fdjax
from fdjax.config import LearnConfig
from fdjax.pruning.expected import expected_ratio
from fdjax.training.controller import first_lambda, next_lambda, offset_of, ratio_at, wanted_offset
from fdjax.training.steps import excess_penalty
from tests.small_network import one_unit, small

STEPS, RATE, MOMENTUM = 400, 0.1, 0.9


def simulate(target: float, ramp: float, first: float, every: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Masks of 200 channels that a task holds up, each with its own strength, and that lambda pulls down.

    Returns:
      The share that is left, and lambda, at every step.
    """
    rng = np.random.default_rng(seed)
    strength, masks, trace = 10.0 ** rng.uniform(-4, -2, 200), np.ones(200), np.zeros(200)
    lambda_, previous, start = first, np.nan, np.nan
    shares, lambdas = [], []
    for step in range(STEPS):
        if step % every == 0:
            offset = (target - masks.mean()) / (1 - target)
            if np.isnan(start):
                start = offset
            else:
                lambda_ = next_lambda(lambda_, offset, previous, start, step / STEPS, every / STEPS, ramp)
            previous = offset
        # What is left of a channel is missed the more the less of it there is.
        gradient = lambda_ / 200 - strength * (1.5 - masks) + rng.normal(0, 1e-4, 200)
        trace = MOMENTUM * trace + gradient
        masks = np.clip(masks - RATE * trace, 0, 1)
        shares.append(masks.mean())
        lambdas.append(lambda_)
    return np.array(shares), np.array(lambdas)


def test_the_first_lambda_of_a_network_without_pointwise_layers() -> None:
    """Its masks of whole channels are on 3x3 convolutions."""

    def apply(variables, x):
        for name in ("one", "two"):
            x = jax.nn.relu(jax.lax.conv_general_dilated(x, variables[name]["kernel"], (1, 1), "SAME",
                                                         dimension_numbers=("NHWC", "HWIO", "NHWC")))  # fmt: skip
        return x.mean((1, 2))

    variables = {"one": {"kernel": jnp.ones((3, 3, 3, 8))}, "two": {"kernel": jnp.ones((3, 3, 8, 4))}}
    graph = fdjax.with_masks(fdjax.trace(apply, variables, jnp.zeros((1, 8, 8, 3))))
    assert not graph.blocks and graph.masks
    assert 0 < first_lambda(LearnConfig(tied=True, levels="0,N", penalty="macs"), graph, 100) < np.inf


@pytest.mark.parametrize("target", [0.8, 0.5, 0.3, 0.1])
@pytest.mark.parametrize("first", [0.01, 0.07, 0.5])
def test_masks_come_down_to_the_target_and_stay_there(target: float, first: float) -> None:
    shares, lambdas = simulate(target, 0.75, first, 8)
    assert abs(shares[-40:].mean() - target) < 0.05
    # Never far below it on the way: what is gone is hard to get back.
    assert shares.min() > target - 0.12
    assert (lambdas > 0).all()


@pytest.mark.parametrize("target", [0.5, 0.3])
def test_masks_come_down_evenly(target: float) -> None:
    shares, _ = simulate(target, 0.75, 0.5, 8)
    left = 1 - np.minimum(np.arange(STEPS) / (0.75 * STEPS), 1)
    assert np.abs(shares - (target + (1 - target) * left**2)).max() < 0.15


def test_lambda_rises_when_masks_are_late_and_falls_when_they_are_early() -> None:
    at = {"start": -1.0, "progress": 0.4, "interval": 0.02, "ramp": 0.8}
    assert next_lambda(1.0, -0.5, -0.5, **at) > 1 > next_lambda(1.0, -0.1, -0.15, **at)
    # On the line, at the speed of the line, it stays: (1 - p / 0.8)^2 falls by 1.25 for each unit of p at p = 0.4.
    assert next_lambda(1.0, -0.25, -0.275, **at) == pytest.approx(1.0)
    # One look changes it by half at the most.
    assert next_lambda(1.0, -1.0, -0.1, **at) == pytest.approx(1.5)


def test_the_first_lambda_is_the_users_or_follows_from_the_length_of_the_phase() -> None:
    graph = small()
    assert first_lambda(LearnConfig(lambda_=3.0, target_macs=None), graph, 100) == 3.0
    for penalty in ("fcmask", "macs"):
        learn = LearnConfig(penalty=penalty)
        assert first_lambda(learn, graph, 100) == pytest.approx(2 * first_lambda(learn, graph, 200))


@pytest.mark.parametrize("target", [0.8, 0.5, 0.2])
@pytest.mark.parametrize("steps", [100, 400])
def test_masks_follow_the_aim_in_short_phases_too(target: float, steps: int) -> None:
    rng = np.random.default_rng(0)
    strength, masks, adam = 10.0 ** rng.uniform(-4, -2, 200), np.ones(200, np.float32), optax.adam(0.04)
    update, state, shares = jax.jit(adam.update), adam.init(jnp.asarray(masks)), []
    lambda_ = first_lambda(LearnConfig(approach="aim", target_macs=target), small(), steps)
    for step in range(steps):
        excess = max(0.0, masks.mean() - ratio_at(wanted_offset(-1.0, step / steps, 0.75), target))
        gradient = lambda_ * 2 * excess / 200 - strength * (1.5 - masks) + rng.normal(0, 1e-4, 200)
        moves, state = update(jnp.asarray(gradient, jnp.float32), state)
        masks = np.clip(masks + np.asarray(moves), 0, 1)
        shares.append(masks.mean())
    assert np.abs(np.array(shares[-steps // 10 :]) - target).max() < 0.02
    assert min(shares) > target - 0.03
    # What the task misses most is kept.
    assert np.corrcoef(np.log(strength), masks)[0, 1] > 0.7


@given(ratio=st.floats(0, 2), target=st.floats(0.01, 1))
def test_an_offset_and_its_ratio_are_inverse(ratio: float, target: float) -> None:
    assert ratio_at(offset_of(ratio, target), target) == pytest.approx(ratio, abs=1e-9)


@given(start=st.floats(-2, 1), progress=st.floats(0, 1), ramp=st.floats(0.01, 1))
def test_the_aim_rises_from_the_start_to_the_target_and_stays_there(start: float, progress: float, ramp: float) -> None:
    aim = wanted_offset(start, progress, ramp)
    assert min(start, 0) <= aim <= 0
    assert aim <= wanted_offset(start, min(1.0, progress + 0.01), ramp)
    assert wanted_offset(start, ramp, ramp) == 0
    assert wanted_offset(start, 0, ramp) == min(start, 0)


@pytest.mark.parametrize("penalty", ["macs", "fcmask"])
def test_only_the_excess_over_the_aim_is_penalized(penalty: str) -> None:
    learn = LearnConfig(penalty=penalty, levels="0,1,N", tied=True, approach="aim", target_macs=0.5)
    graph = one_unit(channels=4, wide=8, features=6, side=8, stride=1, block=2)
    masks = {path: jnp.full(channels, 0.8) for path, (channels, _) in graph.mask_sizes.items()}
    cost = float(expected_ratio(graph, masks, learn.counts_below_whole))
    value = jax.jit(jax.value_and_grad(lambda masks, offset: excess_penalty(graph, masks, learn, offset)))

    below, still = value(masks, jnp.float32(offset_of(cost + 0.01, 0.5)))
    assert below == 0 and not any(leaf.any() for leaf in jax.tree.leaves(still))
    above, pulled = value(masks, jnp.float32(offset_of(cost - 0.1, 0.5)))
    assert above == pytest.approx(0.1**2 if penalty == "macs" else 2 * 0.1 * 0.8, abs=1e-5)
    assert all((leaf > 0).all() for leaf in jax.tree.leaves(pulled))


def test_an_aim_needs_a_target() -> None:
    with pytest.raises(ValueError, match="approach"):
        LearnConfig(approach="aim", target_macs=None, lambda_=1.0)
    assert first_lambda(LearnConfig(approach="aim"), small(), 100) == first_lambda(
        LearnConfig(approach="aim"), small(), 9
    )
