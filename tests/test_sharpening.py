"""`learn.sharpen`: masks are drawn to their levels once the ramp is over."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict

from fdjax.config import LearnConfig
from fdjax.ops import coef_mask
from fdjax.pruning.expected import expected_ratio
from fdjax.training.build import flat_masks
from fdjax.training.controller import offset_of
from fdjax.training.optimizers import sharpening
from fdjax.training.phases import Phase
from fdjax.training.state import create_state
from fdjax.training.steps import make_mask_step
from tests.small_network import one_unit

LEARN = LearnConfig(target_macs=None, lambda_=0.0, tied=True, levels="0,1,N", penalty="macs")
GRAPH = one_unit(channels=4, wide=8, features=6, side=8, stride=1, block=2)


def stepped(
    fcmask: Any, share: float | None, learn: LearnConfig = LEARN, offset: float = np.nan
) -> dict[str, np.ndarray]:
    """Returns the masks after one step of a network whose loss does not depend on them; `offset` is the aim's."""
    network: Any = SimpleNamespace(num_classes=3, apply=lambda variables, x, train: x.mean(axis=(1, 2)))
    optimizer = optax.sgd(0.1)
    state = create_state({"params": {}, "batch_stats": {}, "fcmask": fcmask}, 0, optimizer, optimizer)
    state = state.replace(lambda_=jnp.float32(0), controller={**state.controller, "offset": jnp.float32(offset)})
    pull = None if share is None else optax.constant_schedule(share)
    step = make_mask_step(network, GRAPH, optimizer, lambda key, images: images, learn, pull=pull)
    images, labels = np.zeros((2, 8, 8, 3), np.float32), np.zeros(2, np.int32)
    return flat_masks(jax.jit(step)(state, images, labels)[0].fcmask)


def test_a_step_moves_each_mask_its_share_of_the_way_to_the_nearest_level() -> None:
    rng = np.random.default_rng(0)
    masks = {path: rng.uniform(0, 1, channels).astype(np.float32) for path, (channels, _) in GRAPH.mask_sizes.items()}
    fcmask = unflatten_dict({path: jnp.asarray(mask) for path, mask in masks.items()}, sep="/")
    still, part, whole = (stepped(fcmask, share) for share in (None, 0.25, 1.0))
    for path, mask in masks.items():
        levels, num_coefs = GRAPH.levels_of(path, LEARN.counts_below_whole), GRAPH.masks[path].num_coefs
        np.testing.assert_array_equal(still[path], mask)
        # No coefficient is half kept, and each is kept that was kept by half before.
        soft, before = coef_mask(whole[path], num_coefs, levels), coef_mask(jnp.asarray(mask), num_coefs, levels)
        np.testing.assert_allclose(soft, np.asarray(before) >= 0.5, atol=1e-5)
        np.testing.assert_allclose(part[path], mask + 0.25 * (whole[path] - mask), atol=1e-6)


def test_masks_above_the_aim_are_not_pulled() -> None:
    learn = dataclasses.replace(LEARN, approach="aim", target_macs=0.5, lambda_=None)
    masks = {path: np.full(channels, 0.9, np.float32) for path, (channels, _) in GRAPH.mask_sizes.items()}
    fcmask = unflatten_dict({path: jnp.asarray(mask) for path, mask in masks.items()}, sep="/")
    cost = float(expected_ratio(GRAPH, {path: jnp.asarray(mask) for path, mask in masks.items()}, (0, 1)))
    for above, moved in ((0.03, False), (0.01, True), (-0.1, True)):
        after = stepped(fcmask, 0.25, learn, offset_of(cost - above, 0.5))
        for path, mask in masks.items():
            np.testing.assert_allclose(after[path], mask + 0.025 if moved else mask, atol=1e-6)


def test_the_pull_begins_after_the_ramp() -> None:
    phase = Phase("learn", 1, 100, 40, 20)
    pull = sharpening(LearnConfig(ramp=0.75, sharpen=0.4), phase)
    assert pull is not None and sharpening(LearnConfig(), phase) is None
    shares = [float(pull(step)) for step in range(100, 141)]
    assert shares[:31] == [0] * 31 and shares[-1] == pytest.approx(0.4)
    assert shares == sorted(shares)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_from_0_to_1(share: float) -> None:
    with pytest.raises(ValueError, match="sharpen"):
        LearnConfig(sharpen=share)
