"""Which part of every value of a function has to be computed, where layers leave channels of their inputs unread.

A jaxpr has no channels, only axes. What a layer does not read of its input nobody has to compute, unless something else
reads it. So needs are passed backwards, from what the function returns to its arguments; every operation says which
entries along an axis of its inputs belong to which entries along an axis of its output. Values that an operation joins
entry by entry are then given the same part, so that no map has to be gathered.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend import core

from fdjax.graph.channel_rules import REDUCTIONS, SEVERAL, UNARY
from fdjax.graph.known_functions import elementwise_function


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Some entries of a value along one axis.

    Attributes:
      axis: the axis; -1 for the whole value.
      kept: which of its entries, bool [entries]; empty for the whole value.
    """

    axis: int
    kept: np.ndarray

    @property
    def whole(self) -> bool:
        """Whether the part is the whole value."""
        return self.axis < 0

    @property
    def indices(self) -> np.ndarray:
        """The entries' indices, int."""
        return np.flatnonzero(self.kept)


WHOLE = Part(-1, np.ones(0, bool))


def part_of(axis: int, kept: np.ndarray) -> Part:
    """Makes a part; it has an entry at least, and with all of them it is the whole value.

    Args:
      axis: the axis.
      kept: which of its entries, bool [entries].

    Returns:
      The part.
    """
    if kept.all():
        return WHOLE
    if not kept.any():
        kept = np.arange(len(kept)) == 0
    return Part(axis, kept)


@dataclasses.dataclass(frozen=True, eq=False)
class Join:
    """What an axis of an operation's input has to do with an axis of its output.

    Entries of the same class belong together: one is needed where the other is. A class of -1 is that of an entry which
    belongs to none.

    Attributes:
      operand: position of the input.
      output: position of the output.
      in_axis: axis of the input.
      out_axis: axis of the output.
      in_classes: class of each entry of the input's axis, int.
      out_classes: class of each entry of the output's axis, int.
    """

    operand: int
    output: int
    in_axis: int
    out_axis: int
    in_classes: np.ndarray
    out_classes: np.ndarray

    def backwards(self, kept: np.ndarray) -> np.ndarray:
        """Finds the entries of the input that belong to some of the output.

        Args:
          kept: which entries of the output, bool.

        Returns:
          Which entries of the input, bool.
        """
        return np.isin(self.in_classes, self.out_classes[kept]) & (self.in_classes >= 0)

    def forwards(self, kept: np.ndarray) -> np.ndarray:
        """Finds the entries of the output that belong to some of the input.

        Args:
          kept: which entries of the input, bool.

        Returns:
          Which entries of the output, bool.
        """
        return np.isin(self.out_classes, self.in_classes[kept]) & (self.out_classes >= 0)


@dataclasses.dataclass(frozen=True)
class LayerAxes:
    """Where an ungrouped convolution, or a product, has its channels.

    Attributes:
      kernel: position of the kernel among the inputs, 0 or 1.
      read: the axis of the other input that is summed over.
      kernel_in: the kernel's axis that is summed over with it.
      kernel_out: the kernel's axis of outputs.
      made: the output's axis of channels.
    """

    kernel: int
    read: int
    kernel_in: int
    kernel_out: int
    made: int


def layer_axes(equation: Any, of_variables: Sequence[bool]) -> LayerAxes | None:
    """Finds the channels of a layer.

    Args:
      equation: an equation of a jaxpr.
      of_variables: of each of its inputs, whether it depends on variables alone.

    Returns:
      Its axes; None if it is no layer, or a grouped convolution.
    """
    name, params = equation.primitive.name, equation.params
    if list(of_variables).count(True) != 1:
        return None
    kernel = list(of_variables).index(True)
    if name == "conv_general_dilated":
        if kernel != 1 or params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
            return None
        dimensions = params["dimension_numbers"]
        out, given = dimensions.rhs_spec[:2]
        return LayerAxes(1, dimensions.lhs_spec[1], given, out, dimensions.out_spec[1])
    if name != "dot_general":
        return None
    contracted, batch = params["dimension_numbers"]
    ranks = [atom.aval.ndim for atom in equation.invars]
    if batch[0] or len(contracted[kernel]) != 1 or ranks[kernel] != 2:
        return None
    (kernel_in,), (read,) = contracted[kernel], contracted[1 - kernel]
    made = ranks[0] - 1 if kernel == 1 else 0
    return LayerAxes(kernel, read, kernel_in, 1 - kernel_in, made)


class Needs:
    """The part of every value that is computed.

    Attributes:
      of: variable of the jaxpr -> its part. A value that is missing is not computed.
    """

    def __init__(
        self, jaxpr: Any, names: Sequence[str | None], reads: Mapping[int, np.ndarray], passive: frozenset[int]
    ):
        """Finds the parts.

        Args:
          jaxpr: a jaxpr in which layers lie at the top, not in calls.
          names: the path of each argument that is a variable; None for the others.
          reads: index of an equation -> which channels a layer reads of its input, bool [C].
          passive: positions of the results of which only what is computed anyway is wanted.
        """
        self._jaxpr, self._reads = jaxpr, reads
        self.of: dict[Any, Part] = {}
        self._of_variables = _reached(jaxpr, [name is None for name in names])
        images = [name is None and _holds_numbers(atom) for name, atom in zip(names, jaxpr.invars, strict=True)]
        self._of_images = _reached(jaxpr, images)
        self._layers = [layer_axes(equation, self._known(equation)) for equation in jaxpr.eqns]
        self._joins = [joins_of(equation, self._known(equation)) for equation in jaxpr.eqns]
        self._wanted = _wanted(jaxpr)
        for position, atom in enumerate(jaxpr.outvars):
            if position not in passive:
                self._need(atom, WHOLE)
        while self._pass() or self._widen_what_nothing_reaches():
            pass

    def layer(self, index: int) -> LayerAxes | None:
        """Returns the channels of an equation by its index; None if it is no layer, or a grouped convolution."""
        return self._layers[index]

    def _known(self, equation: Any) -> list[bool]:
        """Returns of each input of an equation whether it depends on variables alone."""
        return [not self._depends(atom, self._of_variables) for atom in equation.invars]

    def joins(self, index: int) -> Sequence[Join] | None:
        """Returns the joins of an equation by its index; None if it is always computed whole."""
        return self._joins[index]

    @staticmethod
    def _depends(atom: Any, reached: set[Any]) -> bool:
        return not isinstance(atom, core.Literal) and atom in reached

    def _need(self, atom: Any, part: Part) -> bool:
        """Adds to the part of a value; returns whether it has grown."""
        if isinstance(atom, core.Literal):
            return False
        before = self.of.get(atom)
        if before is None:
            self.of[atom] = part
            return True
        if before.whole:
            return False
        if part.whole or part.axis != before.axis:
            self.of[atom] = WHOLE
            return True
        kept = before.kept | part.kept
        self.of[atom] = part_of(part.axis, kept)
        return bool(kept.sum() > before.kept.sum())

    def _pass(self) -> bool:
        """Passes needs on backwards, and then forwards; returns whether any has grown."""
        grown = False
        for index in reversed(range(len(self._jaxpr.eqns))):
            grown |= self._backwards(index)
        for index in range(len(self._jaxpr.eqns)):
            grown |= self._forwards(index)
        return grown

    def _backwards(self, index: int) -> bool:
        equation, grown = self._jaxpr.eqns[index], False
        layer = self.layer(index) if index in self._reads else None
        for output, made in enumerate(equation.outvars):
            part = self.of.get(made)
            if part is None:
                continue
            joins = [join for join in self._joins[index] or () if join.output == output and join.out_axis == part.axis]
            kept = part.kept
            for join in joins:
                kept = kept | join.forwards(join.backwards(kept))
            if kept is not part.kept:
                grown |= self._need(made, part_of(part.axis, kept))
            whole = part.whole or self._joins[index] is None or not can_be_cut(equation, joins)
            for operand, atom in enumerate(equation.invars):
                join = None if whole else next((join for join in joins if join.operand == operand), None)
                need = WHOLE if join is None else part_of(join.in_axis, join.backwards(kept))
                if layer is not None and operand != layer.kernel:
                    need = part_of(layer.read, self._reads[index])
                grown |= self._need(atom, need)
        return grown

    def _forwards(self, index: int) -> bool:
        equation, grown = self._jaxpr.eqns[index], False
        for join in self._joins[index] or ():
            atom, made = equation.invars[join.operand], equation.outvars[join.output]
            if not self._depends(atom, self._of_images) or atom not in self.of or index not in self._wanted:
                continue
            part, already = self.of[atom], self.of.get(made)
            if part.axis == join.in_axis:
                grown |= self._need(made, part_of(join.out_axis, join.forwards(part.kept)))
            elif part.whole and already is None:
                grown |= self._need(made, WHOLE)
            elif part.whole and already is not None and already.axis == join.out_axis:
                whole = np.ones(len(join.in_classes), bool)
                grown |= self._need(made, part_of(join.out_axis, join.forwards(whole)))
        return grown

    def _widen_what_nothing_reaches(self) -> bool:
        """Needs whole what leads to a passive result and has got no part; returns whether there is such a value."""
        for index in sorted(self._wanted):
            outputs = self._jaxpr.eqns[index].outvars
            if not any(made in self.of for made in outputs):
                self.of.update(dict.fromkeys(outputs, WHOLE))
                return True
        return False


def _holds_numbers(atom: Any) -> bool:
    """Whether a value may hold images or labels, and is no random key."""
    return not str(atom.aval.dtype).startswith("key<")


def _reached(jaxpr: Any, starts: Sequence[bool]) -> set[Any]:
    """Returns the values that depend on some of the arguments."""
    reached = {atom for atom, start in zip(jaxpr.invars, starts, strict=True) if start}
    for equation in jaxpr.eqns:
        if any(not isinstance(atom, core.Literal) and atom in reached for atom in equation.invars):
            reached.update(equation.outvars)
    return reached


def _wanted(jaxpr: Any) -> set[int]:
    """Returns the indices of the equations that lead to a result."""
    needed = {atom for atom in jaxpr.outvars if not isinstance(atom, core.Literal)}
    wanted = set()
    for index in reversed(range(len(jaxpr.eqns))):
        equation = jaxpr.eqns[index]
        if any(made in needed for made in equation.outvars):
            wanted.add(index)
            needed.update(atom for atom in equation.invars if not isinstance(atom, core.Literal))
    return wanted


def can_be_cut(equation: Any, joins: Sequence[Join]) -> bool:
    """Whether a part of an equation's output can be computed by itself.

    Args:
      equation: an equation of a jaxpr.
      joins: its joins to the output's axis along which the part lies.

    Returns:
      Whether it can; otherwise all of its inputs are needed.
    """
    return bool(joins) or equation.primitive.name == "broadcast_in_dim"


# (equation, whether its inputs depend on variables alone) -> its joins.
_Rule = Callable[[Any, Sequence[bool]], "list[Join] | None"]


def joins_of(equation: Any, of_variables: Sequence[bool]) -> list[Join] | None:
    """Lists the joins of an equation.

    Args:
      equation: an equation of a jaxpr.
      of_variables: of each of its inputs, whether it depends on variables alone.

    Returns:
      The joins; None if the equation is not known, and all of its inputs are needed for any part of its outputs.
    """
    name = equation.primitive.name
    if name.startswith("reduce_window"):
        return _window(equation)
    if name in REDUCTIONS:
        return _reduction(equation)
    if name in UNARY | SEVERAL or elementwise_function(equation) is not None:
        return _elementwise(equation)
    rule = _RULES.get(name)
    return None if rule is None else rule(equation, of_variables)


def _equal(operand: int, in_axis: int, out_axis: int, size: int, output: int = 0) -> Join:
    return Join(operand, output, in_axis, out_axis, np.arange(size), np.arange(size))


def _elementwise(equation: Any) -> list[Join] | None:
    shape, joins = equation.outvars[0].aval.shape, []
    for operand, atom in enumerate(equation.invars):
        sides = atom.aval.shape
        if sides and len(sides) != len(shape):
            return None
        joins += [_equal(operand, axis, axis, side) for axis, side in enumerate(sides) if side == shape[axis]]
    return joins


def _reduction(equation: Any) -> list[Join]:
    axes, shape = equation.params["axes"], equation.invars[0].aval.shape
    left = [axis for axis in range(len(shape)) if axis not in axes]
    return [_equal(0, axis, place, shape[axis]) for place, axis in enumerate(left)]


def _window(equation: Any) -> list[Join] | None:
    if len(equation.invars) != 1:
        return None
    params, shape = equation.params, equation.invars[0].aval.shape
    ones = (params["window_dimensions"], params["window_strides"], params["base_dilation"], params["window_dilation"])
    return [
        _equal(0, axis, axis, side)
        for axis, side in enumerate(shape)
        if all(each[axis] == 1 for each in ones) and not any(params["padding"][axis])
    ]


def _pad(equation: Any, of_variables: Sequence[bool]) -> list[Join]:
    joins = []
    for axis, side in enumerate(equation.invars[0].aval.shape):
        low, high, inner = equation.params["padding_config"][axis]
        if min(low, high) >= 0 and not inner:
            classes = np.concatenate([np.full(low, -1), np.arange(side), np.full(high, -1)])
            joins.append(Join(0, 0, axis, axis, np.arange(side), classes))
    return joins


def _reshape(equation: Any, of_variables: Sequence[bool]) -> list[Join]:
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    ahead = {math.prod(after[:axis]): axis for axis, side in enumerate(after) if side > 1}
    joins = []
    for axis, side in enumerate(before):
        place = ahead.get(math.prod(before[:axis]))
        if side > 1 and place is not None and after[place] == side:
            joins.append(_equal(0, axis, place, side))
    return joins


def _broadcast(equation: Any, of_variables: Sequence[bool]) -> list[Join] | None:
    if len(equation.invars) != 1:
        return None
    sides, shape = equation.invars[0].aval.shape, equation.params["shape"]
    places = enumerate(equation.params["broadcast_dimensions"])
    return [_equal(0, axis, place, sides[axis]) for axis, place in places if sides[axis] == shape[place]]


def _transpose(equation: Any, of_variables: Sequence[bool]) -> list[Join]:
    shape = equation.outvars[0].aval.shape
    return [_equal(0, axis, place, shape[place]) for place, axis in enumerate(equation.params["permutation"])]


def _concatenate(equation: Any, of_variables: Sequence[bool]) -> list[Join]:
    dimension, shape, start, joins = equation.params["dimension"], equation.outvars[0].aval.shape, 0, []
    for operand, atom in enumerate(equation.invars):
        side = atom.aval.shape[dimension]
        joins += [_equal(operand, axis, axis, shape[axis]) for axis in range(len(shape)) if axis != dimension]
        joins.append(
            Join(operand, 0, dimension, dimension, np.arange(start, start + side), np.arange(shape[dimension]))
        )
        start += side
    return joins


def _slice(equation: Any, of_variables: Sequence[bool]) -> list[Join]:
    params, joins = equation.params, []
    for axis, side in enumerate(equation.invars[0].aval.shape):
        step = params["strides"][axis] if params["strides"] else 1
        taken = np.arange(side)[params["start_indices"][axis] : params["limit_indices"][axis] : step]
        joins.append(Join(0, 0, axis, axis, np.arange(side), taken))
    return joins


def _split(equation: Any, of_variables: Sequence[bool]) -> list[Join]:
    shape, joins, start = equation.invars[0].aval.shape, [], 0
    for output, size in enumerate(equation.params["sizes"]):
        for axis, side in enumerate(shape):
            if axis == equation.params["axis"]:
                joins.append(Join(0, output, axis, axis, np.arange(side), np.arange(start, start + size)))
            else:
                joins.append(_equal(0, axis, axis, side, output))
        start += size
    return joins


def _reverse(equation: Any, of_variables: Sequence[bool]) -> list[Join]:
    shape = equation.invars[0].aval.shape
    gone = equation.params["dimensions"]
    return [_equal(0, axis, axis, side) for axis, side in enumerate(shape) if axis not in gone]


def _layer(equation: Any, of_variables: Sequence[bool]) -> list[Join] | None:
    axes = layer_axes(equation, of_variables)
    if axes is not None:
        size = equation.outvars[0].aval.shape[axes.made]
        return [_equal(axes.kernel, axes.kernel_out, axes.made, size)]
    params = equation.params
    if equation.primitive.name == "dot_general" or list(of_variables) != [False, True]:
        return None
    if params["batch_group_count"] != 1:
        return None
    # Of a grouped convolution, whole groups are left out.
    dimensions, groups = params["dimension_numbers"], params["feature_group_count"]
    read, made = dimensions.lhs_spec[1], dimensions.out_spec[1]
    inputs, outputs = equation.invars[0].aval.shape[read], equation.outvars[0].aval.shape[made]
    of_inputs, of_outputs = (np.repeat(np.arange(groups), size // groups) for size in (inputs, outputs))
    return [
        Join(0, 0, read, made, of_inputs, of_outputs),
        Join(1, 0, dimensions.rhs_spec[0], made, of_outputs, of_outputs),
    ]


_RULES: Mapping[str, _Rule] = {
    "pad": _pad,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "concatenate": _concatenate,
    "slice": _slice,
    "split": _split,
    "rev": _reverse,
    "conv_general_dilated": _layer,
    "dot_general": _layer,
}
