"""FCMask: one learned value in [0, 1] per channel sets how many low-frequency coefficients it keeps (section 3.3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np


@jax.custom_jvp
def _clip_to_unit(z: jax.Array) -> jax.Array:
    return jnp.clip(z, 0, 1)


@_clip_to_unit.defjvp
def _clip_to_unit_jvp(primals, tangents):
    (z,), (tangent,) = primals, tangents
    # Both corners pass the full gradient: a mask starts at exactly 1.0 and must be able to leave it, and a mask that
    # has reached 0.0 must be able to return. (`jnp.clip` passes half of it.)
    return jnp.clip(z, 0, 1), jnp.where((z >= 0) & (z <= 1), tangent, jnp.zeros_like(tangent))


def level_counts(num_coefs: int, levels: Sequence[int] | None = None) -> tuple[int, ...]:
    """Lists the kept counts that a mask may be rounded to, in ascending order.

    Args:
      num_coefs: the number of coefficients N.
      levels: the counts between 0 and N to allow; others are ignored. None allows all.

    Returns:
      0, the allowed counts, and N.

    Example:
      >>> level_counts(9, levels=(1, 4, 16))
      (0, 1, 4, 9)
    """
    between = range(1, num_coefs) if levels is None else (count for count in levels if 0 < count < num_coefs)
    return tuple(sorted({0, *between, num_coefs}))


def coef_mask(fcmask: jax.Array, num_coefs: int, levels: Sequence[int] | None = None) -> jax.Array:
    """Computes coefficient masks from FCMasks: `clip((m - n/N) * N, 0, 1)` for n = 0..N-1 (section 3.3 and Figure 2).

    With `levels` 0 = L_0 < ... < L_S = N, the S intervals between them share the range of m equally. The coefficients
    of interval s, L_s to L_(s+1) - 1, fade together: `clip((m - s/S) * S, 0, 1)`. With all levels this is the paper's
    formula.

    Args:
      fcmask: FCMasks, [C], in [0, 1].
      num_coefs: the number of coefficients N.
      levels: the kept counts between 0 and N to allow, such as (1,); others are ignored. None allows all.

    Returns:
      [N, C] in [0, 1], non-increasing along the coefficients. The gradient at m = 1 is the one just below 1.
    """
    counts = level_counts(num_coefs, levels)
    stretch = np.searchsorted(counts, np.arange(num_coefs), side="right") - 1
    return _clip_to_unit(fcmask[None] * (len(counts) - 1) - jnp.asarray(stretch, fcmask.dtype)[:, None])


def kept_counts(fcmask: jax.Array, num_coefs: int, levels: Sequence[int] | None = None) -> jax.Array:
    """Computes how many leading coefficients each channel keeps once its mask is rounded.

    A coefficient is kept where its mask is at least 0.5. Without `levels`, the count is therefore m * N, rounded half
    up.

    Args:
      fcmask: FCMasks, [C], in [0, 1].
      num_coefs: the number of coefficients N.
      levels: the kept counts between 0 and N to allow, such as (1,); others are ignored. None allows all.

    Returns:
      int32 [C]; each value is one of the levels.
    """
    counts = level_counts(num_coefs, levels)
    rounded = _nearest(fcmask, len(counts) - 1)
    # With all levels, the index is the count itself, and no table is needed.
    return rounded if len(counts) == num_coefs + 1 else jnp.asarray(counts, jnp.int32)[rounded]


def nearest_level(fcmask: jax.Array, num_coefs: int, levels: Sequence[int] | None = None) -> jax.Array:
    """Rounds FCMasks to the nearest values at which no coefficient is half kept; their kept counts do not change.

    Args:
      fcmask: FCMasks, [C], in [0, 1].
      num_coefs: the number of coefficients N.
      levels: the kept counts between 0 and N to allow, such as (1,); others are ignored. None allows all.

    Returns:
      [C], each value one of s/S for s = 0..S, where S is the number of intervals between levels.
    """
    intervals = len(level_counts(num_coefs, levels)) - 1
    return _nearest(fcmask, intervals).astype(fcmask.dtype) / intervals


def _nearest(fcmask: jax.Array, intervals: int) -> jax.Array:
    """Returns the index of the nearest level, int32 [C], half up."""
    scaled = fcmask * intervals
    # floor(scaled + 0.5) would round the sum as well, and give 1 for a value just below 0.5.
    below = jnp.floor(scaled)
    return jnp.clip(below + (scaled - below >= 0.5), 0, intervals).astype(jnp.int32)


def hard_coef_mask(fcmask: jax.Array, num_coefs: int) -> jax.Array:
    """Computes rounded coefficient masks, which pass no gradient.

    Args:
      fcmask: FCMasks, [C], in [0, 1].
      num_coefs: the number of coefficients N.

    Returns:
      [N, C], exactly 0 or 1, in the dtype of `fcmask`.
    """
    keeps = jnp.arange(num_coefs)[:, None] < kept_counts(fcmask, num_coefs)[None]
    return jax.lax.stop_gradient(keeps.astype(fcmask.dtype))


def counts_to_fcmask(counts: np.ndarray, num_coefs: int) -> np.ndarray:
    """Computes FCMasks that round to the given counts exactly: counts / N.

    Args:
      counts: kept counts, int [C], 0 to N.
      num_coefs: the number of coefficients N.

    Returns:
      float32 [C] in [0, 1].
    """
    return (np.asarray(counts, np.float64) / num_coefs).astype(np.float32)


def fcmask_penalty(fcmasks: Iterable[jax.Array]) -> jax.Array:
    """Computes the paper's penalty before its factor lambda: the sum over layers of mean |FCMask| (section 3.3).

    Args:
      fcmasks: one array per layer, of any shape.

    Returns:
      A scalar.
    """
    return sum((jnp.mean(jnp.abs(fcmask)) for fcmask in fcmasks), start=jnp.zeros(()))
