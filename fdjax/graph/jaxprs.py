"""The evaluation of jaxprs, equation by equation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from fdjax.graph.trace import called_jaxpr

# Calls without gradients of their own.
CALLS = ("jit", "pjit", "closed_call", "core_call")


def evaluate_jaxpr(
    jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any], apply: Callable[[Any, Sequence[Any]], Sequence[Any]]
) -> list[Any]:
    """Evaluates a jaxpr with a function of one's own for its equations.

    Args:
      jaxpr: the jaxpr.
      constants: the values of its constants.
      arguments: the values of its arguments.
      apply: (equation, values of its inputs) -> values of its outputs.

    Returns:
      The results.
    """
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        made = apply(equation, [read(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, made, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def bind_equation(equation: Any, inputs: Sequence[Any], **changed: Any) -> Sequence[Any]:
    """Evaluates an equation.

    Args:
      equation: the equation.
      inputs: the values of its inputs.
      **changed: parameters that take the place of the equation's.

    Returns:
      The values of its outputs.
    """
    primitive = equation.primitive
    made = primitive.bind(*inputs, **primitive.get_bind_params({**equation.params, **changed}))
    return made if primitive.multiple_results else [made]


def without_calls(closed: Any) -> Any:
    """Puts the equations of the functions that a jaxpr calls in the place of the calls.

    Calls with gradients of their own, and checkpoints, stay.

    Args:
      closed: a closed jaxpr.

    Returns:
      A closed jaxpr of the same arguments and results.
    """

    def apply(equation: Any, inputs: Sequence[Any]) -> Sequence[Any]:
        name = equation.primitive.name
        if name not in CALLS:
            return bind_equation(equation, inputs)
        body = called_jaxpr(name, equation.params)
        return evaluate_jaxpr(body.jaxpr, body.consts, inputs, apply)

    return jax.make_jaxpr(lambda *given: evaluate_jaxpr(closed.jaxpr, closed.consts, given, apply))(*closed.in_avals)
