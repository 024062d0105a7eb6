"""A frozen network as data: a static, hashable list of operations, which can be written as JSON and read back.

A program is a list of operations on numbered values; its arrays are kept beside it, by name. The emitters
(`fdjax.frozen.xla`, `fdjax.frozen.onnx_model`, `fdjax.frozen.native`) walk the list, with one function for each kind of
operation.

Maps are NHWC. Channels are in the order of the frozen network. Shape letters: `fdjax.ops.blocks`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

import typeguard

from fdjax.frozen.products import Indices, ProductPlan, Segment, Size, Window, mean_phases, segment_macs
from fdjax.graph.primitives import params_from_json
from fdjax.ops.macs import conv_macs, depthwise_macs

_EVERY_ITEM = typeguard.CollectionCheckStrategy.ALL_ITEMS
Activation = Literal["none", "relu", "relu6"]
# The bias of a layer: none, one number a channel [D], or a map [H', W', D].
Bias = Literal["none", "channel", "map"]

FORMS = ("dense", "channels", "groups", "bands")


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution with its bias and activation: [B, H, W, C] -> [B, H', W', D].

    Arrays: "NAME/kernel" [rows, columns, C / groups, D], "NAME/bias" [D] or [H', W', D].
    It is depthwise if groups = C = D.
    """

    name: str
    x: int
    y: int
    window: Window
    inputs: int
    outputs: int
    groups: int
    bias: Bias
    activation: Activation

    @property
    def form(self) -> str:
        return "dense"

    def macs(self) -> int:
        """Multiply-accumulates."""
        rows, columns = self.window.window
        return conv_macs(self.window.out_size, self.inputs // self.groups, self.outputs, 1) * rows * columns


@dataclasses.dataclass(frozen=True)
class Pointwise:
    """A pointwise layer with its bias and activation: [B, H, W, C] -> [B, H, W, D], or with `pooled` -> [B, D].

    Arrays: "NAME/..." as `fdjax.frozen.products.pack` names them, "NAME/bias" [D] or [H, W, D].

    Attributes:
      product: the products on pixels and by bands.
      size: (H, W); () for a layer on vectors [B, C], (tokens,) for one on [B, tokens, C], and so on: these have no
        bands.
      block: K.
      placement: for each channel of the output its place among the product's outputs, -1 for zero; None: the same
        order. The bias has the channels of the output.
      pooled: whether the layer computes the mean over its map.
    """

    name: str
    x: int
    y: int
    form: str
    product: ProductPlan
    size: tuple[int, ...]
    block: int
    placement: Indices | None
    bias: Bias
    activation: Activation
    pooled: bool = False

    @property
    def outputs(self) -> int:
        """The number of output channels."""
        return self.product.outputs if self.placement is None else len(self.placement)

    def macs(self) -> int:
        """Returns the MACs with transforms; pooled channels that keep only the mean stay at block resolution."""
        size = math.prod(self.size[:-1]), (1, *self.size)[-1]
        segments = self.product.output_segments
        if self.pooled:
            segments = tuple(s for s in segments if not (s[2] == 1 and s[0] >= self.product.whole[1]))
        return self.product.macs(size, self.block) + segment_macs(segments, size, self.block)


@dataclasses.dataclass(frozen=True)
class Step:
    """A channelwise operation between the writer and the reader of a run.

    Attributes:
      kind: "shift", a bias [E] and an activation; or "depthwise", a window and a kernel [rows, columns, E].
      activation: the activation of a shift.
      window: the window of a depthwise step.
    """

    kind: Literal["shift", "depthwise"]
    activation: Activation = "none"
    window: Window | None = None


@dataclasses.dataclass(frozen=True)
class Chain:
    """Channels of a run's space that are computed together, from the writer to the reader.

    Attributes:
      name: prefix of its arrays: "whole", "means", "bands" or "coefsN".
      channels: E, the number of channels.
      means: whether the channels keep only the mean, and are computed at block resolution.
      writer: the products that make the channels.
      reader: the products that read them.
    """

    name: str
    channels: int
    means: bool
    writer: ProductPlan
    reader: ProductPlan


@dataclasses.dataclass(frozen=True)
class Run:
    """A run: pointwise writer, channelwise steps, pointwise reader; [B, H, W, C] -> [B, H', W', D].

    The space between them (usually the wide side) exists only inside the run, chain by chain; the results of the chains
    are summed. Arrays under "NAME/CHAIN": "writer/..." and "reader/..." as `pack` names them, and "stepI" for the I-th
    step: a bias [E], or a kernel [rows, columns, E]; for a chain of means [T, E], the summed taps of the phases of
    `products.mean_phases`, in order. "NAME/bias" is [D] or [H', W', D].

    Attributes:
      form: one of `FORMS`.
      inputs: C.
      in_size: (H, W).
      out_size: (H', W').
      blocks: K of the writer and of the reader.
      steps: the steps in order; at most one is a depthwise step.
      chains: the chains; none if the space has no channel left.
      segments: (start, stop, coefficients) of the readers' outputs to transform back.
      output_counts: kept counts of the readers' outputs.
      outputs: number of channels of the run's output.
      placement: for each channel of the output its place among the readers' outputs, -1 for zero; None: the same order.
      bias: the form of the bias, which is added after the placement.
      activation: the activation after the bias.
      layers: names of the writer and of the reader.
    """

    name: str
    x: int
    y: int
    form: str
    inputs: int
    in_size: Size
    out_size: Size
    blocks: tuple[int, int]
    steps: tuple[Step, ...]
    chains: tuple[Chain, ...]
    segments: tuple[Segment, ...]
    output_counts: Indices
    outputs: int
    placement: Indices | None
    bias: Bias
    activation: Activation
    layers: tuple[str, ...] = ()

    @property
    def depthwise(self) -> Window | None:
        """The window of the depthwise step, if there is one."""
        return next((step.window for step in self.steps if step.window is not None), None)

    def macs(self) -> int:
        """Returns the MACs with transforms; a mean or a broadcast counts 1 for each element."""
        total = segment_macs(self.segments, self.out_size, self.blocks[1])
        shared: dict[tuple[int, int], int] = {}
        window = self.depthwise
        for chain in self.chains:
            if chain.means:
                total += self._means_macs(chain)
                shared[0, chain.writer.inputs] = max(1, shared.get((0, chain.writer.inputs), 0))
                continue
            total += chain.writer.macs(self.in_size, self.blocks[0])
            total += segment_macs(chain.writer.output_segments, self.in_size, self.blocks[0])
            # Chains share the transforms of their input.
            total -= segment_macs(chain.writer.input_segments, self.in_size, self.blocks[0])
            for start, stop, count in chain.writer.input_segments:
                shared[start, stop] = max(count, shared.get((start, stop), 0))
            if window is not None:
                total += depthwise_macs(self.out_size, chain.channels, 1) * window.window[0] * window.window[1]
            total += chain.reader.macs(self.out_size, self.blocks[1])
        return total + segment_macs([(*edge, n) for edge, n in shared.items()], self.in_size, self.blocks[0])

    def _means_macs(self, chain: Chain) -> int:
        block, window = self.blocks[0], self.depthwise
        blocks_in, blocks_out = ((size[0] // block) * (size[1] // block) for size in (self.in_size, self.out_size))
        taps = sum(len(phase.taps) for phase in mean_phases(window, block)) if window is not None else 0
        reader = chain.reader.inputs * chain.reader.outputs
        return blocks_in * chain.writer.inputs * chain.channels + blocks_out * (chain.channels * taps + reader)


@dataclasses.dataclass(frozen=True)
class Apply:
    """Any other operation: a JAX primitive, on values and arrays.

    Attributes:
      name: prefix of its arrays.
      kind: the primitive's name.
      inputs: values; a negative number -1 - i stands for the array "NAME/argI".
      outputs: values.
      params: the primitive's parameters, in the JSON form of `fdjax.graph.primitives`, as a string. Their shapes have
        the batch size 1.
    """

    name: str
    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: str


@dataclasses.dataclass(frozen=True)
class Take:
    """A selection of channels of a value (its last axis); the index -1 stands for a channel of zeros."""

    name: str
    x: int
    y: int
    indices: Indices


Operation = Conv | Pointwise | Run | Apply | Take


def makes(operation: Operation) -> tuple[int, ...]:
    """Returns the values that an operation makes."""
    return operation.outputs if isinstance(operation, Apply) else (operation.y,)


_KINDS: Mapping[str, Any] = {"conv": Conv, "pointwise": Pointwise, "run": Run, "apply": Apply, "take": Take}


@dataclasses.dataclass(frozen=True)
class Program:
    """A frozen network.

    Attributes:
      shapes: the shape of each value, without the batch (its first axis).
      inputs: the values of the raw images.
      outputs: the values of the results.
      operations: the operations, in order of evaluation.
    """

    shapes: tuple[tuple[int, ...], ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    operations: tuple[Operation, ...]

    def macs(self) -> int:
        """Returns the MACs of its layers, and of products that belong to none, such as those of attention."""
        layers = sum(operation.macs() for operation in self.operations if not isinstance(operation, Apply | Take))
        return layers + sum(self._product_macs(operation) for operation in self.operations)

    def _product_macs(self, operation: Operation) -> int:
        if not isinstance(operation, Apply) or operation.kind != "dot_general":
            return 0
        contracted, _ = params_from_json(json.loads(operation.params))["dimension_numbers"]
        # One side may be an array, whose shape the program does not have; both have the same contracted sides.
        side = 0 if operation.inputs[0] >= 0 else 1
        shape = (1, *self.shapes[operation.inputs[side]])
        return math.prod(self.shapes[operation.outputs[0]]) * math.prod(shape[axis] for axis in contracted[side])

    def to_dict(self) -> dict[str, Any]:
        """Returns the program as JSON types; `from_dict` reads them back."""
        fields = dataclasses.asdict(self)
        names = {kind: name for name, kind in _KINDS.items()}
        for operation, written in zip(self.operations, fields["operations"], strict=True):
            written["operation"] = names[type(operation)]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Program:
        """Reads what `to_dict` returned, also after it was written as JSON.

        Raises:
          ValueError: if the fields are not those of a program.
        """
        try:
            plain = _tuples(fields)
            operations = tuple(map(_operation, plain["operations"]))
            program = cls(**{**plain, "operations": operations})
            _check_types(program)
        except (KeyError, TypeError, AttributeError, typeguard.TypeCheckError) as error:
            raise ValueError(f"no program of a frozen network: {error!r}") from error
        return program


def _check_types(value: Any) -> None:
    """Raises `TypeCheckError` unless every field of a dataclass, and of the dataclasses in it, has its type."""
    if isinstance(value, tuple):
        for item in value:
            if dataclasses.is_dataclass(item):
                _check_types(item)
        return
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        held = getattr(value, field.name)
        typeguard.check_type(held, hints[field.name], collection_check_strategy=_EVERY_ITEM)
        if dataclasses.is_dataclass(held) or isinstance(held, tuple):
            _check_types(held)


def _operation(fields: Mapping[str, Any]) -> Operation:
    made = dict(fields)
    kind = _KINDS[made.pop("operation")]
    if kind is Conv:
        made["window"] = Window(**made["window"])
    if kind is Pointwise:
        made["product"] = ProductPlan(**made["product"])
    if kind is Run:
        made["steps"] = tuple(
            Step(**{**step, "window": Window(**step["window"]) if step["window"] else None}) for step in made["steps"]
        )
        made["chains"] = tuple(
            Chain(**{**chain, **{side: ProductPlan(**chain[side]) for side in ("writer", "reader")}})
            for chain in made["chains"]
        )
    return kind(**made)


def _tuples(value: Any) -> Any:
    """Converts JSON's lists to tuples, recursively."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
