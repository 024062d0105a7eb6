"""Masks for any function of a model: a function transformation, like `jax.grad`."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

from fdjax.graph.jaxprs import bind_equation, without_calls
from fdjax.graph.masks import Counts, MaskedGraph
from fdjax.graph.network import layer_name
from fdjax.graph.trace import CHECKPOINTS, called_jaxpr, source_line, variable_paths
from fdjax.ops.fcmask import coef_mask
from fdjax.pruning.masked_layer import CoefMask, MaskedLayer
from fdjax.pruning.narrowed import evaluate_narrowed

Masks = Mapping[str, jax.Array]


def masked(
    function: Callable[..., Any], graph: MaskedGraph, *, narrow: bool = False, statistics: str = "batch_stats"
) -> Callable[..., Any]:
    """Transforms a function of a model so that the model's layers are masked.

    Layers are found by the paths of their kernels, so the function does not have to be the traced one. It may train
    (with batch statistics, dropout keys, labels) and may return anything.

    Args:
      function: `function(variables, *args)`, made of JAX operations. `variables` holds the kernels at the paths that
        the graph was traced with; a leading collection "params" may be missing.
      graph: the model with its masks.
      narrow: whether channels that kept counts remove are left out of the computation, which then takes less time. The
        kept counts have to be constants. Gradients and results are the same but for rounding; the statistics of batch
        norm keep their old values where channels are left out. A function that holds a masked layer in
        `jax.checkpoint` is computed with all channels.
      statistics: with `narrow`, the key under which the variables, and the results, hold what the function updates of
        the statistics of batch norms. Under other keys a result has all of its channels, which are then computed.

    Returns:
      `masked_function(masks, variables, *args)`, where `masks` has an array [channels] for each path of `graph.masks`.
      FCMasks in [0, 1] are soft masks; integers are kept counts, which are hard masks. The function works under `jit`,
      `grad`, `vmap` and `jax.checkpoint`. It raises `ValueError` if the masks do not fit the graph, if a masked layer
      is not found, or if one lies inside a loop.
    """

    @functools.wraps(function)
    def masked_function(masks: Masks, variables: Any, *args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(variables, *args)
        coefs = _coefficient_masks(graph, masks)
        walk = _Walk(graph, coefs)
        paths = variable_paths(variables)
        names = [*paths, *[None] * (len(closed.jaxpr.invars) - len(paths))]
        flat = jax.tree.leaves((variables, args))
        counts = _constant_counts(masks) if narrow else None
        outputs = None
        if counts is not None:
            outputs = _narrowed(graph, coefs, counts, closed, flat, names, _updated(shapes, paths, statistics))
        if outputs is None:
            outputs = walk.evaluate(closed.jaxpr, closed.consts, flat, names)
            walk.check_found()
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return masked_function


def _coefficient_masks(graph: MaskedGraph, masks: Masks) -> dict[str, CoefMask]:
    """Returns path -> coefficient mask."""
    if set(masks) != set(graph.masks):
        missing, foreign = sorted(set(graph.masks) - set(masks)), sorted(set(masks) - set(graph.masks))
        raise ValueError(f"the masks do not fit the graph: missing {missing[:3]}, unknown {foreign[:3]}")
    found: dict[str, CoefMask] = {}
    for path, mask in graph.masks.items():
        given = jnp.asarray(masks[path])
        if given.shape != (mask.channels,):
            raise ValueError(f"mask {path} must have shape ({mask.channels},), got {given.shape}")
        if jnp.issubdtype(given.dtype, jnp.integer):
            coefs = (jnp.arange(mask.num_coefs)[:, None] < given).astype(jnp.float32)
            possible = {*range(mask.num_coefs + 1)} if isinstance(given, Tracer) else {*np.unique(given).tolist()}
        else:
            levels = graph.levels_of(path)
            coefs, possible = coef_mask(given, mask.num_coefs, levels), {*levels}
        found[path] = CoefMask(coefs, possible <= {0, 1, mask.num_coefs}, possible <= {0, mask.num_coefs})
    return found


def _constant_counts(masks: Masks) -> Counts | None:
    """Returns the kept counts if all masks are kept counts, and constants; or else None."""
    if any(
        isinstance(mask, Tracer) or not jnp.issubdtype(jnp.result_type(mask), jnp.integer) for mask in masks.values()
    ):
        return None
    return {path: np.asarray(mask) for path, mask in masks.items()}


def _updated(shapes: Any, paths: Sequence[str], collection: str) -> dict[int, int]:
    """Returns which results are new statistics: position among the results -> position among the variables."""
    known = {path: position for position, path in enumerate(paths) if path.split("/")[0] == collection}
    found = {}
    for position, path in enumerate(variable_paths(shapes)):
        _, key, rest = f"/{path}".partition(f"/{collection}/")
        if key and f"{collection}/{rest}" in known:
            found[position] = known[f"{collection}/{rest}"]
    return found


def _narrowed(
    graph: MaskedGraph,
    masks: Mapping[str, CoefMask],
    counts: Counts,
    closed: Any,
    arguments: Sequence[Any],
    names: Sequence[str | None],
    statistics: Mapping[int, int],
) -> list[Any] | None:
    """Evaluates a function without the channels that are removed; returns None if they cannot be left out."""
    if closed.effects:
        return None
    flat, walk = without_calls(closed), _Walk(graph, masks)
    layers = walk.layers(flat.jaxpr, names)
    if layers is None:
        return None
    walk.check_found()
    reads = {index: graph.side_counts(counts, name, "input") > 0 for index, name in layers.items()}
    return evaluate_narrowed(flat, arguments, names, graph, masks, layers, reads, statistics)


class _Walk:
    """Evaluates a jaxpr with masks on the layers that it meets.

    The walk follows values that depend on variables alone. A kernel is therefore known by the path of its variable also
    after a cast, a reshape or a transpose.
    """

    def __init__(self, graph: MaskedGraph, masks: Mapping[str, CoefMask]):
        self._graph, self._masks = graph, masks
        self._masked = {layer for mask in graph.masks.values() for layer, _ in mask.sides}
        self._bases = {name.partition("#")[0] for name in self._masked}
        self._traced = Counter(name.partition("#")[0] for name in graph.layers)
        self._seen: Counter[str] = Counter()

    def check_found(self) -> None:
        """Raises `ValueError` unless every masked layer was met."""
        missing = [name for name in self._graph.layers if name in self._masked and not self._seen_as(name)]
        if missing:
            raise ValueError(
                f"the function has no masked layer {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}: the "
                "kernel must be in the variables at the path that the graph was traced with, and lead to a "
                "convolution or a product with images that are arguments, too"
            )

    def _seen_as(self, name: str) -> bool:
        base, _, number = name.partition("#")
        return self._seen[base] >= int(number or 1)

    def evaluate(
        self, jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any], names: Sequence[str | None]
    ) -> list[Any]:
        """Evaluates a jaxpr; `names` holds the paths of the arguments that depend on variables alone."""
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
        values.update(zip(jaxpr.invars, arguments, strict=True))
        paths: dict[Any, str | None] = dict(zip(jaxpr.invars, names, strict=True))
        # Constants count as variables.
        paths.update(dict.fromkeys(jaxpr.constvars, ""))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else values[atom]

        def path(atom: Any) -> str | None:
            return "" if isinstance(atom, core.Literal) else paths[atom]

        for equation in jaxpr.eqns:
            inputs, given = [read(atom) for atom in equation.invars], [path(atom) for atom in equation.invars]
            made = self._equation(equation, inputs, given)
            name = _path_of(equation, given)
            values.update(zip(equation.outvars, made, strict=True))
            paths.update(dict.fromkeys(equation.outvars, name))
        return [read(atom) for atom in jaxpr.outvars]

    def layers(self, jaxpr: Any, names: Sequence[str | None]) -> dict[int, str] | None:
        """Finds the masked layers of a jaxpr.

        Args:
          jaxpr: the jaxpr.
          names: paths of the arguments that depend on variables alone.

        Returns:
          Index of an equation -> name of the layer; None if a layer lies in something that an equation calls.
        """
        found: dict[int, str] = {}
        paths: dict[Any, str | None] = dict(zip(jaxpr.invars, names, strict=True))
        paths.update(dict.fromkeys(jaxpr.constvars, ""))
        for index, equation in enumerate(jaxpr.eqns):
            given = ["" if isinstance(atom, core.Literal) else paths[atom] for atom in equation.invars]
            layer = self._layer_of(equation, given)
            name = None if layer is None else self._next_name(layer_name(layer))
            if name in self._masked:
                found[index] = name
            elif self._holds_masked(equation, given):
                return None
            paths.update(dict.fromkeys(equation.outvars, _path_of(equation, given)))
        return found

    def _equation(self, equation: Any, inputs: list[Any], paths: list[str | None]) -> Sequence[Any]:
        layer = self._layer_of(equation, paths)
        if layer is not None:
            name = self._next_name(layer_name(layer))
            if name in self._masked:
                side = 1 if paths[0] is None else 0
                return [MaskedLayer(self._graph, name, self._masks, equation, side).apply(inputs)]
        if not self._holds_masked(equation, paths):
            return bind_equation(equation, inputs)
        body, skipped = _body(equation)
        if body is None:
            raise ValueError(
                f"a masked layer lies inside {equation.primitive.name}{_where(equation)}; mask the function inside "
                "the loop, not the one around it"
            )
        arguments, names = inputs[skipped:], paths[skipped:]
        if equation.primitive.name in CHECKPOINTS:
            again = jax.checkpoint(
                lambda *given: self.evaluate(body.jaxpr, body.consts, given, names),
                policy=equation.params["policy"],
                prevent_cse=equation.params["prevent_cse"],
            )
            return again(*arguments)
        return self.evaluate(body.jaxpr, body.consts, arguments, names)

    def _next_name(self, base: str) -> str:
        """Names the layer of a kernel that the walk meets; layers recur if the function applies the model again."""
        number = self._seen[base] % max(self._traced[base], 1) + 1
        self._seen[base] += 1
        return base if number == 1 else f"{base}#{number}"

    def _layer_of(self, equation: Any, paths: Sequence[str | None]) -> str | None:
        """Returns the path of the kernel that an equation combines with another value, or None."""
        if equation.primitive.name not in _MIXING or [path is None for path in paths].count(True) != 1:
            return None
        return next(path for path in paths if path is not None) or None

    def _holds_masked(self, equation: Any, paths: Sequence[str | None]) -> bool:
        """Returns whether an equation calls something that holds a masked layer."""
        return any(self._body_holds_masked(body, paths[skipped:]) for body, skipped in _bodies(equation))

    def _body_holds_masked(self, body: Any, names: Sequence[str | None]) -> bool:
        paths: dict[Any, str | None] = dict(zip(body.jaxpr.invars, names, strict=True))
        paths.update(dict.fromkeys(body.jaxpr.constvars, ""))
        for equation in body.jaxpr.eqns:
            given = ["" if isinstance(atom, core.Literal) else paths[atom] for atom in equation.invars]
            layer = self._layer_of(equation, given)
            if layer is not None and layer_name(layer) in self._bases:
                return True
            if self._holds_masked(equation, given):
                return True
            paths.update(dict.fromkeys(equation.outvars, _path_of(equation, given)))
        return False


_MIXING = ("conv_general_dilated", "dot_general")


def _path_of(equation: Any, paths: Sequence[str | None]) -> str | None:
    """Returns the path of the largest of an equation's inputs if all depend on variables alone, or else None."""
    if not paths or None in paths:
        return None
    sizes = [atom.aval.size if path else -1 for atom, path in zip(equation.invars, paths, strict=True)]
    return paths[sizes.index(max(sizes))]


def _where(equation: Any) -> str:
    source = source_line(equation)
    return f" ({source})" if source else ""


def _body(equation: Any) -> tuple[Any, int]:
    """Returns (closed jaxpr, number of leading inputs that it skips) of an equation that calls once, or None."""
    params, name = equation.params, equation.primitive.name
    if name == "cond" and params.get("branches_platforms") is not None:
        # From lax.platform_dependent: take the branch of the current platform.
        platforms, at_hand = params["branches_platforms"], jax.default_backend()
        named = [index for index, names in enumerate(platforms) if names is not None and at_hand in names]
        default = [index for index, names in enumerate(platforms) if names is None]
        return params["branches"][(named + default)[0]], 1
    body = called_jaxpr(name, params)
    return body, 0


def _bodies(equation: Any) -> list[tuple[Any, int]]:
    """Lists all jaxprs that an equation may call, each with the number of leading inputs that it skips."""
    body, skipped = _body(equation)
    if body is not None:
        return [(body, skipped)]
    params, name = equation.params, equation.primitive.name
    if name == "cond":
        return [(branch, 1) for branch in params["branches"]]
    if name == "while":
        return [(params["body_jaxpr"], params["cond_nconsts"])]
    if name == "scan":
        return [(params["jaxpr"], 0)]
    return []
