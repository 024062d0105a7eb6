"""What moves masks beside the loss: noise, and the schedule of their learning rate."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from fdjax.config import Config, LearnConfig
from fdjax.errors import UserError
from fdjax.training.steps import mask_penalty, mask_scales, with_noise
from tests.small_network import small

MASKS = {"a": jnp.full(4000, 0.5), "b": {"c": jnp.linspace(0, 1, 101)}}


def test_noise_has_its_deviation_and_leaves_masks_in_range():
    noisy = with_noise(jax.random.key(0), MASKS, 0.1)
    moved = np.asarray(noisy["a"] - MASKS["a"])
    assert abs(moved.mean()) < 0.01 and moved.std() == pytest.approx(0.1, rel=0.05)
    for leaf in jax.tree.leaves(noisy):
        assert leaf.min() >= -1e-6 and leaf.max() <= 1 + 1e-6
    assert np.abs(noisy["b"]["c"] - MASKS["b"]["c"]).max() > 0.05
    again, other = (with_noise(jax.random.key(key), MASKS, 0.1) for key in (0, 1))
    np.testing.assert_array_equal(again["a"], noisy["a"])
    assert np.abs(other["a"] - noisy["a"]).max() > 0.1


def test_no_noise_is_the_masks_themselves():
    assert with_noise(jax.random.key(0), MASKS, 0.0) is MASKS


def test_gradients_pass_noise_also_where_it_was_clipped():
    weights = jnp.linspace(-1, 1, 101)
    gradient = jax.grad(lambda m: jnp.sum(weights * with_noise(jax.random.key(0), m, 0.5)))(jnp.linspace(0, 1, 101))
    np.testing.assert_allclose(gradient, weights, rtol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [("noise", 1.5), ("noise", -0.1), ("group_multiple", 0), ("precondition", 2.0)],
)
def test_settings_out_of_range_are_refused(field: str, value: float):
    with pytest.raises(UserError, match=f"LearnConfig.{field} must be .*, got {value}"):
        LearnConfig(**{field: value})  # type: ignore[arg-type]


def test_saved_configs_may_have_removed_options_that_were_off():
    saved = Config().to_dict()
    saved["learn"] |= {"schedule": "constant", "warmup_epochs": 0.0, "rounding": "nearest"}
    assert Config.from_dict(saved) == Config()
    saved["learn"]["rounding"] = "least_loss"
    with pytest.raises(UserError, match=r"config.learn.rounding is 'least_loss', an option that has been removed"):
        Config.from_dict(saved)


def test_groups_of_a_multiple_need_tied_masks():
    with pytest.raises(UserError, match=r"group_multiple must be 1 where masks are not tied .*, got 8"):
        LearnConfig(group_multiple=8)


@pytest.mark.parametrize("settings", [{}, {"tied": True, "levels": "0,1,N"}, {"penalty": "fcmask"}])
def test_with_full_preconditioning_lambda_pushes_all_masks_alike(settings: dict):
    learn = LearnConfig(**{"penalty": "macs", "block": 2, "precondition": 1.0, **settings})
    spec = small(block_by_map={}, tied=learn.tied, levels=learn.counts_below_whole)
    ones = unflatten_dict({path: jnp.ones(channels) for path, (channels, _) in spec.mask_sizes.items()}, sep="/")
    slopes = jax.grad(lambda fcmask: mask_penalty(spec, fcmask, learn))(ones)
    pushes = np.concatenate(jax.tree.leaves(jax.tree.map(jnp.multiply, slopes, mask_scales(spec, learn))))
    plain = np.concatenate(jax.tree.leaves(slopes))
    np.testing.assert_allclose(pushes, np.median(plain), rtol=1e-4)
    assert plain.max() > 3 * plain.min()
    half = jax.tree.leaves(mask_scales(spec, dataclasses.replace(learn, precondition=0.5)))
    np.testing.assert_allclose(np.square(half), jax.tree.leaves(mask_scales(spec, learn)), rtol=1e-5)
    assert set(jax.tree.leaves(mask_scales(spec, dataclasses.replace(learn, precondition=0.0)))) == {1.0}
