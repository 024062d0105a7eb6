"""FCMask: a learned value in [0, 1] per channel says how many low-frequency coefficients it keeps (section 3.3)."""

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
    # Both corners pass the gradient in full: a mask starts at exactly 1.0 and must be able to leave it, and one that
    # has reached 0.0 can come back. (`jnp.clip` passes half of it there.)
    return jnp.clip(z, 0, 1), jnp.where((z >= 0) & (z <= 1), tangent, jnp.zeros_like(tangent))


def level_counts(num_coefs: int, levels: Sequence[int] | None = None) -> tuple[int, ...]:
    """The kept counts that a mask may be rounded to, ascending.

    Args:
      num_coefs: N.
      levels: counts below N that are accepted; those that are not below N are left out. None: all.

    Returns:
      0, what `levels` adds, and N.
    """
    between = range(1, num_coefs) if levels is None else (count for count in levels if 0 < count < num_coefs)
    return tuple(sorted({0, *between, num_coefs}))


def coef_mask(fcmask: jax.Array, num_coefs: int, levels: Sequence[int] | None = None) -> jax.Array:
    """Coefficient mask from FCMask: `clip((m - n/N) * N, 0, 1)` for n = 0..N-1 (section 3.3 and Figure 2).

    With `levels` 0 = L_0 < ... < L_S = N the S stretches between them share the range of m, and the coefficients of
    stretch s, L_s to L_(s+1) - 1, fade together: `clip((m - s/S) * S, 0, 1)`. The paper's formula is that of all
    levels.

    Args:
      fcmask: [C], in [0, 1].
      num_coefs: N.
      levels: see `level_counts`.

    Returns:
      [N, C] in [0, 1], non-increasing along the coefficients. Its gradient at m = 1 is that of m just below 1.
    """
    counts = level_counts(num_coefs, levels)
    stretch = np.searchsorted(counts, np.arange(num_coefs), side="right") - 1
    return _clip_to_unit(fcmask[None] * (len(counts) - 1) - jnp.asarray(stretch, fcmask.dtype)[:, None])


def kept_counts(fcmask: jax.Array, num_coefs: int, levels: Sequence[int] | None = None) -> jax.Array:
    """How many leading coefficients each channel keeps once masks are rounded: [C] -> int32 [C], one of the levels.

    Coefficient n is kept where its mask is at least 0.5, which without `levels` makes the count m * N rounded, a half
    upwards.
    """
    counts = level_counts(num_coefs, levels)
    scaled = fcmask * (len(counts) - 1)
    # Adding 0.5 and rounding down would round the sum, too: just below 0.5 it comes out as 1.
    below = jnp.floor(scaled)
    rounded = jnp.clip(below + (scaled - below >= 0.5), 0, len(counts) - 1).astype(jnp.int32)
    # Of all levels the place is the count: no table to look it up in.
    return rounded if len(counts) == num_coefs + 1 else jnp.asarray(counts, jnp.int32)[rounded]


def hard_coef_mask(fcmask: jax.Array, num_coefs: int) -> jax.Array:
    """The rounded coefficient mask: [C] -> [N, C], exactly 0 or 1, in the dtype of `fcmask`; no gradient."""
    keeps = jnp.arange(num_coefs)[:, None] < kept_counts(fcmask, num_coefs)[None]
    return jax.lax.stop_gradient(keeps.astype(fcmask.dtype))


def counts_to_fcmask(counts: np.ndarray, num_coefs: int) -> np.ndarray:
    """The FCMask that rounds to `counts` exactly: int [C] -> float32 [C], counts / N."""
    return (np.asarray(counts, np.float64) / num_coefs).astype(np.float32)


def fcmask_penalty(fcmasks: Iterable[jax.Array]) -> jax.Array:
    """The paper's penalty, to be multiplied by lambda: the sum over FCMask arrays of mean |m| (section 3.3)."""
    return sum((jnp.mean(jnp.abs(fcmask)) for fcmask in fcmasks), start=jnp.zeros(()))
