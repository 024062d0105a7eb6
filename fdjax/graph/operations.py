"""A traced network as data: values, and the operations between them. JSON in both directions.

An operation is an equation of a jaxpr: a JAX primitive with its parameters. Calls are inlined, so that there is one
flat list in order of evaluation. Values are numbered; each is an image, a variable, a constant, or what an operation
makes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdjax.graph.primitives import bind, params_from_json, params_to_json

FORMAT, FORMAT_VERSION = "fdjax graph", 1
# A constant with more elements than this belongs to the variables.
_LARGEST_CONSTANT = 65_536


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
      kind: the JAX primitive's name, such as "conv_general_dilated".
      inputs: the values it takes.
      outputs: the values it makes.
      params: the primitive's parameters.
      source: file and line of the code that asked for it, or "".
    """

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: Mapping[str, Any]
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Operations:
    """A traced function of variables and images.

    Attributes:
      shapes: of every value, by number; images have the batch size they were traced with.
      dtypes: of every value, by number.
      operations: in order of evaluation.
      constants: value -> array.
      variables: value -> path, in the order of the leaves of the variables.
      images: the values that the function was traced with as images.
      outputs: the values that the function returns, flat.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    operations: tuple[Operation, ...]
    constants: Mapping[int, np.ndarray]
    variables: Mapping[int, str]
    images: tuple[int, ...]
    outputs: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads it back.

        Raises:
          ValueError: an operation or a constant that has no JSON form; the message names it.
        """
        for value, array in self.constants.items():
            if array.size > _LARGEST_CONSTANT:
                raise ValueError(
                    f"the function holds a constant of {array.size:,} numbers (value {value}); give such arrays to it "
                    "with its variables"
                )
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "shapes": [list(shape) for shape in self.shapes],
            "dtypes": list(self.dtypes),
            "operations": [
                [o.kind, list(o.inputs), list(o.outputs), params_to_json(o.kind, o.params), o.source]
                for o in self.operations
            ],
            "constants": [[value, array.ravel().tolist()] for value, array in self.constants.items()],
            "variables": [[value, path] for value, path in self.variables.items()],
            "images": list(self.images),
            "outputs": list(self.outputs),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Operations:
        """The operations that `to_dict` wrote, also after a trip through JSON.

        Raises:
          ValueError: fields that are no graph's, or are of a newer format.
        """
        if not isinstance(fields, Mapping) or fields.get("format") != FORMAT:
            raise ValueError("no graph of fdjax")
        if fields.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"a graph of format {fields.get('format_version')!r}, where this version of fdjax reads "
                f"{FORMAT_VERSION}"
            )
        try:
            shapes = tuple(tuple(int(side) for side in shape) for shape in fields["shapes"])
            dtypes = tuple(str(np.dtype(name)) if name != "bfloat16" else name for name in fields["dtypes"])
            operations = tuple(
                Operation(str(kind), tuple(inputs), tuple(outputs), params_from_json(params), str(source))
                for kind, inputs, outputs, params, source in fields["operations"]
            )
            constants = {
                value: np.asarray(numbers, jnp.dtype(dtypes[value])).reshape(shapes[value])
                for value, numbers in fields["constants"]
            }
            found = cls(
                shapes,
                dtypes,
                operations,
                constants,
                {int(value): str(path) for value, path in fields["variables"]},
                tuple(fields["images"]),
                tuple(fields["outputs"]),
            )
            found._check()
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
            raise ValueError(f"a damaged graph: {error}") from error
        return found

    def _check(self) -> None:
        """Every value is made once, before it is used."""
        if len(self.shapes) != len(self.dtypes):
            raise ValueError("as many shapes as types are needed")
        known = {*self.constants, *self.variables, *self.images}
        for operation in self.operations:
            missing = [value for value in operation.inputs if value not in known]
            if missing:
                raise ValueError(f"{operation.kind} reads value {missing[0]}, which nothing has made")
            known.update(operation.outputs)
        if any(value not in known for value in self.outputs) or max(known, default=-1) >= len(self.shapes):
            raise ValueError("values that nothing makes")

    def evaluate(self, variables: Any, *images: Any) -> list[Any]:
        """The outputs, flat, for variables of the traced structure and images of the traced shapes."""
        environment: dict[int, Any] = dict(self.constants)
        environment.update(zip(self.variables, jax.tree.leaves(variables), strict=True))
        environment.update(zip(self.images, images, strict=True))
        evaluate_operations(self.operations, environment)
        return [environment[value] for value in self.outputs]


def evaluate_operations(operations: Sequence[Operation], environment: dict[int, Any]) -> None:
    """Evaluates operations in order; reads from `environment` (value -> array), and adds what they make to it."""
    for operation in operations:
        made = bind(operation.kind, operation.params, [environment[value] for value in operation.inputs])
        environment.update(zip(operation.outputs, made, strict=True))
