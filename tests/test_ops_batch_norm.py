"""Batch norm with its hand-written gradient; the oracle is autodiff of the textbook form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax.ops.batch_norm import batch_norm

SHAPE = (3, 4, 5, 6)
EPSILON = 1e-3


def textbook(x: jax.Array, scale: jax.Array, bias: jax.Array, relu6: bool):
    mean = jnp.mean(x, axis=(0, 1, 2))
    variance = jnp.mean((x - mean) ** 2, axis=(0, 1, 2))
    y = (x - mean) / jnp.sqrt(variance + EPSILON) * scale + bias
    return jnp.minimum(jnp.maximum(y, 0), 6) if relu6 else y, mean, variance


def inputs(offset: float = 0.0, seed: int = 0) -> dict[str, np.ndarray]:
    """Float64; scale and bias are such that ReLU6 clips at both ends."""
    rng = np.random.default_rng(seed)
    channels = SHAPE[-1]
    return {
        "x": offset + rng.normal(size=SHAPE),
        "scale": rng.uniform(2, 5, channels) * rng.choice([-1, 1], channels),
        "bias": rng.uniform(2, 4, channels),
        "cotangent": rng.normal(size=SHAPE),
    }


@jax.jit(static_argnames="relu6")
def ours(x, scale, bias, shift, cotangent, relu6: bool):
    def apply(x, scale, bias):
        y, mean, variance = batch_norm(x, scale, bias, shift, EPSILON, relu6)
        return y, (mean, variance)

    y, pull, statistics = jax.vjp(apply, x, scale, bias, has_aux=True)
    return y, *statistics, *pull(cotangent)


@jax.jit(static_argnames="relu6")
def autodiff(x, scale, bias, cotangent, relu6: bool):
    def apply(x, scale, bias):
        y, mean, variance = textbook(x, scale, bias, relu6)
        return y, (mean, variance)

    y, pull, statistics = jax.vjp(apply, x, scale, bias, has_aux=True)
    return y, *statistics, *pull(cotangent)


NAMES = ("y", "mean", "variance", "dx", "dscale", "dbias")


@pytest.mark.parametrize("relu6", [False, True])
def test_forward_and_gradients_are_autodiffs_of_the_textbook_form(relu6: bool) -> None:
    with jax.enable_x64(True):
        given = inputs()
        expected = autodiff(**given, relu6=relu6)
        for shift in (0.0, 0.5):  # a guess of the mean changes the rounding only
            found = ours(**given, shift=jnp.full(SHAPE[-1], shift), relu6=relu6)
            for name, left, right in zip(NAMES, found, expected, strict=True):
                assert left.dtype == jnp.float64
                np.testing.assert_allclose(left, right, rtol=1e-11, atol=1e-12, err_msg=name)
        if relu6:
            assert (np.asarray(expected[0]) == 0).any() and (np.asarray(expected[0]) == 6).any()


@pytest.mark.parametrize("relu6", [False, True])
def test_a_mean_of_a_thousand_deviations_does_not_cancel_in_float32(relu6: bool) -> None:
    """With the guess near the mean; a plain one-pass variance would be wrong by several per cent here."""
    given = {name: array.astype(np.float32) for name, array in inputs(offset=1000.0).items()}
    x = given["x"]
    naive = np.mean(x**2, axis=(0, 1, 2)) - np.mean(x, axis=(0, 1, 2)) ** 2
    with jax.enable_x64(True):
        expected = autodiff(**{name: array.astype(np.float64) for name, array in given.items()}, relu6=relu6)
    shift = jnp.full(SHAPE[-1], 1000.3, jnp.float32)
    found = dict(zip(NAMES, ours(**given, shift=shift, relu6=relu6), strict=True))
    variance = np.asarray(expected[2])
    assert np.abs(naive / variance - 1).max() > 1e-2
    np.testing.assert_allclose(found["variance"], variance, rtol=1e-5)
    for name, right in zip(NAMES, expected, strict=True):
        scale = np.abs(right).max()
        np.testing.assert_allclose(found[name] / scale, np.asarray(right) / scale, atol=2e-4, err_msg=name)


def test_mean_and_variance_pass_no_gradient() -> None:
    given = inputs()
    zeros = jnp.zeros(SHAPE[-1])

    def statistics(x):
        _, mean, variance = batch_norm(x, zeros + 1, zeros, zeros, EPSILON, False)
        return jnp.sum(mean) + jnp.sum(variance)

    np.testing.assert_array_equal(jax.grad(statistics)(jnp.asarray(given["x"], jnp.float32)), np.zeros(SHAPE))


def test_bfloat16_maps_keep_float32_statistics() -> None:
    given = inputs()
    x = jnp.asarray(given["x"], jnp.bfloat16)
    cotangent = jnp.asarray(given["cotangent"], jnp.bfloat16)
    scale, bias = (jnp.asarray(given[name], jnp.float32) for name in ("scale", "bias"))
    found = ours(x, scale, bias, jnp.zeros(SHAPE[-1]), cotangent, relu6=False)
    assert [array.dtype for array in found] == [jnp.bfloat16, *["float32"] * 2, jnp.bfloat16, *["float32"] * 2]
    expected = autodiff(*(a.astype(jnp.float32) for a in (x, scale, bias, cotangent)), relu6=False)
    for name, left, right in zip(NAMES, found, expected, strict=True):
        scale_of = np.abs(right).max()
        tolerance = 1e-5 if name in ("mean", "variance") else 2e-2
        np.testing.assert_allclose(left.astype(jnp.float32) / scale_of, right / scale_of, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("relu6", [False, True])
def test_a_constant_channel_gives_its_bias_and_finite_gradients(relu6: bool) -> None:
    """Zero variance: a dead channel's map is constant."""
    given = {name: array.astype(np.float32) for name, array in inputs().items()}
    given["x"] = np.full(SHAPE, 0.75, np.float32)
    y, _, variance, dx, *_ = ours(**given, shift=jnp.zeros(SHAPE[-1]), relu6=relu6)
    np.testing.assert_allclose(variance, 0, atol=1e-6)
    np.testing.assert_allclose(y, np.broadcast_to(given["bias"], SHAPE), atol=1e-3)
    assert np.isfinite(dx).all()
