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


def coef_mask(fcmask: jax.Array, num_coefs: int) -> jax.Array:
    """Coefficient mask from FCMask: `clip((m - n/N) * N, 0, 1)` for n = 0..N-1 (section 3.3 and Figure 2).

    Args:
      fcmask: [C], in [0, 1].
      num_coefs: N.

    Returns:
      [N, C] in [0, 1], non-increasing along the coefficients. Its gradient at m = 1 is that of m just below 1.
    """
    order = jnp.arange(num_coefs, dtype=fcmask.dtype)[:, None]
    return _clip_to_unit(fcmask[None] * num_coefs - order)


def kept_counts(fcmask: jax.Array, num_coefs: int) -> jax.Array:
    """How many leading coefficients each channel keeps once masks are rounded: [C] -> int32 [C], 0..N.

    Coefficient n is kept where its mask is at least 0.5, which makes the count m * N rounded, a half upwards.
    """
    scaled = fcmask * num_coefs
    # Adding 0.5 and rounding down would round the sum, too: just below 0.5 it comes out as 1.
    below = jnp.floor(scaled)
    return jnp.clip(below + (scaled - below >= 0.5), 0, num_coefs).astype(jnp.int32)


def hard_coef_mask(fcmask: jax.Array, num_coefs: int) -> jax.Array:
    """The rounded coefficient mask: [C] -> [N, C], exactly 0 or 1, in the dtype of `fcmask`; no gradient."""
    keeps = jnp.arange(num_coefs)[:, None] < kept_counts(fcmask, num_coefs)[None]
    return jax.lax.stop_gradient(keeps.astype(fcmask.dtype))


def counts_to_fcmask(counts: np.ndarray, num_coefs: int) -> np.ndarray:
    """The FCMask that rounds to `counts` exactly: int [C] -> float32 [C], counts / N."""
    return (np.asarray(counts, np.float64) / num_coefs).astype(np.float32)


def round_to_levels(counts: np.ndarray, levels: Sequence[int]) -> np.ndarray:
    """Rounds kept counts to the nearest of `levels`, a tie to the higher one: int [C] -> int [C]."""
    accepted = np.sort(np.asarray(levels))[::-1]
    distance = np.abs(np.asarray(counts)[:, None] - accepted[None])
    return accepted[np.argmin(distance, axis=1)]


def fcmask_penalty(fcmasks: Iterable[jax.Array]) -> jax.Array:
    """The paper's penalty, to be multiplied by lambda: the sum over FCMask arrays of mean |m| (section 3.3)."""
    return sum((jnp.mean(jnp.abs(fcmask)) for fcmask in fcmasks), start=jnp.zeros(()))
