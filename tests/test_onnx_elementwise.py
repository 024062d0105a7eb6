"""What is between the layers of a frozen network is few nodes of ONNX, and biases cost no operation."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import fdjax
from fdjax.frozen.onnx_model import onnxruntime_session, to_onnx
from fdjax.frozen.program import Apply

IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 6, 6, 3)).astype(np.float32)
RNG = np.random.default_rng(1)
VARIABLES = {
    name: {leaf: jnp.asarray(RNG.normal(size=of), jnp.float32) for leaf, of in (("kernel", shape), ("bias", shape[-1]))}
    for name, shape in {"stem": (3, 3, 3, 8), "expand": (1, 1, 8, 16), "project": (1, 1, 16, 8)}.items()
}  # fmt: skip


def conv(variables: Any, name: str, x: jax.Array) -> jax.Array:
    layer = variables[name]
    made = jax.lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return made + layer["bias"]


def written(apply: Any) -> tuple[Counter[str], np.ndarray]:
    """Freezes a network whole; returns the operators of its ONNX file, and its results in ONNX Runtime."""
    graph = fdjax.with_masks(fdjax.trace(apply, VARIABLES, IMAGES))
    frozen = fdjax.freeze(graph, VARIABLES, graph.full_counts()).frozen
    model = to_onnx(frozen.program, frozen.arrays)
    return Counter(node.op_type for node in model.graph.node), onnxruntime_session(model)(IMAGES)


def between(function: Any) -> Any:
    def apply(variables, images):
        return conv(variables, "expand", function(conv(variables, "stem", images)))

    return apply


@pytest.mark.parametrize(
    "function",
    [jax.nn.hard_swish, lambda x: x * jnp.clip(x / 6 + 0.5, 0, 1), lambda x: x * jnp.clip(0.2 * x + 0.5, 0, 1)],
    ids=["of jax", "by its formula", "with Keras' sigmoid"],
)
def test_a_hard_swish_is_a_hard_sigmoid_and_a_product(function):
    operators, results = written(between(function))
    np.testing.assert_allclose(results, between(function)(VARIABLES, IMAGES), rtol=1e-5, atol=1e-5)
    assert operators["HardSigmoid"] == operators["Mul"] == 1 and not {"Add", "Clip", "Relu"} & {*operators}


@pytest.mark.parametrize(
    "function",
    [
        jax.nn.relu6,
        jax.nn.hard_sigmoid,
        lambda x: jnp.clip(x, 0, 1) * x,
        lambda x: jnp.clip(x + 1, 0, 5) * x,
        lambda x: jnp.clip(x / 6 + 0.5, 0.1, 1) * x,
        lambda x: jnp.minimum(x / 6 + 0.5, 1) * x,
    ],
    ids=["relu6", "scales that go into layers", "clipped only", "another top", "another bottom", "no bottom"],
)
def test_what_is_none_stays(function):
    operators, results = written(between(function))
    assert "HardSigmoid" not in operators
    np.testing.assert_allclose(results, between(function)(VARIABLES, IMAGES), rtol=1e-5, atol=1e-5)


def test_a_value_that_is_read_elsewhere_is_kept():
    def apply(variables, images):
        x = conv(variables, "stem", images)
        clipped = jnp.clip(x + 3, 0, 6)
        return conv(variables, "expand", clipped / 6 * x) + conv(variables, "expand", clipped)

    np.testing.assert_allclose(written(apply)[1], apply(VARIABLES, IMAGES), rtol=1e-5, atol=1e-4)


def test_biases_of_a_residual_unit_are_in_its_layers():
    def apply(variables, images):
        x = conv(variables, "stem", images)
        return jax.nn.relu(x + conv(variables, "project", jax.nn.relu(conv(variables, "expand", x))))

    graph = fdjax.with_masks(fdjax.trace(apply, VARIABLES, IMAGES))
    frozen = fdjax.freeze(graph, VARIABLES, graph.full_counts()).frozen
    kinds = [operation.kind for operation in frozen.program.operations if isinstance(operation, Apply)]
    assert kinds.count("add") == 1
    np.testing.assert_allclose(written(apply)[1], apply(VARIABLES, IMAGES), rtol=1e-5, atol=1e-4)


SCALE, OFFSET = (jnp.asarray(RNG.uniform(0.5, 1.5, 8), jnp.float32) for _ in range(2))


@pytest.mark.parametrize(
    ("function", "kinds"),
    [
        (lambda x: jax.nn.relu(SCALE * x + OFFSET) + x, {"BatchNormalization": 1, "Add": 1}),
        (lambda x: jax.nn.relu((x - OFFSET) / SCALE * 3 + 1) + x, {"BatchNormalization": 1, "Add": 1}),
        (lambda x: jax.nn.relu(OFFSET - SCALE * x) + x, {"BatchNormalization": 1, "Add": 1}),
        (lambda x: jax.nn.relu(SCALE * x) + x, {"Mul": 1, "Add": 1}),
        (lambda x: jax.nn.relu(x + OFFSET) + x, {"Add": 2}),
        (lambda x: jax.nn.relu(3 * x + 1) + x, {"Mul": 1, "Add": 2}),
        # The mean of a pool is a sum over its window, divided by the window.
        (lambda x: (y := pooled(x) / 4) + jax.nn.relu(SCALE * y + OFFSET), {"BatchNormalization": 1, "Add": 1}),
        (lambda x: (y := SCALE * x + OFFSET) + jax.nn.relu(2 * y) * y, {"BatchNormalization": 2, "Add": 1, "Mul": 1}),
    ],
    ids=["before activation", "composed", "negative", "scale", "offset", "numbers", "pool", "read several times"],
)
def test_a_scale_and_an_offset_for_each_channel_are_a_batch_norm(function, kinds):
    def apply(variables, images):
        # After a sigmoid, no layer takes what follows into its kernel.
        return conv(variables, "expand", function(jax.nn.sigmoid(conv(variables, "stem", images))))

    operators, results = written(apply)
    assert {kind: operators[kind] for kind in ("BatchNormalization", "Mul", "Add") if operators[kind]} == kinds
    np.testing.assert_allclose(results, apply(VARIABLES, IMAGES), rtol=1e-5, atol=1e-5)


def pooled(x: jax.Array) -> jax.Array:
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
