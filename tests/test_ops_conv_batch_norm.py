"""A convolution with its batch norm as one function; the oracle is autodiff of the textbook form in float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fdjax.ops import chunks
from fdjax.ops.conv_batch_norm import depthwise_batch_norm, pointwise_batch_norm

EPSILON = 1e-3
AXES = (0, 1, 2)
PARAMS = ("x", "kernel", "scale", "bias")
NAMES = ("y", "mean", "variance", "dx", "dkernel", "dscale", "dbias")
# Compilation is most of the time here, and what is compiled is tiny.
fast_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


# The textbook


def relu6(x: jax.Array) -> jax.Array:
    return jnp.minimum(jnp.maximum(x, 0), 6)


def normalise(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    mean = jnp.mean(x, AXES)
    variance = jnp.mean((x - mean) ** 2, AXES)
    return (x - mean) / jnp.sqrt(variance + EPSILON) * scale + bias, mean, variance


def textbook_pointwise(x, kernel, scale, bias):
    return normalise(jnp.einsum("bhwc,cd->bhwd", x, kernel), scale, bias)


def textbook_convolution(x: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    return lax.conv_general_dilated(
        relu6(x),
        kernel[:, :, None],
        (stride, stride),
        "SAME" if padding == "same" else [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def textbook_depthwise(x, kernel, scale, bias, *, stride: int, padding: str):
    y, mean, variance = normalise(textbook_convolution(x, kernel, stride, padding), scale, bias)
    return relu6(y), mean, variance


# Ours, and what both give


def pointwise(x, kernel, scale, bias):
    return pointwise_batch_norm(x, kernel, scale, bias, EPSILON)


def depthwise(x, kernel, scale, bias, *, stride: int, padding: str):
    return depthwise_batch_norm(x, kernel, scale, bias, stride, padding, EPSILON)


def run(function, given: dict, **settings) -> dict[str, np.ndarray]:
    """Value, statistics and gradients under the given cotangent, by name."""

    def all_of_it(params, cotangent):
        def apply(*params):
            y, *statistics = function(*params, **settings)
            return y, statistics

        y, pull, statistics = jax.vjp(apply, *params, has_aux=True)
        return y, *statistics, *pull(cotangent)

    params = tuple(given[name] for name in PARAMS)
    return dict(zip(NAMES, map(np.asarray, fast_jit(all_of_it)(params, given["cotangent"])), strict=True))


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    """Relative to the largest entry of each array, or to 1."""
    for name in NAMES:
        left, right = (np.asarray(each[name], np.float64) for each in (found, expected))
        assert left.shape == right.shape, name
        np.testing.assert_allclose(left, right, rtol=0, atol=tolerance * max(1, np.abs(right).max()), err_msg=name)


def as_dtype(given: dict, dtype: str) -> dict:
    return {name: jnp.asarray(array, dtype) for name, array in given.items()}


def in_float64(function, given: dict, **settings) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        return run(function, {name: np.asarray(array, np.float64) for name, array in given.items()}, **settings)


def norm_inputs(rng: np.random.Generator, channels: int) -> dict[str, np.ndarray]:
    """A ReLU6 after them clips at both ends."""
    return {
        "scale": rng.uniform(2, 5, channels) * rng.choice([-1, 1], channels),
        "bias": rng.uniform(2, 4, channels),
    }


# Pointwise


def pointwise_inputs(batch: int = 3, size=(4, 5), channels: int = 3, features: int = 7, offset: float = 0.0) -> dict:
    rng = np.random.default_rng(batch)
    return {
        "x": offset + rng.normal(size=(batch, *size, channels)) * rng.uniform(0.5, 2, channels),
        "kernel": rng.normal(size=(channels, features)),
        **norm_inputs(rng, features),
        "cotangent": rng.normal(size=(batch, *size, features)),
    }


POINTWISE_CASES = [
    {},
    {"batch": 1, "size": (3, 4)},
    {"batch": 5, "size": (1, 1)},
    {"batch": 1, "size": (1, 1)},
    {"channels": 7, "features": 2},
    {"channels": 1, "features": 1},
    {"offset": 3.0},
]


@pytest.mark.parametrize("case", POINTWISE_CASES, ids=str)
def test_pointwise_is_autodiff_of_the_textbook(case: dict) -> None:
    given = pointwise_inputs(**case)
    expected = in_float64(textbook_pointwise, given)
    found = in_float64(pointwise, given)
    assert all(array.dtype == np.float64 for array in found.values())
    assert_close(found, expected, 1e-10)
    if case in ({}, {"offset": 3.0}):
        single = as_dtype(given, "float32")
        assert_close(run(pointwise, single), in_float64(textbook_pointwise, single), 1e-4)


def test_pointwise_in_float32_with_an_input_far_from_zero() -> None:
    """The mean and the variance come from the input's covariance, whose mean is removed before it is squared."""
    given = as_dtype(pointwise_inputs(offset=100.0), "float32")
    convolved = np.asarray(given["x"]) @ np.asarray(given["kernel"])
    expected = in_float64(textbook_pointwise, given)
    naive = np.mean(convolved**2, AXES) - np.mean(convolved, AXES) ** 2
    assert np.abs(naive / expected["variance"] - 1).max() > 1e-4
    found = run(pointwise, given)
    np.testing.assert_allclose(found["variance"], expected["variance"], rtol=1e-5)
    assert_close(found, expected, 1e-3)


# Depthwise


def depthwise_inputs(batch: int = 2, size=(7, 8), channels: int = 5, stride: int = 1, seed: int = 0) -> dict:
    """x is clipped at both ends, and so is y."""
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(3, 4, (batch, *size, channels)),
        "kernel": rng.normal(size=(3, 3, channels)),
        **norm_inputs(rng, channels),
        "cotangent": rng.normal(size=(batch, -(-size[0] // stride), -(-size[1] // stride), channels)),
    }


DEPTHWISE_CASES = [
    (2, size, stride, padding) for size in ((7, 8), (6, 5)) for stride in (1, 2) for padding in ("same", "torch")
] + [(1, (4, 5), 1, "same"), (3, (1, 1), 2, "same"), (3, (1, 1), 1, "torch"), (1, (1, 1), 1, "same"),
     (2, (1, 2), 2, "same"), (1, (5, 8), 3, "torch")]  # fmt: skip


@pytest.mark.parametrize(("batch", "size", "stride", "padding"), DEPTHWISE_CASES)
def test_depthwise_is_autodiff_of_the_textbook(batch: int, size, stride: int, padding: str) -> None:
    given, layer = depthwise_inputs(batch, size, stride=stride), {"stride": stride, "padding": padding}
    expected = in_float64(textbook_depthwise, given, **layer)
    found = in_float64(depthwise, given, **layer)
    assert all(array.dtype == np.float64 for array in found.values())
    assert_close(found, expected, 1e-10)
    if batch == 2 and size == (7, 8):
        for clipped in (relu6(given["x"]), expected["y"]):
            assert (np.asarray(clipped) == 0).any() and (np.asarray(clipped) == 6).any()
        single = as_dtype(given, "float32")
        found = run(depthwise, single, **layer)
        assert_close(found, in_float64(textbook_depthwise, single, **layer), 1e-4)


def test_depthwise_in_float32_with_an_output_far_from_zero() -> None:
    """The mean is a hundred deviations."""
    layer = {"stride": 1, "padding": "same"}
    given = depthwise_inputs()
    given["x"] = 3 + 0.03 * (given["x"] - 3) / 4
    given["kernel"] = given["kernel"] / 100  # zeros beyond the edges would spread what is not the middle tap's
    given["kernel"][1, 1] = 100
    single = as_dtype(given, "float32")
    expected = in_float64(textbook_depthwise, single, **layer)
    mean, deviation = expected["mean"], np.sqrt(expected["variance"])
    assert (mean / deviation > 50).all()
    convolved = np.asarray(textbook_convolution(single["x"], single["kernel"], **layer))
    naive = np.mean(convolved**2, AXES) - np.mean(convolved, AXES) ** 2
    assert np.abs(naive / expected["variance"] - 1).max() > 3e-3
    found = run(depthwise, single, **layer)
    np.testing.assert_allclose(found["variance"], expected["variance"], rtol=1e-3)
    assert_close(found, expected, 1e-3)


# Chunks


@pytest.mark.parametrize(("batch", "stride", "padding", "chunk_images", "num_chunks"), [
    (6, 1, "same", 2, 3), (6, 2, "torch", 4, 2), (5, 2, "same", 3, 5)
])  # fmt: skip
def test_chunks_do_not_change_the_depthwise_gradients(
    batch: int, stride: int, padding: str, chunk_images: int, num_chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, layer = depthwise_inputs(batch, (6, 5), stride=stride), {"stride": stride, "padding": padding}
    at_once = in_float64(depthwise, given, **layer)
    # The second pass reads the padded map, the convolution and the gradient.
    pads = 2 if stride == 1 or padding == "torch" else 1
    image_bytes = 8 * 5 * ((6 + pads) * (5 + 2) + 2 * given["cotangent"][0, :, :, 0].size)
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", chunk_images * image_bytes)
    in_chunks = in_float64(depthwise, given, **layer)
    with jax.enable_x64(True):
        program = str(jax.make_jaxpr(lambda x, g: jax.vjp(
            lambda x: depthwise(x, *(given[name] for name in PARAMS[1:]), **layer)[0], x
        )[1](g))(given["x"], given["cotangent"]))  # fmt: skip
    assert f"length={num_chunks}\n" in program
    assert_close(in_chunks, at_once, 1e-12)
    assert_close(in_chunks, in_float64(textbook_depthwise, given, **layer), 1e-10)


# Both

KINDS = {
    "pointwise": (pointwise, textbook_pointwise, pointwise_inputs, {}),
    "depthwise": (depthwise, textbook_depthwise, depthwise_inputs, {"stride": 1, "padding": "same"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_dead_channels_give_their_bias_and_finite_gradients(kind: str) -> None:
    """Zero variance: taps of zero, and an input that is constant or, under ReLU6, never positive."""
    ours, textbook, inputs, layer = KINDS[kind]
    given = inputs()
    given["kernel"][..., 1] = 0
    dead = [1]
    if kind == "depthwise":
        given["x"][..., 2] = -np.abs(given["x"][..., 2])
        dead = [1, 2]
    else:
        given["x"][..., 0] = 0.1
        given["kernel"][1:, 2] = 0  # reads the constant channel only
        dead = [1, 2]
    expected = in_float64(textbook, given, **layer)
    np.testing.assert_allclose(expected["variance"][np.array(dead)], 0, atol=1e-25)
    assert_close(in_float64(ours, given, **layer), expected, 1e-10)
    single = as_dtype(given, "float32")
    found = run(ours, single, **layer)
    assert all(np.isfinite(array).all() for array in found.values())
    bias = given["bias"][dead]
    np.testing.assert_allclose(found["y"][..., np.array(dead)], np.broadcast_to(bias, (*found["y"].shape[:3], 2)), 1e-4)
    assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_mean_and_variance_pass_no_gradient(kind: str) -> None:
    ours, _, inputs, layer = KINDS[kind]
    given = as_dtype(inputs(), "float32")

    def statistics(*params):
        _, mean, variance = ours(*params, **layer)
        return jnp.sum(mean) + jnp.sum(variance)

    params = tuple(given[name] for name in PARAMS)
    for gradient in fast_jit(jax.grad(statistics, argnums=(0, 1, 2, 3)))(*params):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("kernel_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_maps_keep_float32_statistics(kind: str, kernel_dtype: str) -> None:
    ours, textbook, inputs, layer = KINDS[kind]
    given = inputs(batch=20) if kind == "pointwise" else inputs()
    for name in ("x", "cotangent", "kernel"):
        given[name] = np.asarray(jnp.asarray(given[name], jnp.bfloat16), np.float64)
    if kind == "depthwise":
        # Rounding may carry what lies at a bend of ReLU6 to its other side: nothing lies there.
        given["x"][given["x"] == 6] = 6.5
        convolved = textbook_convolution(*(jnp.asarray(given[name], jnp.float32) for name in ("x", "kernel")), **layer)
        params = (jnp.asarray(given[name], jnp.float32) for name in ("scale", "bias"))
        unclipped = np.asarray(normalise(convolved, *params)[0])
        given["cotangent"][(np.abs(unclipped) < 0.15) | (np.abs(unclipped - 6) < 0.15)] = 0
        assert (given["cotangent"] != 0).mean() > 0.8
    expected = in_float64(textbook, given, **layer)
    dtypes = {"x": "bfloat16", "cotangent": "bfloat16", "kernel": kernel_dtype}
    narrow = {name: jnp.asarray(array, dtypes.get(name, "float32")) for name, array in given.items()}
    found = run(ours, narrow, **layer)
    expected_dtypes = {"y": "bfloat16", "dx": "bfloat16", "dkernel": kernel_dtype}
    assert {name: str(array.dtype) for name, array in found.items()} == {
        name: expected_dtypes.get(name, "float32") for name in NAMES
    }
    for name in NAMES:
        left, right = np.asarray(found[name], np.float64), expected[name]
        assert np.isfinite(left).all(), name
        error = np.linalg.norm(left - right) / np.linalg.norm(right)
        # The depthwise layer's statistics are those of its rounded output.
        of_statistics = 5e-4 if kind == "pointwise" else 5e-3
        assert error < {"y": 0.01, "mean": of_statistics, "variance": of_statistics}.get(name, 0.03), (name, error)
