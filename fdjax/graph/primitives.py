"""JAX's primitives by name: their evaluation, and the JSON form of their parameters."""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as jax_primitives

# Parameters about the placement of arrays, which a graph leaves open.
_PLACEMENTS = ("sharding", "out_sharding")
_RECORDS = {"ConvDimensionNumbers": lax.ConvDimensionNumbers, "GatherDimensionNumbers": lax.GatherDimensionNumbers}
_ENUMS = {"Precision": lax.Precision, "GatherScatterMode": lax.GatherScatterMode}


@functools.cache
def _by_name() -> dict[str, Any]:
    found = [getattr(jax_primitives, name) for name in dir(jax_primitives) if name.endswith("_p")]
    found += [getattr(lax, name) for name in dir(lax) if name.endswith("_p")]
    return {primitive.name: primitive for primitive in found}


def register(primitive: Any) -> None:
    """Makes a primitive that a trace has met available by its name."""
    _by_name().setdefault(primitive.name, primitive)


def bind(kind: str, params: Mapping[str, Any], inputs: Sequence[Any]) -> list[Any]:
    """Evaluates a primitive.

    Args:
      kind: name of the primitive.
      params: its parameters.
      inputs: arrays or tracers.

    Returns:
      The outputs.

    Raises:
      ValueError: this version of JAX has no such primitive.
    """
    primitive = _by_name().get(kind)
    if primitive is None:
        raise ValueError(f"the graph has an operation {kind!r}, which JAX {jax.__version__} does not have")
    made = primitive.bind(*map(jnp.asarray, inputs), **primitive.get_bind_params(dict(params)))
    return list(made) if primitive.multiple_results else [made]


def params_to_json(kind: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a primitive's parameters to JSON types, which `params_from_json` reads.

    Args:
      kind: name of the primitive.
      params: its parameters.

    Returns:
      Name -> value in JSON types; None for the placement of arrays.

    Raises:
      ValueError: a parameter has no JSON form, such as a function.
    """
    return {name: None if name in _PLACEMENTS else _to_json(kind, value) for name, value in params.items()}


def _to_json(kind: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, enum.Enum):
        if type(value).__name__ not in _ENUMS:
            raise ValueError(f"the operation {kind} has a parameter without a JSON form: {value!r}")
        return {"enum": [type(value).__name__, value.name]}
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value)
    if type(value).__name__ in _RECORDS:
        fields = value._asdict() if hasattr(value, "_asdict") else vars(value)
        return {"record": [type(value).__name__, {name: _to_json(kind, field) for name, field in fields.items()}]}
    if isinstance(value, (tuple, list)):
        return [_to_json(kind, item) for item in value]
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return {"dtype": jnp.dtype(value).name}
    raise ValueError(f"the operation {kind} has a parameter without a JSON form: {type(value).__name__}")


def params_from_json(params: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the parameters that `params_to_json` wrote.

    Args:
      params: name -> value in JSON types.

    Returns:
      The parameters; the placement of arrays is left open.

    Raises:
      ValueError: a parameter is of an unknown kind.
    """
    return {name: _from_json(value) for name, value in params.items()}


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_from_json, value))
    if not isinstance(value, Mapping):
        return value
    ((tag, content),) = value.items()
    if tag == "dtype":
        return jnp.dtype(content)
    if tag == "enum":
        return _ENUMS[content[0]][content[1]]
    if tag == "record":
        return _RECORDS[content[0]](**{name: _from_json(field) for name, field in content[1].items()})
    raise ValueError(f"the kind of parameter {tag!r} is unknown")
