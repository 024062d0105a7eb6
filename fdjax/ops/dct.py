"""The blockwise orthonormal DCT-II: bases, zigzag order, and the forward and inverse transforms, optionally truncated.

The paper's section 3.1: `IDCT(conv1x1(DCT(x))) == conv1x1(x)`. Shape letters are those of `fdjax.ops.blocks`; N = K*K
is the number of coefficients, n the number that are computed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fdjax.ops.blocks import check_block, merge_blocks, num_blocks, split_blocks

# The transforms are a small part of the arithmetic, but at the reduced default precision of accelerators they would
# dominate a layer's error.
_PRECISION = jax.lax.Precision.HIGHEST


@functools.cache
def zigzag_order(block: int) -> tuple[tuple[int, int], ...]:
    """Lists the frequencies in JPEG's zigzag order: (0, 0) first, then (0, 1).

    Args:
      block: the block size K, 1 to 16.

    Returns:
      N = K*K pairs (row, column).

    Raises:
      ValueError: `block` is out of range.

    Example:
      >>> zigzag_order(2)
      ((0, 0), (0, 1), (1, 0), (1, 1))
    """
    check_block(block)
    frequencies = [(row, column) for row in range(block) for column in range(block)]
    # Odd anti-diagonals run downwards, even ones upwards.
    return tuple(sorted(frequencies, key=lambda rc: (sum(rc), rc[0] if sum(rc) % 2 else rc[1])))


@functools.cache
def _dct_matrix(block: int) -> np.ndarray:
    """Returns the orthonormal DCT-II matrix [frequency, position] of size `block`, in float64."""
    check_block(block)
    frequency, position = np.mgrid[:block, :block]
    matrix = np.sqrt(2 / block) * np.cos(np.pi * (2 * position + 1) * frequency / (2 * block))
    matrix[0] /= np.sqrt(2)
    matrix.setflags(write=False)
    return matrix


def dct_basis(block: int, dtype=jnp.float32) -> np.ndarray:
    """Computes the orthonormal 2-D DCT-II basis in zigzag order.

    Args:
      block: the block size K, 1 to 16.
      dtype: the dtype of the result; values are computed in float64.

    Returns:
      [N, K, K].

    Raises:
      ValueError: `block` is out of range.
    """
    matrix = _dct_matrix(block)
    rows, columns = np.array(zigzag_order(block)).T
    return np.einsum("na,nb->nab", matrix[rows], matrix[columns]).astype(dtype)


def _check_num_coefs(num_coefs: int | None, block: int) -> int:
    total = block * block
    if num_coefs is None:
        return total
    if not 0 <= num_coefs <= total:
        raise ValueError(f"num_coefs must be from 0 to {total} for block {block}, got {num_coefs}")
    return num_coefs


def _check_map(x: jax.Array, what: str) -> None:
    if x.ndim < 3:
        raise ValueError(f"{what} must have shape [..., H, W, C], got {x.shape}")


def _separable_parts(block: int, num_coefs: int, dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns row and column DCT matrices cut to the frequencies in use, and each coefficient's row and column."""
    rows, columns = np.array(zigzag_order(block)[:num_coefs]).T
    matrix = _dct_matrix(block).astype(dtype)
    return matrix[: rows.max() + 1], matrix[: columns.max() + 1], rows, columns


def leading_dct(x: jax.Array, block: int, num_coefs: int | None = None, *, separable: bool = False) -> jax.Array:
    """Computes `block_dct` with the coefficient axis first.

    Each band is then one contiguous array, and XLA computes the transform as one matrix product.

    Args:
      x: [..., H, W, C].
      block: the block size K, 1 to 16.
      num_coefs: the number n of coefficients, 0 to N; None for all.
      separable: whether to transform rows and columns one after the other.

    Returns:
      [n, ..., R, S, C].

    Raises:
      ValueError: the block, the number of coefficients or the shape is out of range.
    """
    _check_map(x, "x")
    check_block(block)
    num_coefs = _check_num_coefs(num_coefs, block)
    blocks = split_blocks(x, block)
    if separable and num_coefs:
        row_matrix, column_matrix, rows, columns = _separable_parts(block, num_coefs, x.dtype)
        half = jnp.einsum("...rasbc,jb->j...rasc", blocks, column_matrix, precision=_PRECISION)
        grid = jnp.einsum("j...rasc,ia->ij...rsc", half, row_matrix, precision=_PRECISION)
        return grid[rows, columns]
    basis = dct_basis(block, x.dtype)[:num_coefs]
    return jnp.einsum("...rasbc,nab->n...rsc", blocks, basis, precision=_PRECISION)


def leading_idct(y: jax.Array, block: int, size: tuple[int, int], *, separable: bool = False) -> jax.Array:
    """Computes `block_idct` from the layout with the coefficient axis first.

    Args:
      y: [n, ..., R, S, C].
      block: the block size K, 1 to 16.
      size: (H, W) of the map.
      separable: as in `leading_dct`.

    Returns:
      [..., H, W, C].

    Raises:
      ValueError: the block or the shape is out of range, or `size` does not fit R and S.
    """
    check_block(block)
    if y.ndim < 4:
        raise ValueError(f"y must have shape [n, ..., R, S, C], got {y.shape}")
    num_coefs = _check_num_coefs(y.shape[0], block)
    expected = (num_blocks(size[0], block), num_blocks(size[1], block))
    if (y.shape[-3], y.shape[-2]) != expected:
        raise ValueError(
            f"a {size[0]}x{size[1]} map has {expected[0]}x{expected[1]} blocks of {block}, "
            f"got {y.shape[-3]}x{y.shape[-2]}"
        )
    if separable and num_coefs:
        row_matrix, column_matrix, rows, columns = _separable_parts(block, num_coefs, y.dtype)
        grid = jnp.zeros((len(row_matrix), len(column_matrix), *y.shape[1:]), y.dtype).at[rows, columns].set(y)
        half = jnp.einsum("ij...rsc,ia->j...rasc", grid, row_matrix, precision=_PRECISION)
        blocks = jnp.einsum("j...rasc,jb->...rasbc", half, column_matrix, precision=_PRECISION)
    else:
        basis = dct_basis(block, y.dtype)[:num_coefs]
        blocks = jnp.einsum("n...rsc,nab->...rasbc", y, basis, precision=_PRECISION)
    return merge_blocks(blocks, size)


def _butterfly(a, b, c, d):
    """Computes the 2x2 DCT (Haar) of pixels [[a, b], [c, d]], in zigzag order; it is its own inverse."""
    left, right, left_difference, right_difference = a + c, b + d, a - c, b - d
    return [
        (left + right) / 2,
        (left - right) / 2,
        (left_difference + right_difference) / 2,
        (left_difference - right_difference) / 2,
    ]


def layer_dct(x: jax.Array, block: int) -> jax.Array:
    """Computes `leading_dct` of all coefficients in its fastest form: additions for 2x2 blocks, else a matrix product.

    Args:
      x: [..., H, W, C].
      block: the block size K, 1 to 16.

    Returns:
      [N, ..., R, S, C].
    """
    if block != 2:
        return leading_dct(x, block)
    blocks = split_blocks(x, block)
    return jnp.stack(_butterfly(*(blocks[..., :, i, :, j, :] for i in range(2) for j in range(2))))


def layer_idct(y: jax.Array, block: int, size: tuple[int, int]) -> jax.Array:
    """Computes `leading_idct` of all coefficients in its fastest form.

    Args:
      y: [N, ..., R, S, C].
      block: the block size K, 1 to 16.
      size: (H, W) of the map.

    Returns:
      [..., H, W, C].
    """
    if block != 2:
        return leading_idct(y, block, size)
    a, b, c, d = _butterfly(*y)
    rows = [jnp.stack(row, axis=-2) for row in ((a, b), (c, d))]
    return merge_blocks(jnp.stack(rows, axis=-4), size)


def block_dct(x: jax.Array, block: int, num_coefs: int | None = None, *, separable: bool = False) -> jax.Array:
    """Computes the blockwise 2-D DCT-II, truncated to the first `num_coefs` coefficients in zigzag order (section 3.1).

    Args:
      x: [..., H, W, C], floating point. Where K does not divide H or W, the map is padded by repeating its edge.
      block: the block size K, 1 to 16.
      num_coefs: the number n of coefficients, 0 to N = K*K; None for all.
      separable: whether to transform rows and columns one after the other, which takes 2K multiply-accumulates per
        element in place of K*K.

    Returns:
      [..., R, S, n, C] with R = ceil(H/K) and S = ceil(W/K), in the dtype of `x`.

    Raises:
      ValueError: the block, the number of coefficients or the shape is out of range.
    """
    return jnp.moveaxis(leading_dct(x, block, num_coefs, separable=separable), 0, -2)


def block_idct(y: jax.Array, block: int, size: tuple[int, int], *, separable: bool = False) -> jax.Array:
    """Inverts `block_dct`; coefficients that are left out count as zero.

    Args:
      y: [..., R, S, n, C], the first n coefficients in zigzag order.
      block: the block size K, 1 to 16.
      size: (H, W) of the map; padding beyond it is cropped.
      separable: as in `block_dct`.

    Returns:
      [..., H, W, C], in the dtype of `y`.

    Raises:
      ValueError: the block or the shape is out of range, or `size` does not fit R and S.
    """
    if y.ndim < 4:
        raise ValueError(f"y must have shape [..., R, S, n, C], got {y.shape}")
    return leading_idct(jnp.moveaxis(y, -2, 0), block, size, separable=separable)
