"""From a function of variables and images to its operations: one trace, with all calls inlined."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from fdjax.graph.operations import Operation, Operations
from fdjax.graph.primitives import register
from fdjax.graph.views import without_views

# The parameters in which these primitives keep the jaxpr that they call.
_CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# Calls whose insides are computed again in the gradient.
CHECKPOINTS = ("checkpoint", "remat", "remat2")
_CALLS = {
    "jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr",
    "custom_lin", *CHECKPOINTS,
}  # fmt: skip


def trace(apply: Callable[..., Any], variables: Any, *images: Any) -> Operations:
    """Traces `apply(variables, *images)` at inference.

    Args:
      apply: any function made of JAX operations.
      variables: a pytree of arrays or `jax.ShapeDtypeStruct`.
      *images: arrays or `jax.ShapeDtypeStruct`, batch first.

    Returns:
      The operations. Where the code has forms for several platforms, the default form is taken.

    Raises:
      ValueError: the function does not accept the images.
    """
    # One image, so that a frozen network, whose operations are those traced here, takes any number.
    shapes = [np.shape(image) for image in images]
    images = tuple(
        jax.ShapeDtypeStruct((1, *shape[1:]) if shape else (), jnp.result_type(image))
        for shape, image in zip(shapes, images, strict=True)
    )
    try:
        closed = jax.make_jaxpr(apply)(variables, *images)
    except Exception as error:
        # Libraries raise exceptions of their own where shapes do not fit.
        shapes = ", ".join(str(list(np.shape(image))) for image in images)
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"the function cannot be traced with images of shape {shapes}: {said}") from error
    return _Recorder().record(closed, variable_paths(variables))


def variable_paths(variables: Any) -> list[str]:
    """Returns the paths of the leaves of a pytree, such as "params/block/kernel".

    Args:
      variables: a pytree.

    Returns:
      One path per leaf, in the order of `jax.tree.leaves`.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]


def called_jaxpr(name: str, params: Mapping[str, Any]) -> Any:
    """Finds what a call primitive calls.

    Args:
      name: name of a primitive.
      params: its parameters.

    Returns:
      A closed jaxpr that takes the primitive's inputs; None if the primitive is not a mere call.
    """
    if name not in _CALLS:
        return None
    body = next(params[key] for key in _CALLED if key in params)
    return body if hasattr(body, "consts") else core.ClosedJaxpr(body, ())


class _Recorder:
    """Numbers the values of a jaxpr and lists its equations as operations."""

    def __init__(self) -> None:
        self._shapes: list[tuple[int, ...]] = []
        self._dtypes: list[str] = []
        self._constants: dict[int, np.ndarray] = {}
        self._known_constants: dict[Any, int] = {}
        self._operations: list[Operation] = []
        # Values that hold the index of the platform that the code runs on.
        self._platforms: set[int] = set()

    def record(self, closed: Any, names: list[str]) -> Operations:
        environment = {}
        inputs = [self._new(variable.aval) for variable in closed.jaxpr.invars]
        environment.update(zip(closed.jaxpr.invars, inputs, strict=True))
        environment.update(self._constant_values(closed.jaxpr.constvars, closed.consts))
        self._equations(closed.jaxpr, environment)
        outputs = tuple(self._read(atom, environment) for atom in closed.jaxpr.outvars)
        traced = Operations(
            tuple(self._shapes),
            tuple(self._dtypes),
            tuple(self._operations),
            self._constants,
            dict(zip(inputs, names, strict=False)),
            tuple(inputs[len(names) :]),
            outputs,
        )
        return without_views(traced)

    def _new(self, aval: Any) -> int:
        self._shapes.append(tuple(int(side) for side in aval.shape))
        self._dtypes.append(str(aval.dtype))
        return len(self._shapes) - 1

    def _constant(self, value: Any, aval: Any) -> int:
        array = np.asarray(value, aval.dtype)
        key = (str(array.dtype), array.shape, array.tobytes()) if array.size <= 64 else id(value)
        if key not in self._known_constants:
            number = self._known_constants[key] = self._new(aval)
            self._constants[number] = array
        return self._known_constants[key]

    def _constant_values(self, variables: Any, constants: Any) -> dict[Any, int]:
        pairs = zip(variables, constants, strict=True)
        return {variable: self._constant(constant, variable.aval) for variable, constant in pairs}

    def _read(self, atom: Any, environment: dict[Any, int]) -> int:
        return self._constant(atom.val, atom.aval) if isinstance(atom, core.Literal) else environment[atom]

    def _equations(self, jaxpr: Any, environment: dict[Any, int], caller: str = "") -> None:
        for equation in jaxpr.eqns:
            # Equations of a cached function have no source line; they get the line of the call.
            source = caller if caller.startswith(_NODE) else source_line(equation) or caller
            inputs = [self._read(atom, environment) for atom in equation.invars]
            called = self._called(equation, inputs)
            if called is not None:
                body, arguments = called
                inner: dict[Any, int] = dict(zip(body.jaxpr.invars, arguments, strict=True))
                inner.update(self._constant_values(body.jaxpr.constvars, body.consts))
                self._equations(body.jaxpr, inner, source)
                made = [self._read(atom, inner) for atom in body.jaxpr.outvars]
            else:
                register(equation.primitive)
                made = [self._new(variable.aval) for variable in equation.outvars]
                if equation.primitive.name == "platform_index":
                    self._platforms.update(made)
                    continue_with = dict(zip(equation.outvars, made, strict=True))
                    environment.update(continue_with)
                    continue
                self._operations.append(
                    Operation(equation.primitive.name, tuple(inputs), tuple(made), dict(equation.params), source)
                )
            environment.update(zip(equation.outvars, made, strict=True))

    def _called(self, equation: Any, inputs: list[int]) -> tuple[Any, list[int]] | None:
        """Returns the closed jaxpr that an equation calls, with its arguments, or None if it is an operation itself."""
        name, params = equation.primitive.name, equation.params
        if name == "cond" and inputs[0] in self._platforms:
            platforms = params["branches_platforms"]
            default = next(index for index, names in enumerate(platforms) if names is None)
            return params["branches"][default], inputs[1:]
        body = called_jaxpr(name, params)
        return None if body is None else (body, inputs)


# Operations of a network that was read from a file are made in scopes of this name, followed by <the node's name>.
NODE_SCOPE = "node"
_NODE = "node "


def source_line(equation: Any) -> str:
    """Returns the file and line outside of JAX, Flax and Keras that an equation comes from, or ""; or the node, if the
    network was read from a file."""
    node = re.search(f"{NODE_SCOPE}<(.*?)>", str(equation.source_info.name_stack))
    if node is not None:
        return _NODE + node[1]
    traceback = getattr(equation.source_info, "traceback", None)
    frames = traceback.frames if traceback is not None else ()
    for frame in frames:
        name = frame.file_name.replace("\\", "/")
        if not any(part in name for part in ("/jax/", "/flax/", "/keras/", "fdjax/ops/", "<string>")):
            return f"{name.rpartition('/')[2]}:{frame.line_num}"
    return ""
