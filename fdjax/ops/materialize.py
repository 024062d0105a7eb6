"""A map that lies in memory, where XLA's CPU would compute it again in a loop that reads it out of order."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def _kept(x: jax.Array) -> jax.Array:
    # XLA fuses across `optimization_barrier`, but not into a loop. This one never turns, which XLA cannot know: what a
    # loop carries is in memory, and nothing is copied. An element at an edge may be padding, which XLA does know. (A
    # size that is no number yet is a batch's, in an export.)
    element = x[tuple(size // 2 if isinstance(size, int) else 0 for size in x.shape)]
    turns = (element != element).astype(jnp.int32)
    return lax.while_loop(lambda carry: carry[0] > 1, lambda carry: (carry[0] - 1, carry[1] * 2), (turns, x))[1]


def _best_form(x: jax.Array) -> jax.Array:
    return x if x.size == 0 else lax.platform_dependent(x, cpu=_kept, default=lambda x: x)


_materialize: Any = jax.custom_vjp(_best_form)
_materialize.defvjp(lambda x: (_best_form(x), None), lambda _, g: (_best_form(g),))


def materialize(x: jax.Array) -> jax.Array:
    """Returns `x`, and in reverse mode its gradient, as they are; on the CPU they lie in memory first."""
    return _materialize(x)
