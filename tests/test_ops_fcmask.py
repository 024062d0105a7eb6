"""FCMask: coefficient masks, rounding, penalty, and gradients at the corners."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fdjax.ops import coef_mask, fcmask_penalty, hard_coef_mask, kept_counts
from fdjax.ops.fcmask import counts_to_fcmask, level_counts, nearest_level

CHANNELS = 6
TOTALS = (1, 4, 9, 16, 49)
UNIT = st.floats(0, 1, width=32)
# Counts below N, as configs give them: some may be no smaller than N.
LEVELS = st.one_of(st.none(), st.lists(st.integers(0, 20), max_size=5).map(tuple))
FCMASKS = st.lists(UNIT, min_size=CHANNELS, max_size=CHANNELS).map(lambda m: np.array(m, np.float32))


def paper_formula(fcmask: np.ndarray, num_coefs: int) -> np.ndarray:
    """Section 3.3, in float64, one value at a time."""
    return np.array(
        [[min(max((m - n / num_coefs) * num_coefs, 0.0), 1.0) for m in map(float, fcmask)] for n in range(num_coefs)]
    )


@given(FCMASKS, st.sampled_from(TOTALS))
@example(np.array([0, 1, 0.5, 0.25, 0.125, 1], np.float32), 4)
def test_coefficient_mask_is_the_papers_formula(fcmask: np.ndarray, num_coefs: int) -> None:
    mask = coef_mask(jnp.asarray(fcmask), num_coefs)
    assert mask.shape == (num_coefs, CHANNELS)
    np.testing.assert_allclose(mask, paper_formula(fcmask, num_coefs), atol=1e-5)


def test_coefficient_mask_by_hand() -> None:
    mask = coef_mask(jnp.array([0.0, 0.125, 0.5, 0.6875, 1.0]), 4)
    np.testing.assert_array_equal(
        mask, np.array([[0, 0.5, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0.75, 1], [0, 0, 0, 0, 1]])
    )


@given(FCMASKS, st.sampled_from(TOTALS))
def test_a_coefficient_mask_falls_along_the_coefficients_and_sums_to_m_times_n(fcmask, num_coefs: int) -> None:
    mask = np.asarray(coef_mask(jnp.asarray(fcmask), num_coefs))
    assert (np.diff(mask, axis=0) <= 0).all()
    np.testing.assert_allclose(mask.sum(axis=0), fcmask * num_coefs, atol=1e-4)


@pytest.mark.parametrize("num_coefs", TOTALS)
@pytest.mark.parametrize("corner", [0.0, 1.0])
def test_the_gradient_at_both_ends_is_n(corner: float, num_coefs: int) -> None:
    """A mask starts at exactly 1.0 and must be able to leave it; one that reached 0.0 must be able to come back."""
    fcmask = jnp.full((CHANNELS,), corner)
    jacobian = jax.jit(jax.jacrev(lambda m: coef_mask(m, num_coefs)))(fcmask)
    forward = jax.jit(jax.jacfwd(lambda m: coef_mask(m, num_coefs)))(fcmask)
    expected = np.zeros((num_coefs, CHANNELS, CHANNELS))
    expected[num_coefs - 1 if corner else 0] = num_coefs * np.eye(CHANNELS)
    np.testing.assert_array_equal(jacobian, expected)
    np.testing.assert_array_equal(forward, expected)


@pytest.mark.parametrize("num_coefs", TOTALS)
def test_penalty_and_task_both_move_a_mask_that_stands_at_one(num_coefs: int) -> None:
    start, lambda_ = jnp.ones((CHANNELS,)), 0.3

    def loss(fcmask: jax.Array, wanted: float) -> jax.Array:
        task = wanted * coef_mask(fcmask, num_coefs).sum()
        return task + lambda_ * fcmask_penalty([fcmask])

    gradient = jax.jit(jax.grad(loss))
    # The task is indifferent: the penalty alone pushes down. The task wants less, or more: it adds N times its slope.
    np.testing.assert_allclose(gradient(start, 0.0), lambda_ / CHANNELS, rtol=1e-6)
    np.testing.assert_allclose(gradient(start, 0.1), lambda_ / CHANNELS + 0.1 * num_coefs, rtol=1e-6)
    np.testing.assert_allclose(gradient(start, -0.1), lambda_ / CHANNELS - 0.1 * num_coefs, rtol=1e-5)


@given(st.integers(0, 15), st.floats(0.05, 0.95))
def test_inside_a_coefficients_stretch_only_it_has_a_gradient(step: int, share: float) -> None:
    gradient = jax.jacfwd(lambda m: coef_mask(m, 16)[:, 0])(jnp.array([(step + share) / 16]))
    expected = np.zeros((16, 1))
    expected[step] = 16
    np.testing.assert_array_equal(gradient, expected)


def test_outside_the_unit_interval_there_is_no_gradient() -> None:
    """Why masks are projected back onto [0, 1] after every update."""
    jacobian = jax.jacrev(lambda m: coef_mask(m, 4))(jnp.array([-0.01, 1.01]))
    np.testing.assert_array_equal(jacobian, np.zeros((4, 2, 2)))


# Rounding


@given(FCMASKS, st.sampled_from(TOTALS))
@example(np.array([0, 1, 0.5, 0.125, 0.375, 0.875], np.float32), 4)
@example(np.array([0, 1, 0.5, 0.25, 0.75, 0.03125], np.float32), 16)
def test_kept_counts_are_the_coefficient_masks_of_at_least_one_half(fcmask: np.ndarray, num_coefs: int) -> None:
    mask = np.asarray(coef_mask(jnp.asarray(fcmask), num_coefs))
    counts = kept_counts(jnp.asarray(fcmask), num_coefs)
    assert jnp.issubdtype(counts.dtype, jnp.integer)
    np.testing.assert_array_equal(counts, (mask >= 0.5).sum(axis=0))


@pytest.mark.parametrize("num_coefs", TOTALS)
def test_kept_counts_next_to_every_threshold(num_coefs: int) -> None:
    """One step of float32 below (n + 0.5) / N the coefficient is dropped, at it and above it is kept."""
    thresholds = ((np.arange(num_coefs) + 0.5) / num_coefs).astype(np.float32)
    around = np.concatenate([np.nextafter(thresholds, side, dtype=np.float32) for side in (0, 1)] + [thresholds])
    mask = np.asarray(coef_mask(jnp.asarray(around), num_coefs))
    np.testing.assert_array_equal(kept_counts(jnp.asarray(around), num_coefs), (mask >= 0.5).sum(axis=0))


@given(FCMASKS, st.sampled_from(TOTALS), st.sampled_from([None, (0, 1), (0,)]))
def test_the_nearest_level_keeps_the_counts_and_has_no_half_kept_coefficient(fcmask, num_coefs, levels) -> None:
    mask = jnp.asarray(fcmask)
    nearest = nearest_level(mask, num_coefs, levels)
    np.testing.assert_array_equal(kept_counts(nearest, num_coefs, levels), kept_counts(mask, num_coefs, levels))
    soft = np.asarray(coef_mask(nearest, num_coefs, levels))
    np.testing.assert_allclose(soft, soft.round(), atol=1e-5)


@given(FCMASKS, st.sampled_from(TOTALS))
def test_hard_mask_is_the_prefix_of_the_kept_count(fcmask: np.ndarray, num_coefs: int) -> None:
    hard = hard_coef_mask(jnp.asarray(fcmask), num_coefs)
    counts = np.asarray(kept_counts(jnp.asarray(fcmask), num_coefs))
    assert hard.dtype == jnp.float32
    np.testing.assert_array_equal(hard, np.arange(num_coefs)[:, None] < counts)


def test_hard_mask_stops_gradients() -> None:
    gradient = jax.grad(lambda m: hard_coef_mask(m, 9).sum())(jnp.array([0.2, 0.5, 1.0]))
    np.testing.assert_array_equal(gradient, np.zeros(3))


def test_every_kept_count_survives_the_trip_through_an_fcmask() -> None:
    for num_coefs in range(1, 257):
        counts = np.minimum(np.arange(257), num_coefs)
        fcmask = counts_to_fcmask(counts, num_coefs)
        assert fcmask.dtype == np.float32
        assert fcmask.min() == 0 and fcmask.max() == 1
        np.testing.assert_array_equal(kept_counts(jnp.asarray(fcmask), num_coefs), counts)


# Levels


@given(LEVELS, st.sampled_from(TOTALS))
@example((0, 1), 16)
@example((0, 9), 4)
@example((), 4)
@example(None, 1)
def test_level_counts_are_what_is_asked_for_below_n_with_both_ends(levels: tuple[int, ...] | None, num_coefs: int):
    counts = level_counts(num_coefs, levels)
    wanted = set(range(num_coefs)) if levels is None else {count for count in levels if count < num_coefs}
    assert counts == tuple(sorted({0, num_coefs} | wanted))


def between_levels(fcmask: np.ndarray, num_coefs: int, levels: tuple[int, ...] | None) -> np.ndarray:
    """In float64, one value at a time: each stretch between two levels has an equal part of [0, 1]."""
    counts = level_counts(num_coefs, levels)
    stretches = len(counts) - 1
    mask = np.zeros((num_coefs, len(fcmask)))
    for stretch, (low, high) in enumerate(itertools.pairwise(counts)):
        for channel, m in enumerate(map(float, fcmask)):
            mask[low:high, channel] = min(max((m - stretch / stretches) * stretches, 0.0), 1.0)
    return mask


@given(FCMASKS, LEVELS, st.sampled_from(TOTALS))
@example(np.array([0, 1, 0.5, 0.25, 0.125, 1], np.float32), (0, 1), 16)
def test_a_mask_with_levels_fades_stretch_by_stretch(fcmask, levels, num_coefs: int) -> None:
    mask = np.asarray(coef_mask(jnp.asarray(fcmask), num_coefs, levels))
    np.testing.assert_allclose(mask, between_levels(fcmask, num_coefs, levels), atol=1e-5)
    assert (np.diff(mask, axis=0) <= 0).all()


def test_a_mask_with_levels_by_hand() -> None:
    """0, 1, 4: the mean fades below 0.5, the other three together above it."""
    mask = coef_mask(jnp.array([0.0, 0.125, 0.5, 0.625, 1.0]), 4, (0, 1))
    rest = [0, 0, 0, 0.25, 1]
    np.testing.assert_array_equal(mask, np.array([[0, 0.25, 1, 1, 1], rest, rest, rest]))


@given(FCMASKS, st.sampled_from(TOTALS))
def test_all_levels_are_the_papers_formula(fcmask: np.ndarray, num_coefs: int) -> None:
    fcmask_on_device = jnp.asarray(fcmask)
    for levels in (None, range(num_coefs), tuple(range(num_coefs + 1))):
        mask = coef_mask(fcmask_on_device, num_coefs, levels)
        np.testing.assert_allclose(mask, paper_formula(fcmask, num_coefs), atol=1e-5)
        np.testing.assert_array_equal(mask, coef_mask(fcmask_on_device, num_coefs))
        np.testing.assert_array_equal(
            kept_counts(fcmask_on_device, num_coefs, levels), kept_counts(fcmask_on_device, num_coefs)
        )


@given(FCMASKS, LEVELS, st.sampled_from(TOTALS))
@example(np.array([0, 1, 0.5, 0.25, 0.75, 0.125], np.float32), (0, 1), 16)
@example(np.array([0, 1, 0.5, 0.25, 0.75, 0.125], np.float32), (0, 9), 4)
def test_kept_counts_are_levels_and_those_of_the_mask(fcmask, levels, num_coefs: int) -> None:
    counts = np.asarray(kept_counts(jnp.asarray(fcmask), num_coefs, levels))
    mask = np.asarray(coef_mask(jnp.asarray(fcmask), num_coefs, levels))
    np.testing.assert_array_equal(counts, (mask >= 0.5).sum(axis=0))
    assert set(counts.tolist()) <= set(level_counts(num_coefs, levels))


@given(LEVELS, st.sampled_from(TOTALS))
@example((0, 1), 49)
def test_ends_keep_all_and_nothing_and_a_mask_can_leave_both(levels, num_coefs: int) -> None:
    ends = jnp.array([0.0, 1.0])
    np.testing.assert_array_equal(kept_counts(ends, num_coefs, levels), [0, num_coefs])
    np.testing.assert_array_equal(coef_mask(ends, num_coefs, levels), np.tile([0.0, 1.0], (num_coefs, 1)))
    counts = level_counts(num_coefs, levels)
    gradient = jax.grad(lambda m: coef_mask(m, num_coefs, levels).sum())(ends)
    # The coefficients of the first or last stretch move, each by the number of stretches.
    widths = np.diff(counts)
    np.testing.assert_allclose(gradient, (len(counts) - 1) * widths[[0, -1]], rtol=1e-6)


# Penalty


def test_penalty_is_the_sum_of_the_layers_means() -> None:
    penalty = fcmask_penalty([jnp.array([1.0, 0.0, 0.5]), jnp.array([-1.0, 1.0]), jnp.array([0.25])])
    assert penalty.shape == ()
    np.testing.assert_allclose(penalty, 0.5 + 1 + 0.25, rtol=1e-6)
    assert float(fcmask_penalty([])) == 0


def test_penalty_pulls_each_channel_by_one_over_the_channels_of_its_layer() -> None:
    wide, narrow = jax.grad(fcmask_penalty)([jnp.ones(8), jnp.ones(2)])
    np.testing.assert_allclose(wide, np.full(8, 1 / 8))
    np.testing.assert_allclose(narrow, np.full(2, 1 / 2))
