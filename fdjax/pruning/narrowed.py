"""Evaluates a masked function without the channels that its hard masks remove."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from fdjax.graph.jaxprs import bind_equation
from fdjax.graph.known_functions import elementwise_function
from fdjax.graph.masks import MaskedGraph, Side
from fdjax.graph.parts import WHOLE, Join, Needs, Part, can_be_cut
from fdjax.pruning.masked_layer import CoefMask, MaskedLayer


def evaluate_narrowed(
    closed: Any,
    arguments: Sequence[Any],
    names: Sequence[str | None],
    graph: MaskedGraph,
    masks: Mapping[str, CoefMask],
    layers: Mapping[int, str],
    reads: Mapping[int, np.ndarray],
    statistics: Mapping[int, int],
) -> list[Any]:
    """Evaluates a function with hard masks; of every value, only what leads to the results is computed.

    Args:
      closed: the function without masks, a closed jaxpr without calls.
      arguments: the values of its arguments.
      names: the path of each argument that is a variable; None for the others.
      graph: the graph with its masks.
      masks: path -> coefficient mask.
      layers: index of an equation -> name of the masked layer that it is.
      reads: index of an equation -> which channels the layer reads of its input, bool [C].
      statistics: position of a result -> position of the argument that it replaces. Entries that nothing else needs
        keep the argument's values.

    Returns:
      The results.
    """
    needs = Needs(closed.jaxpr, names, reads, frozenset(statistics))
    return _Evaluation(closed, arguments, needs, graph, masks, layers).results(statistics)


class _Evaluation:
    """The values of a jaxpr, as far as they are needed."""

    def __init__(
        self,
        closed: Any,
        arguments: Sequence[Any],
        needs: Needs,
        graph: MaskedGraph,
        masks: Mapping[str, CoefMask],
        layers: Mapping[int, str],
    ):
        self._jaxpr, self._needs, self._graph, self._masks, self._layers = closed.jaxpr, needs, graph, masks, layers
        # Of every value, what is at hand, and which part of it that is. Arguments and constants are whole.
        given = zip((*self._jaxpr.constvars, *self._jaxpr.invars), (*closed.consts, *arguments), strict=True)
        self._values: dict[Any, tuple[Any, Part]] = {atom: (value, WHOLE) for atom, value in given}
        for index, equation in enumerate(self._jaxpr.eqns):
            if any(made in needs.of for made in equation.outvars):
                self._values.update(zip(equation.outvars, self._evaluate(index, equation), strict=True))

    def results(self, statistics: Mapping[int, int]) -> list[Any]:
        """Returns the results; `statistics` is that of `evaluate_narrowed`."""
        found = []
        for position, atom in enumerate(self._jaxpr.outvars):
            if position not in statistics or isinstance(atom, core.Literal):
                found.append(self._read(atom, WHOLE))
                continue
            value, part = self._values[atom]
            before = self._values[self._jaxpr.invars[statistics[position]]][0]
            places = (slice(None),) * max(part.axis, 0) + (part.indices,)
            found.append(value if part.whole else jnp.asarray(before).at[places].set(value))
        return found

    def _read(self, atom: Any, part: Part) -> Any:
        """Returns a part of a value."""
        if isinstance(atom, core.Literal):
            return atom.val
        value, at_hand = self._values[atom]
        if part.whole or (part.axis == at_hand.axis and np.array_equal(part.kept, at_hand.kept)):
            assert at_hand.whole or not part.whole, "a whole value is asked for, and a part of it is at hand"
            return value
        if at_hand.whole:
            return _take(value, part.axis, part.indices)
        assert part.axis == at_hand.axis and not np.any(part.kept & ~at_hand.kept)
        return _take(value, part.axis, np.searchsorted(at_hand.indices, part.indices))

    def _evaluate(self, index: int, equation: Any) -> list[tuple[Any, Part]]:
        """Evaluates an equation; returns what is at hand of its outputs then."""
        name = self._layers.get(index)
        joins = self._needs.joins(index)
        if equation.primitive.name == "split":
            return [self._piece(equation, output) for output in range(len(equation.outvars))]
        part = self._needs.of.get(equation.outvars[0], WHOLE)
        on_axis = [join for join in joins or () if join.out_axis == part.axis]
        cut = not part.whole and joins is not None and can_be_cut(equation, on_axis)
        if not cut or len(equation.outvars) > 1:
            part, on_axis = WHOLE, []
        layer = self._needs.layer(index)
        if layer is not None:
            return [(self._layer(equation, name, layer, part), part)]
        inputs = [self._read(atom, _read_part(on_axis, k, part)) for k, atom in enumerate(equation.invars)]
        changed = _changed(equation, part) if cut else {}
        if name is not None:
            # A grouped convolution; its first input is the image.
            channels: dict[Side, np.ndarray] = {}
            if cut:
                channels = {"input": _read_part(on_axis, 0, part).indices, "output": part.indices}
            equation = equation.replace(params={**equation.params, **changed})
            return [(MaskedLayer(self._graph, name, self._masks, equation, 1, channels).apply(inputs), part)]
        function = elementwise_function(equation)
        if cut and function is not None:
            return [(function(*inputs), part)]
        made = bind_equation(equation, inputs, **changed)
        return [(value, part) for value in made]

    def _layer(self, equation: Any, name: str | None, layer: Any, part: Part) -> Any:
        """Evaluates a layer that is no grouped convolution, with the channels of its input that are at hand."""
        image = equation.invars[1 - layer.kernel]
        x, at_hand = self._values[image]
        assert at_hand.whole or at_hand.axis == layer.read
        made = part if part.whole else Part(layer.kernel_out, part.kept)
        kernel = self._read(equation.invars[layer.kernel], made)
        if not at_hand.whole:
            kernel = _take(kernel, layer.kernel_in, at_hand.indices)
        inputs = [x, kernel] if layer.kernel == 1 else [kernel, x]
        if name is None:
            assert at_hand.whole
            return bind_equation(equation, inputs)[0]
        sides: tuple[tuple[Side, Part], ...] = (("input", at_hand), ("output", part))
        at: dict[Side, np.ndarray] = {side: each.indices for side, each in sides if not each.whole}
        return MaskedLayer(self._graph, name, self._masks, equation, layer.kernel, at).apply(inputs)

    def _piece(self, equation: Any, output: int) -> tuple[Any, Part]:
        """Evaluates an output of a split."""
        (atom,), axis, sizes = equation.invars, equation.params["axis"], equation.params["sizes"]
        part, start = self._needs.of.get(equation.outvars[output]), sum(sizes[:output])
        if part is None:
            return None, WHOLE
        if part.axis not in (axis, WHOLE.axis):
            value = self._read(atom, part)
            return lax.slice_in_dim(value, start, start + sizes[output], axis=axis), part
        kept = np.zeros(atom.aval.shape[axis], bool)
        kept[start : start + sizes[output]] = True if part.whole else part.kept
        return self._read(atom, Part(axis, kept)), part


def _read_part(joins: Sequence[Join], operand: int, part: Part) -> Part:
    """Returns what an equation reads of an input; `joins` are those of the part's axis."""
    join = next((join for join in joins if join.operand == operand), None)
    if join is None:
        return WHOLE
    kept = join.backwards(part.kept)
    return WHOLE if kept.all() else Part(join.in_axis, kept)


def _take(value: Any, axis: int, indices: np.ndarray) -> Any:
    """Returns some entries along an axis; the indices rise."""
    size = value.shape[axis]
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return _gathered(value, axis, indices)

    @jax.custom_vjp
    def take(value: Any) -> Any:
        return _gathered(value, axis, indices)

    def backwards(_: None, gradient: Any) -> tuple[Any]:
        # A gather: the scatter that JAX has in its place is a loop on the CPU.
        places = np.minimum(np.searchsorted(indices, np.arange(size)), len(indices) - 1)
        spread = _gathered(gradient, axis, places)
        taken = lax.broadcast_in_dim(np.isin(np.arange(size), indices), spread.shape, (axis,))
        return (lax.select(taken, spread, lax.full_like(spread, 0)),)

    take.defvjp(lambda value: (take(value), None), backwards)
    return take(value)


def _gathered(value: Any, axis: int, indices: np.ndarray) -> Any:
    others = tuple(each for each in range(value.ndim) if each != axis)
    return lax.gather(
        value,
        np.asarray(indices, np.int32)[:, None],
        lax.GatherDimensionNumbers(others, collapsed_slice_dims=(axis,), start_index_map=(axis,)),
        slice_sizes=_replaced(value.shape, axis, 1),
        indices_are_sorted=True,
        mode="promise_in_bounds",
    )


def _changed(equation: Any, part: Part) -> dict[str, Any]:
    """Returns the parameters that an equation has for a part of its output."""
    name, params, kept = equation.primitive.name, equation.params, int(part.kept.sum())
    if name in ("broadcast_in_dim", "reshape"):
        field = "shape" if name == "broadcast_in_dim" else "new_sizes"
        return {field: _replaced(params[field], part.axis, kept)}
    if name == "pad":
        low, high, _ = params["padding_config"][part.axis]
        ends = int(part.kept[:low].sum()), int(part.kept[len(part.kept) - high :].sum())
        return {"padding_config": _replaced(params["padding_config"], part.axis, (*ends, 0))}
    if name == "slice":
        # Its input has been cut to what the slice takes of that axis.
        axis, strides = part.axis, params["strides"]
        return {
            "start_indices": _replaced(params["start_indices"], axis, 0),
            "limit_indices": _replaced(params["limit_indices"], axis, kept),
            "strides": None if strides is None else _replaced(strides, axis, 1),
        }
    if name == "conv_general_dilated":
        # Whole groups are left out.
        return {"feature_group_count": kept * params["feature_group_count"] // len(part.kept)}
    return {}


def _replaced(values: Sequence[Any], position: int, value: Any) -> tuple[Any, ...]:
    return (*values[:position], value, *values[position + 1 :])
