"""Executes the other operations of a frozen network in XLA, as JAX's own primitives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fdjax.frozen.program import Apply
from fdjax.graph.primitives import bind, params_from_json

# Primitives whose operands must have one shape altogether.
_OF_ONE_SHAPE = ("select_n", "clamp")
# The parameter that holds the shape of the result, or a part of the operand's shape.
_SHAPES = {"reshape": "new_sizes", "broadcast_in_dim": "shape", "slice": "limit_indices"}


def _with_batch(kind: str, params: dict[str, Any], batch: Any) -> dict[str, Any]:
    """Changes parameters for one image to those for a batch."""
    if kind in _SHAPES and params[_SHAPES[kind]][:1] == (1,):
        params[_SHAPES[kind]] = (batch, *params[_SHAPES[kind]][1:])
    if kind in ("dynamic_slice", "gather"):
        whole = kind == "dynamic_slice" or 0 not in (
            *params["dimension_numbers"].collapsed_slice_dims,
            *params["dimension_numbers"].operand_batching_dims,
        )
        if whole and params["slice_sizes"][:1] == (1,):
            params["slice_sizes"] = (batch, *params["slice_sizes"][1:])
    return params


def apply_primitive(
    operation: Apply, environment: Mapping[int, Any], arrays: Mapping[str, jax.Array], batch: Any, dtype: Any
) -> list[Any]:
    """Evaluates an operation.

    Args:
      operation: the operation; static.
      environment: value -> array [B, ...], for the values that it reads.
      arrays: the network's arrays, by name.
      batch: the batch size B.
      dtype: floating-point type of weights and activations.

    Returns:
      Its results, [B, ...].
    """
    params = _with_batch(operation.kind, params_from_json(json.loads(operation.params)), batch)
    if operation.kind == "convert_element_type" and jnp.issubdtype(params["new_dtype"], jnp.floating):
        # The network computes in the type of its arrays.
        params["new_dtype"] = jnp.dtype(dtype)
    preferred = params.get("preferred_element_type")
    if preferred is not None and jnp.issubdtype(preferred, jnp.floating):
        params["preferred_element_type"] = jnp.dtype(dtype)
    inputs = []
    rank = max((environment[value].ndim for value in operation.inputs if value >= 0), default=0)
    batched = params["dimension_numbers"][1] if operation.kind == "dot_general" else ()
    for side, value in enumerate(operation.inputs):
        x = environment[value] if value >= 0 else arrays[f"{operation.name}/arg{-1 - value}"]
        constant = value < 0 and x.ndim == rank and x.shape[:1] == (1,)
        # A product shares the batch with a constant only if it goes along it, and not if that is a matrix of one row.
        shared = operation.kind == "concatenate" or (operation.kind == "dot_general" and 0 in batched[side])
        if constant and shared:
            x = jnp.broadcast_to(x, (batch, *x.shape[1:]))
        inputs.append(x)
    if operation.kind in _OF_ONE_SHAPE:
        shape = jnp.broadcast_shapes(*(x.shape for x in inputs))
        inputs = [jnp.broadcast_to(x, shape) for x in inputs]
    return bind(operation.kind, params, inputs)
