"""The controller on lambda, on masks simulated in numpy: it brings them down evenly, to the target, and holds them."""

from __future__ import annotations

import numpy as np
import pytest

from fdjax.config import LearnConfig
from fdjax.training.controller import first_lambda, next_lambda
from tests.small_network import small

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
