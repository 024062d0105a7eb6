"""Functions whose convolutions are replaced compute what they did, in gradients too, and XLA's slow forms are gone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fdjax.graph.fast_convolutions import fast_convolutions
from fdjax.ops.platform import tracing_for


class Net(nn.Module):
    """Every kind of convolution that is replaced, with batch norm and a part that is computed again in the gradient."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="stem")(images))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Conv(8, (3, 3), feature_group_count=8, padding=1, name="depthwise")(x)
        x = nn.remat(nn.Conv)(12, (1, 1), name="again")(x)
        x = nn.Conv(12, (3, 1), feature_group_count=4, name="grouped")(x)
        return jax.jit(nn.relu)(nn.Conv(4, (3, 3), padding="VALID", name="last")(x)).mean(axis=(1, 2))


def loss(variables: Any, images: jax.Array) -> Any:
    collections = {name: variables[name] for name in ("params", "batch_stats")}
    logits, updated = Net().apply(collections, images, train=True, mutable=["batch_stats"])
    return jnp.sum(jnp.sin(logits)), updated


@pytest.fixture(scope="module")
def given() -> tuple[Any, jax.Array]:
    images = jax.random.normal(jax.random.key(0), (2, 14, 11, 3))
    return Net().init(jax.random.key(1), images, train=False), images


def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.value_and_grad(function, argnums=(0, 1), has_aux=True)


def grouped(function: Callable[..., Any], *args: Any) -> set[int]:
    """The numbers of groups of the convolutions that a function has on the CPU."""
    return set(map(int, re.findall(r"feature_group_count = (\d+)", jax.jit(function).lower(*args).as_text())))


def close(found: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_values_gradients_and_statistics_stay(given) -> None:
    found, expected = (jax.jit(gradient(each))(*given) for each in (fast_convolutions(loss), loss))
    close(found, expected)


def test_keyword_arguments_are_not_traced(given) -> None:
    variables, images = given
    found = jax.jit(lambda images: fast_convolutions(Net().apply)(variables, images, train=False))(images)
    close(found, Net().apply(variables, images, train=False))


def test_it_composes_with_other_transformations(given) -> None:
    variables, images = given
    stacked = jnp.stack([images, 2 * images])

    def of(function: Callable[..., Any]) -> Any:
        return jax.jit(jax.vmap(lambda images: gradient(function)(variables, images)))(stacked)

    close(of(fast_convolutions(loss)), of(loss))


@pytest.mark.parametrize(
    ("groups", "settings"),
    [
        (8, {"rhs_dilation": (2, 2)}),
        (8, {"padding": ((2, 0), (1, 1))}),
        (1, {"padding": ((-1, 2), (1, 1))}),
        (8, {"batch_group_count": 2, "feature_group_count": 1}),
        (1, {"precision": lax.Precision.HIGHEST}),
    ],
)
def test_others_stay_as_they_are(groups: int, settings: dict[str, Any]) -> None:
    settings = {"padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC"), **settings}
    settings = {"feature_group_count": groups, **settings}
    x, kernel = (
        jax.random.normal(jax.random.key(2), (2, 8, 8, 8)),
        jnp.ones((3, 3, 8 // settings["feature_group_count"], 8)),
    )

    def function(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, (1, 1), **settings)

    assert str(jax.make_jaxpr(fast_convolutions(function))(x, kernel)) == str(jax.make_jaxpr(function)(x, kernel))


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("layout", [("NCHW", "OIHW", "NCHW"), ("CHWN", "IHWO", "NHWC"), ("NHCW", "HOWI", "WNHC")])
def test_maps_may_have_any_layout(layout: tuple[str, str, str], groups: int) -> None:
    sizes = {"N": 2, "H": 7, "W": 5, "C": 8} | {"O": 8, "I": 8 // groups}
    window = {**sizes, "H": 3, "W": 3}
    x = jax.random.normal(jax.random.key(3), [sizes[axis] for axis in layout[0]])
    kernel = jax.random.normal(jax.random.key(4), [window[axis] for axis in layout[1]])

    def function(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=layout, feature_group_count=groups
        )

    def of(function: Callable[..., Any]) -> Any:
        return jax.jit(jax.value_and_grad(lambda *given: jnp.sum(jnp.sin(function(*given))), (0, 1)))(x, kernel)

    close(of(fast_convolutions(function)), of(function))


def test_loops_and_functions_with_their_own_gradient_stay() -> None:
    x, kernel = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 1, 3))

    @jax.custom_vjp
    def twice(x):
        return depthwise(depthwise(x))

    def depthwise(x):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3
        )

    twice.defvjp(lambda x: (twice(x), None), lambda _, g: (7 * g,))

    def function(x):
        return twice(x).sum() + lax.fori_loop(0, 2, lambda _, y: depthwise(y), x).sum()

    np.testing.assert_allclose(fast_convolutions(function)(x), function(x), rtol=1e-5)
    of_twice = jax.grad(fast_convolutions(lambda x: twice(x).sum()))(x)
    np.testing.assert_array_equal(of_twice, np.full(x.shape, 7))


def test_xlas_grouped_convolutions_are_gone_on_the_cpu_only(given) -> None:
    assert grouped(loss, *given) == {1, 4, 8}
    assert grouped(fast_convolutions(loss), *given) == {1}
    with tracing_for("tpu"):
        assert grouped(fast_convolutions(loss), *given) == {1, 4, 8}
