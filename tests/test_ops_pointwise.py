"""Dense, masked and banded pointwise convolution: one function three ways; the oracle is scipy, block by block."""

from __future__ import annotations

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax

from fdjax.ops import BandPlan, banded_pointwise, dense_pointwise, masked_pointwise, plan_bands
from fdjax.ops.block_means import mask_around_means
from tests.scipy_pointwise import prefix_mask, scipy_masked

# (H, W), K, C, D: maps that the block divides and others; layers that widen and that narrow; one block a map.
CASES = (
    ((4, 6), 2, 3, 5),
    ((5, 7), 2, 6, 2),
    ((6, 3), 3, 4, 4),
    ((7, 8), 3, 2, 5),
    ((4, 8), 4, 5, 3),
    ((3, 3), 1, 4, 5),
    ((5, 5), 5, 3, 2),
)


def layer(size, channels: int, features: int, leading=(), seed: int = 0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*leading, *size, channels)).astype(np.float32)
    return x, rng.normal(size=(channels, features)).astype(np.float32)


# Compilation is most of the time here, and what is compiled is tiny.
fast_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
masked = fast_jit(masked_pointwise, static_argnums=2)
banded = fast_jit(banded_pointwise, static_argnums=2)


@st.composite
def layers(draw):
    size, block, channels, features = draw(st.sampled_from(CASES))
    count = st.one_of(st.sampled_from([0, 1, block**2]), st.integers(0, block**2))
    inputs = draw(st.lists(count, min_size=channels, max_size=channels))
    outputs = draw(st.lists(count, min_size=features, max_size=features))
    return size, block, inputs, outputs


# The property


@given(layers())
@example(((5, 7), 2, [0] * 6, [0, 0]))
@example(((5, 7), 2, [0] * 6, [4, 2]))
@example(((4, 6), 2, [4, 1, 2], [0] * 5))
@example(((4, 8), 4, [16, 0, 16, 0, 16], [0, 16, 16]))
def test_masked_is_banded_for_any_kept_counts(case) -> None:
    size, block, inputs, outputs = case
    x, kernel = layer(size, len(inputs), len(outputs), seed=sum(inputs))
    masks = (prefix_mask(inputs, block), prefix_mask(outputs, block))
    expected = scipy_masked(x, kernel, block, *masks)
    np.testing.assert_allclose(masked(x, kernel, block, *masks), expected, atol=2e-5)
    np.testing.assert_allclose(banded(x, kernel, plan_bands(inputs, outputs, block)), expected, atol=2e-5)


@pytest.mark.parametrize("sides", ["input", "output", "both", "none"])
@pytest.mark.parametrize(("size", "block", "channels", "features"), [CASES[0], CASES[1], CASES[2]])
def test_any_soft_mask_on_either_side(size, block: int, channels: int, features: int, sides: str) -> None:
    """Masks need be neither rounded nor prefixes; without one, the transform may move to the product's other side."""
    x, kernel = layer(size, channels, features)
    rng = np.random.default_rng(1)
    input_mask = rng.uniform(size=(block**2, channels)).astype(np.float32) if sides in ("input", "both") else None
    output_mask = rng.uniform(size=(block**2, features)).astype(np.float32) if sides in ("output", "both") else None
    expected = scipy_masked(x, kernel, block, input_mask, output_mask)
    np.testing.assert_allclose(masked(x, kernel, block, input_mask, output_mask), expected, atol=2e-5)


@pytest.mark.parametrize("sides", ["input", "output", "both"])
@pytest.mark.parametrize(("size", "block", "channels", "features"), CASES)
def test_masks_around_the_mean_need_no_transform(size, block: int, channels: int, features: int, sides: str) -> None:
    """Value and gradients, where all coefficients but the first share a value."""
    x, kernel = layer(size, channels, features, leading=(2,))
    rng = np.random.default_rng(1)

    def mask(width: int) -> np.ndarray:
        first, rest = rng.uniform(0, 1, (2, width)).astype(np.float32)
        return np.stack([first, *[rest] * (block**2 - 1)])

    masks = [
        mask(width) if sides in (side, "both") else None for side, width in (("input", channels), ("output", features))
    ]

    @partial(jax.jit, static_argnames="block_means")
    def value_and_gradients(x, kernel, masks, block_means: bool):
        def loss(x, kernel, masks):
            y = masked_pointwise(x, kernel, block, *masks, block_means=block_means)
            return jnp.sum(jnp.sin(y)), y

        (_, y), (dx, dkernel, dmasks) = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x, kernel, masks)
        # By what the two values of a mask mean: which of the equal rows has the gradient is a matter of form.
        grouped = [(d[0], d[1:].sum(axis=0)) for d in dmasks if d is not None]
        return y, dx, dkernel, grouped

    results = (jax.tree.leaves(value_and_gradients(x, kernel, masks, block_means)) for block_means in (True, False))
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-4)


@pytest.mark.parametrize(("size", "block", "channels", "features"), CASES)
def test_nothing_pruned_is_the_dense_convolution(size, block: int, channels: int, features: int) -> None:
    x, kernel = layer(size, channels, features)
    expected = np.asarray(x, np.float64) @ kernel
    full = plan_bands([block**2] * channels, [block**2] * features, block)
    ones = (np.ones((block**2, channels), np.float32), np.ones((block**2, features), np.float32))
    np.testing.assert_allclose(masked(x, kernel, block, *ones), expected, atol=2e-5)
    np.testing.assert_allclose(banded(x, kernel, full), expected, atol=2e-5)


@pytest.mark.parametrize("dead", ["input", "output", "both"])
def test_dead_channels_give_zeros_and_not_nan(dead: str) -> None:
    (size, block, channels, features) = CASES[1]
    x, kernel = layer(size, channels, features)
    inputs = [0] * channels if dead != "output" else [4] * channels
    outputs = [0] * features if dead != "input" else [4] * features
    for y in (
        banded(x, kernel, plan_bands(inputs, outputs, block)),
        masked(x, kernel, block, prefix_mask(inputs, block), prefix_mask(outputs, block)),
    ):
        np.testing.assert_array_equal(y, np.zeros((*size, features)))


@pytest.mark.parametrize("leading", [(2,), (2, 3)])
def test_leading_batch_dimensions_are_free(leading: tuple[int, ...]) -> None:
    size, block, channels, features = CASES[1]
    inputs, outputs = [4, 1, 0, 2, 4, 1], [3, 1]
    x, kernel = layer(size, channels, features, leading)
    masks = (prefix_mask(inputs, block), prefix_mask(outputs, block))
    expected = np.stack([scipy_masked(image, kernel, block, *masks) for image in x.reshape(-1, *x.shape[-3:])])
    expected = expected.reshape(*leading, *expected.shape[1:])
    np.testing.assert_allclose(masked(x, kernel, block, *masks), expected, atol=2e-5)
    np.testing.assert_allclose(banded(x, kernel, plan_bands(inputs, outputs, block)), expected, atol=2e-5)
    np.testing.assert_allclose(dense_pointwise(x, kernel), np.asarray(x, np.float64) @ kernel, atol=2e-5)  # type: ignore[arg-type]


def test_dense_is_the_librarys_1x1_convolution() -> None:
    x, kernel = layer((5, 7), 6, 4, leading=(2,))
    expected = lax.conv_general_dilated(
        x, kernel[None, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(dense_pointwise(jnp.asarray(x), jnp.asarray(kernel)), expected, atol=1e-5)


@settings(max_examples=8)
@given(
    leading=st.lists(st.integers(1, 3), max_size=2),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    channels=st.integers(1, 6),
    features=st.integers(1, 6),
)
@example(leading=[], size=(1, 1), channels=1, features=1)
@example(leading=[2, 3], size=(3, 2), channels=5, features=2)
def test_gradients_of_the_dense_layer_are_autodiffs(leading, size, channels: int, features: int) -> None:
    rng = np.random.default_rng(0)
    shapes = ((*leading, *size, channels), (channels, features), (*leading, *size, features))
    x, kernel, cotangent = (rng.normal(size=shape) for shape in shapes)

    def value_and_grads(function):
        def run(x, kernel, cotangent):
            y, pull = jax.vjp(function, x, kernel)
            return y, *pull(cotangent)

        return fast_jit(run)(x, kernel, cotangent)

    with jax.enable_x64(True):
        found = value_and_grads(dense_pointwise)
        expected = value_and_grads(partial(jnp.einsum, "...c,cd->...d"))
    for name, left, right in zip(("y", "dx", "dkernel"), found, expected, strict=True):
        assert (left.shape, left.dtype) == (right.shape, np.float64), name
        np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-12, err_msg=name)


def test_gradients_of_the_dense_layer_under_vmap() -> None:
    """A kernel for each example: the batch axis of vmap is not the layer's own."""
    rng = np.random.default_rng(0)
    x, kernel, cotangent = (
        rng.normal(size=shape).astype(np.float32) for shape in ((3, 2, 4, 5, 6), (3, 6, 2), (3, 2, 4, 5, 2))
    )

    def grads(x, kernel, cotangent):
        return jax.grad(lambda x, w: jnp.sum(cotangent * dense_pointwise(x, w)), argnums=(0, 1))(x, kernel)

    dx, dkernel = fast_jit(jax.vmap(grads))(x, kernel, cotangent)
    np.testing.assert_allclose(dx, np.einsum("nbhwd,ncd->nbhwc", cotangent, kernel), atol=2e-5)
    np.testing.assert_allclose(dkernel, np.einsum("nbhwc,nbhwd->ncd", x, cotangent), atol=2e-5)


def test_gradients_of_masked_and_banded_agree() -> None:
    size, block, channels, features = CASES[0]
    inputs, outputs = [4, 1, 2], [3, 0, 4, 1, 2]
    x, kernel = layer(size, channels, features)
    plan, masks = plan_bands(inputs, outputs, block), (prefix_mask(inputs, block), prefix_mask(outputs, block))
    target = np.random.default_rng(1).normal(size=(*size, features)).astype(np.float32)
    of_masked, of_banded = (
        fast_jit(jax.grad(lambda x, w, f=f: jnp.sum(target * f(x, w)), argnums=(0, 1)))(x, kernel)
        for f in (lambda x, w: masked_pointwise(x, w, block, *masks), lambda x, w: banded_pointwise(x, w, plan))
    )
    for left, right in zip(of_masked, of_banded, strict=True):
        np.testing.assert_allclose(left, right, atol=2e-5)
        assert np.abs(left).max() > 0.1


def test_the_gradient_to_a_mask_is_what_its_coefficient_contributes() -> None:
    """The output is linear in a mask: f(m) == sum of m * df/dm over one side's mask."""
    size, block, channels, features = CASES[3]
    x, kernel = layer(size, channels, features)
    input_mask = np.random.default_rng(2).uniform(size=(block**2, channels)).astype(np.float32)
    target = np.random.default_rng(1).normal(size=(*size, features)).astype(np.float32)
    value, gradient = fast_jit(
        jax.value_and_grad(lambda m: jnp.sum(target * masked_pointwise(x, kernel, block, m)))  # type: ignore[arg-type]
    )(input_mask)
    np.testing.assert_allclose(np.sum(input_mask * gradient), value, rtol=1e-4)
    expected = np.sum(target * scipy_masked(x, kernel, block, input_mask))
    np.testing.assert_allclose(value, expected, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_precisions(dtype: str) -> None:
    size, block, channels, features = CASES[0]
    inputs, outputs = [4, 1, 2], [3, 0, 4, 1, 2]
    with jax.enable_x64(dtype == "float64"):
        x, kernel = (jnp.asarray(array, dtype) for array in layer(size, channels, features))
        masks = [jnp.asarray(prefix_mask(side, block), dtype) for side in (inputs, outputs)]
        expected = scipy_masked(np.asarray(x, np.float64), kernel, block, *masks)
        for y in (masked(x, kernel, block, *masks), banded(x, kernel, plan_bands(inputs, outputs, block))):
            assert y.dtype == dtype
            np.testing.assert_allclose(
                np.asarray(y, np.float64), expected, atol={"bfloat16": 0.1, "float64": 1e-13}[dtype]
            )


@pytest.mark.parametrize("block", [None, 2])
def test_gradients_have_the_types_of_what_they_are_of(block: int | None) -> None:
    """Maps in half precision with float32 kernels and masks, as in mixed precision."""
    x, kernel = jnp.ones((2, 4, 4, 3), jnp.bfloat16), jnp.ones((3, 5))
    mask = jnp.stack([jnp.full(3, 0.7), *[jnp.full(3, 0.2)] * 3])

    def loss(x: jax.Array, kernel: jax.Array, mask: jax.Array) -> jax.Array:
        x = jnp.tanh(x)
        y = dense_pointwise(x if block is None else mask_around_means(x, mask, block), kernel)
        return y.sum() + x.astype(jnp.float32).sum()

    grads = jax.grad(loss, argnums=(0, 1, 2))(x, kernel, mask)
    assert [grad.dtype for grad in grads] == [jnp.bfloat16, jnp.float32, jnp.float32]


# The plan


def test_equal_plans_are_one_static_argument() -> None:
    traces = []

    @partial(jax.jit, static_argnames="plan")
    def apply(x, kernel, plan: BandPlan):
        traces.append(plan)
        return banded_pointwise(x, kernel, plan)

    x, kernel = layer((4, 4), 2, 2)
    first, second = plan_bands([4, 1], [2, 0], 2), plan_bands(np.array([4, 1]), (2, 0), 2)
    assert first == second and hash(first) == hash(second)
    np.testing.assert_array_equal(apply(x, kernel, plan=first), apply(x, kernel, plan=second))
    assert len(traces) == 1
    apply(x, kernel, plan=plan_bands([4, 1], [2, 1], 2))
    assert len(traces) == 2


COUNTS = st.lists(st.integers(0, 9), max_size=7)


@given(COUNTS, COUNTS)
def test_plan_sorts_channels_so_that_every_band_is_a_prefix(inputs: list[int], outputs: list[int]) -> None:
    plan = plan_bands(inputs, outputs, 3)
    for counts, order, segments, side in (
        (inputs, plan.input_order, plan.input_segments, 0),
        (outputs, plan.output_order, plan.output_segments, 1),
    ):
        assert list(order) == sorted(range(len(counts)), key=lambda channel: (-counts[channel], channel))
        ordered = [counts[channel] for channel in order]
        for band in range(9):
            width = plan.widths[band][side]
            assert width == sum(count > band for count in counts)
            assert all(count > band for count in ordered[:width])
        expanded = [count for start, stop, count in segments for _ in range(start, stop)]
        assert expanded == [count for count in ordered if count]
        assert [start for start, _, _ in segments] == [0, *(stop for _, stop, _ in segments)][: len(segments)]
        assert len({count for _, _, count in segments}) == len(segments)


@given(COUNTS, COUNTS)
def test_plan_survives_json(inputs: list[int], outputs: list[int]) -> None:
    plan = plan_bands(inputs, outputs, 3)
    text = plan.to_json()
    assert json.loads(text) == {"block": 3, "input_counts": inputs, "output_counts": outputs}
    again = BandPlan.from_json(text)
    assert again == plan and hash(again) == hash(plan)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        "7",
        '{"block": 2, "input_counts": [1]}',
        '{"block": 2, "input_counts": 1, "output_counts": [1]}',
        '{"block": 2, "input_counts": [5], "output_counts": [1]}',
        '{"block": 2, "input_counts": [1.5], "output_counts": [1]}',
        '{"block": 2, "input_counts": [true], "output_counts": [1]}',
        '{"block": 2, "input_counts": ["1"], "output_counts": [1]}',
        '{"block": 20, "input_counts": [1], "output_counts": [1]}',
        '{"block": "2", "input_counts": [1], "output_counts": [1]}',
    ],
)
def test_json_that_is_no_plan_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"BandPlan|counts must|block must"):
        BandPlan.from_json(text)


# Bad input


@pytest.mark.parametrize(
    ("inputs", "outputs", "block", "words"),
    [
        ([5], [1], 2, r"input_counts must lie in 0\.\.4 for block 2"),
        ([1], [-1], 2, r"output_counts must lie in 0\.\.4 for block 2"),
        ([1], [1], 0, "block must be an integer from 1 to 16"),
        ([1], [1], 17, "block must be an integer from 1 to 16"),
    ],
)
def test_counts_out_of_range_are_a_value_error(inputs, outputs, block: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_bands(inputs, outputs, block)


def test_a_plan_takes_tuples_of_python_ints_only() -> None:
    for counts in ([1], (np.int64(1),), (1.0,), (True,)):
        with pytest.raises(ValueError, match="input_counts must be a tuple of Python ints"):
            BandPlan(2, counts, (1,))  # type: ignore[arg-type]


def test_shapes_that_do_not_fit_are_value_errors_with_the_shapes() -> None:
    x, kernel = jnp.zeros((4, 4, 3)), jnp.zeros((3, 2))
    plan = plan_bands([1, 1, 1], [1, 1], 2)
    for call in (
        lambda x, kernel: dense_pointwise(x, kernel),
        lambda x, kernel: masked_pointwise(x, kernel, 2),
        lambda x, kernel: banded_pointwise(x, kernel, plan),
    ):
        for bad_x, bad_kernel in ((jnp.zeros((4, 4, 2)), kernel), (x[0], kernel), (x, kernel[None])):
            with pytest.raises(ValueError, match="do not fit: got"):
                call(bad_x, bad_kernel)
    with pytest.raises(ValueError, match=r"input_mask must have shape \(4, 3\), got \(4, 2\)"):
        masked_pointwise(x, kernel, 2, jnp.ones((4, 2)))
    with pytest.raises(ValueError, match=r"output_mask must have shape \(4, 2\), got \(1, 2\)"):
        masked_pointwise(x, kernel, 2, None, jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="block must be an integer from 1 to 16, got 0"):
        masked_pointwise(x, kernel, 0)
    with pytest.raises(ValueError, match=r"kernel must be \[3, 1\] for this plan, got \(3, 2\)"):
        banded_pointwise(x, kernel, plan_bands([1, 1, 1], [1], 2))
