"""A traced network as data: values and the operations between them, with a JSON form.

An operation is an equation of a jaxpr: a JAX primitive with its parameters. Calls are inlined, so that the operations
form one flat list in order of evaluation. Values are numbered; each is an image, a variable, a constant, or an output
of an operation.
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
# A larger constant has to be passed as a variable; a table of positions of a large transformer has 600,000 numbers.
_LARGEST_CONSTANT = 1_000_000


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
      kind: name of the JAX primitive, such as "conv_general_dilated".
      inputs: numbers of the values that it reads.
      outputs: numbers of the values that it writes.
      params: parameters of the primitive.
      source: file and line of the code that it comes from, or "".
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
      shapes: shape of every value, by number; images have the batch size that they were traced with.
      dtypes: dtype of every value, by number.
      operations: the operations, in order of evaluation.
      constants: value -> array.
      variables: value -> path, in the order of the leaves of the variables.
      images: the values that are the images.
      outputs: the values that the function returns, flattened.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    operations: tuple[Operation, ...]
    constants: Mapping[int, np.ndarray]
    variables: Mapping[int, str]
    images: tuple[int, ...]
    outputs: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the operations in plain JSON types, which `from_dict` reads.

        Raises:
          ValueError: an operation or a constant has no JSON form; the message names it.
        """
        for value, array in self.constants.items():
            if array.size > _LARGEST_CONSTANT:
                raise ValueError(
                    f"the function holds a constant of {array.size:,} numbers (value {value}); pass such arrays as "
                    "part of its variables"
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
        """Reads operations that `to_dict` wrote.

        Args:
          fields: the result of `to_dict`, possibly after a round trip through JSON.

        Returns:
          The operations.

        Raises:
          ValueError: the fields do not describe a graph, or are of a newer format.
        """
        if not isinstance(fields, Mapping) or fields.get("format") != FORMAT:
            raise ValueError("the fields do not describe a graph of fdjax")
        if fields.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"the graph has format {fields.get('format_version')!r}, and this version of fdjax reads "
                f"{FORMAT_VERSION}"
            )
        try:
            shapes = tuple(tuple(int(side) for side in shape) for shape in fields["shapes"])
            # Types that NumPy does not know: bfloat16, and random keys, such as key<fry>.
            known = ("bfloat16", "key<")
            dtypes = tuple(name if str(name).startswith(known) else str(np.dtype(name)) for name in fields["dtypes"])
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
            raise ValueError(f"the graph is damaged: {error}") from error
        return found

    def _check(self) -> None:
        """Checks that every value is made before it is used."""
        if len(self.shapes) != len(self.dtypes):
            raise ValueError("the numbers of shapes and dtypes differ")
        known = {*self.constants, *self.variables, *self.images}
        for operation in self.operations:
            missing = [value for value in operation.inputs if value not in known]
            if missing:
                raise ValueError(f"{operation.kind} reads value {missing[0]}, which no earlier operation makes")
            known.update(operation.outputs)
        if any(value not in known for value in self.outputs) or max(known, default=-1) >= len(self.shapes):
            raise ValueError("an output is a value that no operation makes, or a value has no shape")

    def evaluate(self, variables: Any, *images: Any) -> list[Any]:
        """Evaluates the function.

        Args:
          variables: a pytree with the traced structure.
          *images: arrays of the traced shapes.

        Returns:
          The outputs, flattened.
        """
        environment: dict[int, Any] = dict(self.constants)
        environment.update(zip(self.variables, jax.tree.leaves(variables), strict=True))
        environment.update(zip(self.images, images, strict=True))
        evaluate_operations(self.operations, environment)
        return [environment[value] for value in self.outputs]


def evaluate_operations(operations: Sequence[Operation], environment: dict[int, Any]) -> None:
    """Evaluates operations in order.

    Args:
      operations: the operations.
      environment: value -> array. The function reads inputs from it and adds outputs to it.
    """
    for operation in operations:
        made = bind(operation.kind, operation.params, [environment[value] for value in operation.inputs])
        environment.update(zip(operation.outputs, made, strict=True))
