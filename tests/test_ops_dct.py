"""Zigzag order, bases, the blockwise DCT and its inverse; the oracle is scipy.fft.dctn."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from hypothesis import given
from hypothesis import strategies as st

from fdjax.ops import block_dct, block_idct, dct_basis, zigzag_order
from fdjax.ops.blocks import merge_blocks, num_blocks, pad_to_blocks, split_blocks
from fdjax.ops.dct import layer_dct, layer_idct

BLOCKS = range(1, 17)
# ITU-T T.81 (JPEG), figure A.6: where each frequency of the 8x8 block comes in the zigzag sequence.
JPEG_8X8 = """
 0  1  5  6 14 15 27 28
 2  4  7 13 16 26 29 42
 3  8 12 17 25 30 41 43
 9 11 18 24 31 40 44 53
10 19 23 32 39 45 52 54
20 22 33 38 46 51 55 60
21 34 37 47 50 56 59 61
35 36 48 49 57 58 62 63
"""


def walk(block: int) -> list[tuple[int, int]]:
    """The zigzag by walking: right or down at the border, else along the diagonal."""
    row = column = 0
    up = True
    path = []
    for _ in range(block * block):
        path.append((row, column))
        if up and column == block - 1:
            row, up = row + 1, False
        elif up and row == 0:
            column, up = column + 1, False
        elif not up and row == block - 1:
            column, up = column + 1, True
        elif not up and column == 0:
            row, up = row + 1, True
        else:
            row, column = (row - 1, column + 1) if up else (row + 1, column - 1)
    return path


def reference_dct(x: np.ndarray, block: int) -> np.ndarray:
    """[..., H, W, C] -> [..., R, S, N, C] by scipy, in float64, edges repeated."""
    *leading, height, width, channels = x.shape
    pads = [(0, 0)] * len(leading) + [(0, -height % block), (0, -width % block), (0, 0)]
    x = np.pad(np.asarray(x, np.float64), pads, mode="edge")
    rows, columns = x.shape[-3] // block, x.shape[-2] // block
    x = x.reshape(*leading, rows, block, columns, block, channels)
    y = np.moveaxis(scipy.fft.dctn(x, axes=(-4, -2), norm="ortho"), -4, -3)
    return np.stack([y[..., i, j, :] for i, j in walk(block)], axis=-2)


def normal(shape: tuple[int, ...], seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def assert_close(actual, expected, relative: float) -> None:
    """Within `relative` of the array's largest value."""
    expected = np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    scale = max(np.abs(expected).max(initial=0), 1e-30)
    assert np.abs(np.asarray(actual, np.float64) - expected).max(initial=0) <= relative * scale


# Zigzag and bases


@pytest.mark.parametrize("block", BLOCKS)
def test_zigzag_visits_every_frequency_once_along_jpegs_path(block: int) -> None:
    order = zigzag_order(block)
    assert sorted(order) == [(row, column) for row in range(block) for column in range(block)]
    assert list(order) == walk(block)


def test_zigzag_of_8x8_is_jpegs() -> None:
    positions = np.array(JPEG_8X8.split(), int).reshape(8, 8)
    assert [int(positions[frequency]) for frequency in zigzag_order(8)] == list(range(64))


@pytest.mark.parametrize("block", BLOCKS)
def test_basis_is_orthonormal_and_starts_with_the_mean(block: int) -> None:
    basis = dct_basis(block, np.float64)
    assert basis.shape == (block**2, block, block)
    flat = basis.reshape(block**2, block**2)
    np.testing.assert_allclose(flat @ flat.T, np.eye(block**2), atol=1e-13)
    np.testing.assert_allclose(basis[0], np.full((block, block), 1 / block), rtol=1e-15)


def test_basis_has_the_dtype_asked_for() -> None:
    for dtype in (jnp.float32, jnp.bfloat16, np.float64):
        assert dct_basis(3, dtype).dtype == dtype


@pytest.mark.parametrize("block", [0, -1, 17, 2.0, True, "4", None])
def test_a_block_out_of_range_is_a_value_error(block) -> None:
    for call in (
        lambda: zigzag_order(block),
        lambda: dct_basis(block),
        lambda: block_dct(jnp.zeros((4, 4, 1)), block),
        lambda: block_idct(jnp.zeros((1, 1, 1, 1)), block, (4, 4)),
    ):
        with pytest.raises(ValueError, match="block must be an integer from 1 to 16"):
            call()


# Blocks


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 16))
def test_splitting_and_merging_gives_the_map_back(height: int, width: int, block: int) -> None:
    x = np.arange(height * width * 2.0).reshape(height, width, 2)
    blocks = split_blocks(x, block)  # type: ignore[arg-type]
    rows, columns = -(-height // block), -(-width // block)
    assert (num_blocks(height, block), num_blocks(width, block)) == (rows, columns)
    assert blocks.shape == (rows, block, columns, block, 2)
    np.testing.assert_array_equal(merge_blocks(blocks, (height, width)), x)


def test_padding_repeats_the_edge_at_the_bottom_and_right() -> None:
    x = normal((2, 5, 7, 3))
    np.testing.assert_array_equal(
        pad_to_blocks(jnp.asarray(x), 4), np.pad(x, ((0, 0), (0, 3), (0, 1), (0, 0)), mode="edge")
    )


# The transform


# Compilation is most of the time here, and what is compiled is tiny.
fast_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@partial(fast_jit, static_argnums=(1, 2))
def _transforms(x: jax.Array, block: int, kept: int) -> dict[str, jax.Array]:
    size = (x.shape[-3], x.shape[-2])
    full = block_dct(x, block)
    return {
        "full": full,
        "separable": block_dct(x, block, separable=True),
        "truncated": block_dct(x, block, kept),
        "truncated separable": block_dct(x, block, kept, separable=True),
        "back": block_idct(full, block, size),
        "back separable": block_idct(full, block, size, separable=True),
        "low": block_idct(full[..., :kept, :], block, size),
        "low separable": block_idct(full[..., :kept, :], block, size, separable=True),
        "low of zeroed": block_idct(full.at[..., kept:, :].set(0), block, size),
    }


@pytest.mark.parametrize("block", BLOCKS)
def test_transform_and_inverse_agree_with_scipy(block: int) -> None:
    """Truncated, separable and back; the inverse reads missing coefficients as zero."""
    x = normal((2, 2 * block, 2 * block - 1, 3), seed=block)  # the block divides the height, and (from 2 on) no width
    kept = (block**2 + 1) // 2
    expected = reference_dct(x, block)
    found = _transforms(x, block, kept)
    assert_close(found["full"], expected, 1e-6)
    assert_close(found["separable"], expected, 1e-6)
    assert_close(found["truncated"], expected[..., :kept, :], 1e-6)
    assert_close(found["truncated separable"], expected[..., :kept, :], 1e-6)
    assert_close(found["back"], x, 2e-6)
    assert_close(found["back separable"], x, 2e-6)

    basis = np.zeros((block**2, block, block))
    for n, frequency in enumerate(walk(block)):
        basis[n][frequency] = 1
    basis = scipy.fft.idctn(basis, axes=(1, 2), norm="ortho")
    low = np.einsum("...rsnc,nab->...rasbc", expected[..., :kept, :], basis[:kept])
    low = low.reshape(2, 2 * block, -1, 3)[:, :, : 2 * block - 1]
    for name in ("low", "low separable", "low of zeroed"):
        assert_close(found[name], low, 2e-6)


def test_any_number_of_coefficients_is_a_prefix_of_all() -> None:
    x, expected = normal((6, 5, 2)), reference_dct(normal((6, 5, 2)), 3)

    @fast_jit
    def all_prefixes(x):
        return [(block_dct(x, 3, n), block_dct(x, 3, n, separable=True)) for n in range(10)]

    for kept, pair in enumerate(all_prefixes(x)):
        for y in pair:
            assert_close(y, expected[..., :kept, :], 1e-6)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_the_form_that_layers_use_is_the_same_transform(block: int) -> None:
    """Additions for 2x2 blocks; maps that the block divides in one direction only."""
    x = normal((2, 6, 5, 3))
    y = fast_jit(layer_dct, static_argnums=1)(x, block)
    assert_close(np.moveaxis(y, 0, -2), reference_dct(x, block), 1e-6)
    assert_close(fast_jit(layer_idct, static_argnums=(1, 2))(y, block, (6, 5)), x, 2e-6)


def test_no_coefficients_make_a_map_of_zeros() -> None:
    for separable in (False, True):
        y = block_dct(jnp.ones((2, 5, 5, 3)), 2, 0, separable=separable)
        assert y.shape == (2, 3, 3, 0, 3)
        np.testing.assert_array_equal(block_idct(y, 2, (5, 5), separable=separable), np.zeros((2, 5, 5, 3)))


@partial(fast_jit, static_argnums=(1, 2, 3))
def round_trip(x, block: int, size: tuple[int, int], separable: bool = False) -> tuple[jax.Array, jax.Array]:
    y = block_dct(x, block, separable=separable)
    return y, block_idct(y, block, size, separable=separable)


@pytest.mark.parametrize("leading", [(), (1,), (4,), (2, 1, 3)])
def test_any_leading_batch_shape(leading: tuple[int, ...]) -> None:
    x = normal((*leading, 8, 9, 2))
    y, back = round_trip(x, 4, (8, 9))
    assert_close(y, reference_dct(x, 4), 1e-6)
    assert_close(back, x, 2e-6)


def test_float64_is_exact_to_its_own_precision() -> None:
    with jax.enable_x64(True):
        x = normal((2, 7, 10, 3), dtype=np.float64)
        for separable in (False, True):
            y, back = round_trip(x, 4, (7, 10), separable)
            assert y.dtype == back.dtype == jnp.float64
            assert_close(y, reference_dct(x, 4), 1e-14)
            assert_close(back, x, 1e-14)


def test_bfloat16_stays_bfloat16() -> None:
    x = jnp.asarray(normal((2, 7, 10, 3)), jnp.bfloat16)
    for separable in (False, True):
        y, back = round_trip(x, 4, (7, 10), separable)
        assert y.dtype == back.dtype == jnp.bfloat16
        assert_close(y.astype(jnp.float32), reference_dct(np.asarray(x, np.float32), 4), 2e-2)
        assert_close(back.astype(jnp.float32), x.astype(jnp.float32), 3e-2)


def test_the_gradient_of_the_transform_is_its_inverse() -> None:
    """Orthonormal: the transpose is the inverse."""
    x, y = jnp.asarray(normal((8, 8, 2))), jnp.asarray(normal((2, 2, 16, 2), seed=1))
    pulled = jax.vjp(lambda x: block_dct(x, 4), x)[1](y)[0]
    assert_close(pulled, block_idct(y, 4, (8, 8)), 1e-6)


@pytest.mark.parametrize("size", [(16, 16), (7, 10)])
@pytest.mark.parametrize("block", [1, 2, 3, 4, 7, 8, 16])
def test_pointwise_convolution_with_bias_commutes_with_the_transform(block: int, size: tuple[int, int]) -> None:
    """Section 3.1. A bias may be added after the inverse, or as K*b to coefficient 0 before it."""
    x, kernel, bias = normal((2, *size, 5)), normal((5, 6), seed=1), normal((6,), seed=2)

    @fast_jit
    def in_frequency(x):
        y = block_dct(x, block) @ kernel
        with_mean = y.at[..., 0, :].add(block * bias)
        return block_idct(y, block, size) + bias, block_idct(with_mean, block, size)

    expected = np.asarray(x, np.float64) @ kernel + bias
    for found in in_frequency(x):
        assert_close(found, expected, 1e-5)


# Bad input


def test_bad_shapes_and_counts_are_value_errors() -> None:
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., H, W, C\], got \(4, 4\)"):
        block_dct(jnp.zeros((4, 4)), 2)
    with pytest.raises(ValueError, match=r"y must have shape .* got \(2, 2, 4\)"):
        block_idct(jnp.zeros((2, 2, 4)), 2, (4, 4))
    for count in (-1, 5):
        with pytest.raises(ValueError, match=f"num_coefs must be from 0 to 4 for block 2, got {count}"):
            block_dct(jnp.zeros((4, 4, 1)), 2, count)
    with pytest.raises(ValueError, match="num_coefs must be from 0 to 4"):
        block_idct(jnp.zeros((2, 2, 5, 1)), 2, (4, 4))
    with pytest.raises(ValueError, match="a 6x4 map has 3x2 blocks of 2, got 2x2"):
        block_idct(jnp.zeros((2, 2, 4, 1)), 2, (6, 4))
