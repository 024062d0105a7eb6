"""Functions of JAX with gradients of their own, found in a jaxpr by what they compute.

A call of such a function is bound to the shape that it was traced with; for a part of a value, the function itself has
to be called again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fdjax.graph.trace import called_jaxpr

_CALL = "custom_jvp_call"
# Elementwise ones.
_KNOWN: tuple[Callable[..., Any], ...] = (jax.nn.relu, jax.nn.relu6, jnp.logaddexp)


def elementwise_function(equation: Any) -> Callable[..., Any] | None:
    """Returns the elementwise function that an equation calls, if it is a known one with a gradient of its own.

    Args:
      equation: an equation of a jaxpr.

    Returns:
      The function of the equation's inputs; None if the equation calls none of those that are known.
    """
    if equation.primitive.name != _CALL:
        return None
    call = _looks(equation)
    shapes = tuple((atom.aval.shape, atom.aval.dtype, atom.aval.weak_type) for atom in equation.invars)
    return next((function for function in _KNOWN if call in _calls(function, shapes)), None)


def _looks(equation: Any) -> tuple[str, str]:
    """Returns what a call computes, and where that is defined: a user's function of the same values may have another
    gradient."""
    body = called_jaxpr(_CALL, equation.params)
    return str(body), body.jaxpr.debug_info.func_src_info


@functools.lru_cache(maxsize=1024)
def _calls(function: Callable[..., Any], shapes: tuple[Any, ...]) -> tuple[tuple[str, str], ...]:
    """Returns what a function's calls look like in a jaxpr; () if it does not take such inputs."""
    inputs = [jax.ShapeDtypeStruct(shape, dtype, weak_type=weak) for shape, dtype, weak in shapes]
    try:
        jaxpr = jax.make_jaxpr(function)(*inputs).jaxpr
    except TypeError:
        return ()
    return tuple(_looks(each) for each in jaxpr.eqns if each.primitive.name == _CALL)
