"""`materialize` changes nothing but where a value lies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax.ops.materialize import materialize


@pytest.mark.parametrize("middle", [1.5, np.nan, np.inf])
def test_value_and_gradient_pass_as_they_are(middle: float) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    x[1, 1, 2] = middle
    cotangent = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    y, pull = jax.vjp(jax.jit(materialize), x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(pull(cotangent)[0], cotangent)


def test_empty_and_mapped_arrays() -> None:
    assert materialize(jnp.zeros((0, 3))).shape == (0, 3)
    x = jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(jax.vmap(materialize)(x), x)


def test_on_the_cpu_nothing_is_fused_across_it() -> None:
    x = jnp.arange(64.0).reshape(8, 8)

    def program(between):
        return jax.jit(lambda x: between(jnp.sin(x)).T + 1).lower(x).compile().as_text()

    assert "while(" in program(materialize)
    assert "while(" not in program(lambda x: x)


def test_a_padded_map_stays_too_though_its_edge_is_known() -> None:
    def program(x):
        return materialize(jnp.pad(jnp.sin(x), 1)).T + 1

    assert "while(" in jax.jit(program).lower(jnp.arange(64.0).reshape(8, 8)).compile().as_text()
