"""Augmentation on the devices beyond crop and flip: off by default, seeded, and distributed as the papers say."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fdjax import data
from fdjax.config import Config, DataConfig, LearnConfig
from fdjax.errors import UserError
from fdjax.training.state import create_state
from fdjax.training.steps import cross_entropy, make_mask_step, make_prepare, make_weight_step
from tests.original_layouts import random_pixels

KEY = jax.random.key(7)


def boxes(images: np.ndarray, value: float) -> np.ndarray:
    """Top, left, height, width of what has this value in each image; the others have none of it."""
    found = []
    for image in images:
        rows, columns = np.nonzero((image == value).all(axis=-1))
        if len(rows) == 0:
            found.append((0, 0, 0, 0))
            continue
        top, left, high, wide = rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == high * wide, "what is filled is a rectangle"
        found.append((top, left, high, wide))
    return np.array(found)


def test_all_are_off_by_default() -> None:
    settings = DataConfig()
    assert (settings.jitter, settings.cutout, settings.erase, settings.mixup) == (0, 0, 0, 0)
    images = jnp.asarray(random_pixels(0, 8, 6, 6, 3))
    plain = data.augment(KEY, images, 2, True)
    crop_key, flip_key = jax.random.split(KEY)
    np.testing.assert_array_equal(plain, data.random_flip(flip_key, data.random_crop(crop_key, images, 2)))
    assert plain.dtype == jnp.uint8


def test_flips_and_crop_offsets_have_the_rates_they_should() -> None:
    count, pad = 4000, 3
    ramp = jnp.broadcast_to(1 + jnp.arange(64, dtype=jnp.uint8).reshape(1, 8, 8, 1), (count, 8, 8, 1))
    flipped = np.asarray(data.random_flip(KEY, ramp))[:, 0, 0, 0] == 8
    assert abs(flipped.mean() - 0.5) < 4 * 0.5 / count**0.5
    middle = np.asarray(data.random_crop(KEY, ramp, pad))[:, 3, 3, 0].astype(int) - 1
    rows, columns = middle // 8 - 3, middle % 8 - 3
    for offsets in (rows, columns):
        counts = np.bincount(offsets + pad, minlength=2 * pad + 1)
        assert (np.abs(counts / count - 1 / 7) < 4 * (1 / 7 * 6 / 7 / count) ** 0.5).all()
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 4 / count**0.5


def test_cutout_squares_lie_anywhere_and_are_clipped_at_the_edge() -> None:
    count, size = 3000, 4
    images = jnp.full((count, 9, 9, 3), 200, jnp.uint8)
    cut = np.asarray(jax.jit(data.cutout, static_argnums=2)(KEY, images, size, np.array([1.2, 7, 9])))
    assert cut.dtype == np.uint8
    filled = (cut == np.array([1, 7, 9])).all(axis=-1)
    assert (filled | (cut == 200).all(axis=-1)).all()
    # Rows (and columns) of the square that lie inside, over the 9 places of its centre: 2, 3, 4, 4, 4, 4, 4, 4, 3.
    inside = np.array([2, 3, 4, 4, 4, 4, 4, 4, 3])
    assert filled.sum(axis=(1, 2)).mean() == pytest.approx(inside.mean() ** 2, rel=0.03)
    heights = np.bincount(filled.any(axis=2).sum(axis=1), minlength=5)
    np.testing.assert_allclose(heights[2:] / count, [1 / 9, 2 / 9, 6 / 9], atol=0.04)


@pytest.mark.parametrize("probability", [0.0, 0.4, 1.0])
def test_erased_rectangles_have_the_areas_and_ratios_of_the_paper(probability: float) -> None:
    count, side = 3000, 40
    images = jnp.full((count, side, side, 3), 200, jnp.uint8)
    erased = np.asarray(jax.jit(functools.partial(data.random_erase, fill=3.0))(KEY, images, probability))
    found = boxes(erased, 3)
    changed = found[:, 2] > 0
    assert abs(changed.mean() - probability) <= 4 * (probability * (1 - probability) / count) ** 0.5
    if not probability:
        np.testing.assert_array_equal(erased, images)
        return
    top, left, high, wide = found[changed].T
    assert (top + high <= side).all() and (left + wide <= side).all()
    share = high * wide / side**2
    assert share.min() > 0.01 and share.max() < 0.36
    assert share.mean() == pytest.approx((0.02 + 0.33) / 2, rel=0.04)  # uniform
    assert np.mean(share < 0.175) == pytest.approx(0.5, abs=0.04)
    log_ratio = np.log(high / wide)
    assert abs(log_ratio.mean()) < 0.06 and 0.55 < np.log(3.3) * 2 / 12**0.5 < 0.8 and 0.5 < log_ratio.std() < 0.8
    for edge, room in ((top, side - high), (left, side - wide)):
        assert np.mean(edge / np.maximum(room, 1)) == pytest.approx(0.5, abs=0.04)


def test_jitter_changes_brightness_contrast_and_saturation_within_its_strength() -> None:
    grey = jnp.full((2000, 2, 2, 3), 100, jnp.uint8)
    jittered = np.asarray(jax.jit(data.color_jitter)(KEY, grey, 0.4))
    # A constant grey image has neither contrast nor saturation: what changes is brightness.
    assert jittered.dtype == np.float32 and np.ptp(jittered, axis=(1, 2, 3)).max() < 1e-3
    level = jittered[:, 0, 0, 0]
    assert level.min() >= 60 and level.max() <= 140 and level.mean() == pytest.approx(100, abs=2)
    assert level.std() == pytest.approx(80 / 12**0.5, rel=0.05)
    images = jnp.asarray(random_pixels(0, 50, 5, 5, 3))
    np.testing.assert_allclose(data.color_jitter(KEY, images, 0.0), images, atol=1e-3)
    strong = np.asarray(data.color_jitter(KEY, images, 1.0))
    assert strong.min() >= 0 and strong.max() <= 255 and not np.allclose(strong, images)
    spread = np.asarray(data.color_jitter(KEY, images, 0.5)).std(axis=(1, 2, 3)) / np.asarray(images).std(
        axis=(1, 2, 3)
    )
    assert spread.min() < 0.75 and spread.max() > 0.95
    assert data.color_jitter(KEY, images[..., :1], 0.5).shape == (50, 5, 5, 1)


def test_mixup_mixes_neighbours_and_their_labels_by_one_share() -> None:
    images = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3, 3, 1)), jnp.float32)
    labels = jnp.array([0, 1, 2, 0, 1, 2])
    mix = jax.jit(data.mixup, static_argnums=(3, 4))
    shares = []
    for seed in range(200):
        mixed, targets = mix(jax.random.key(seed), images, labels, 3, 0.4)
        share = float(targets[0, 0])
        shares.append(share)
        np.testing.assert_allclose(
            mixed, share * images + (1 - share) * jnp.roll(images, 1, axis=0), rtol=1e-5, atol=1e-6
        )
        expected = share * np.eye(3)[np.array(labels)] + (1 - share) * np.eye(3)[np.roll(labels, 1)]
        np.testing.assert_allclose(targets, expected, atol=1e-6)
    assert min(shares) >= 0.5
    # The larger of s and 1 - s, s from Beta(0.4, 0.4), has the mean 1/2 + E|s - 1/2|.
    draws = np.random.default_rng(0).beta(0.4, 0.4, 200_000)
    assert np.mean(shares) == pytest.approx(np.maximum(draws, 1 - draws).mean(), abs=0.04)


def test_the_loss_takes_shares_of_classes() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    labels, others = jnp.array([0, 1, 2, 1]), jnp.array([2, 2, 0, 1])
    shares = 0.7 * jax.nn.one_hot(labels, 3) + 0.3 * jax.nn.one_hot(others, 3)
    for smoothing in (0.0, 0.1):
        expected = 0.7 * cross_entropy(logits, labels, smoothing) + 0.3 * cross_entropy(logits, others, smoothing)
        np.testing.assert_allclose(cross_entropy(logits, shares, smoothing), expected, rtol=1e-5)
        np.testing.assert_allclose(
            cross_entropy(logits, jax.nn.one_hot(labels, 3), smoothing),
            cross_entropy(logits, labels, smoothing),
            rtol=1e-5,
        )


def test_augmentation_follows_its_key_and_each_part_its_own() -> None:
    images = jnp.asarray(random_pixels(0, 16, 8, 8, 3))
    every = jax.jit(
        lambda key, erase: data.augment(key, images, 1, True, jitter=0.3, cutout_size=3, erase=erase, fill=5.0),
        static_argnums=1,
    )
    np.testing.assert_array_equal(every(KEY, 0.5), every(KEY, 0.5))
    assert not np.array_equal(every(KEY, 0.5), every(jax.random.key(8), 0.5))
    with_all, without = np.asarray(every(KEY, 0.5)), np.asarray(every(KEY, 0.0))
    same = with_all == without
    assert same.mean() > 0.8 and (with_all[~same] == 5).all(), "erasing changes nothing but what it erases"


class _MeanNetwork:
    """Logits are the channels' means, times the masks: enough to see what a step feeds its network."""

    num_classes = 3

    def apply(
        self, variables: dict, x: jax.Array, *, train: bool, mutable: object = None, rngs: object = None
    ) -> object:
        logits = x.mean(axis=(1, 2)) * variables["params"]["w"] * variables["fcmask"]["layer"]["m"]
        return (logits, {"batch_stats": {}}) if mutable else logits


def test_steps_feed_their_networks_augmented_and_mixed_batches() -> None:
    images, labels = jnp.asarray(random_pixels(0, 8, 6, 6, 3)), jnp.arange(8) % 3
    graph: Any = SimpleNamespace(input_mean=(120.0,) * 3, input_std=(60.0,) * 3, mask_sizes={"layer/m": (3, 4)})
    network: Any = _MeanNetwork()
    variables = {"params": {"w": jnp.ones(3)}, "batch_stats": {}, "fcmask": {"layer": {"m": jnp.ones(3)}}}
    optimizer = optax.sgd(0.1)
    state = create_state(variables, 5, optimizer, optimizer)
    prepare = make_prepare(graph, 1, True, jitter=0.2, cutout=2, erase=0.5)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), 0)
    x, targets = data.mixup(jax.random.fold_in(key, 2), prepare(key, images), labels, 3, 0.5)
    learn = LearnConfig(lambda_=0.1, target_macs=None)
    for step in (
        make_weight_step(network, optimizer, prepare, label_smoothing=0.0, mixup_alpha=0.5),
        make_mask_step(network, graph, optimizer, prepare, learn, mixup_alpha=0.5),
    ):
        _, metrics = jax.jit(step)(state, images, labels)
        np.testing.assert_allclose(metrics["loss"], cross_entropy(x.mean(axis=(1, 2)), targets), rtol=1e-5)
        np.testing.assert_allclose(metrics["top1"], np.mean(x.mean(axis=(1, 2)).argmax(-1) == labels), rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jitter": 1.5}, "jitter must be from 0 to 1, got 1.5"),
        ({"cutout": -1}, "cutout must be from 0 to 65,536 pixels"),
        ({"erase": 2.0}, "erase must be a probability"),
        ({"mixup": -0.1}, "mixup must be 0 or more"),
    ],
)
def test_impossible_settings(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(data=DataConfig(**settings))
