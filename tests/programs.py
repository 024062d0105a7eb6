"""Small frozen networks with random weights and masks, and what the same layers make of images, unfrozen."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdjax.frozen.products import (
    Segment,
    Window,
    by_count,
    mean_phases,
    pack,
    plan_reading,
    runs_at_block_resolution,
    static_order,
)
from fdjax.frozen.program import Apply, Chain, Conv, Pointwise, Program, Run, Step, Take
from fdjax.graph.operations import evaluate_operations
from fdjax.graph.primitives import params_to_json
from fdjax.graph.trace import trace
from fdjax.ops.pointwise import masked_pointwise

ACTIVATIONS = {"none": lambda x: x, "relu": jax.nn.relu, "relu6": lambda x: jnp.clip(x, 0, 6)}


def window_on(size: tuple[int, int], window=(3, 3), stride=(1, 1), pads=None) -> Window:
    """A window with its output size; pads: half the window on either side."""
    pads = pads or tuple((side // 2, side // 2) for side in window)
    out = [(n + sum(p) - w) // s + 1 for n, p, w, s in zip(size, pads, window, stride, strict=True)]
    return Window(tuple(window), tuple(stride), pads, tuple(size), (out[0], out[1]))


def window_conv(x, kernel, window: Window, groups: int):
    """The library's convolution: the reference."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, window.stride, window.pads, dimension_numbers=dimensions, feature_group_count=groups
    )


def hard_mask(counts: np.ndarray, block: int) -> np.ndarray:
    return (np.arange(block**2)[:, None] < counts).astype(np.float32)


def joined_segments(products, outputs: int) -> tuple[Segment, ...]:
    """What several products make together."""
    counts, edges = np.zeros(outputs, np.int64), {0, outputs}
    for start, stop, count in itertools.chain(*(product.output_segments for product in products)):
        counts[start:stop] = np.maximum(counts[start:stop], count)
        edges |= {start, stop}
    return tuple((start, stop, int(counts[start])) for start, stop in itertools.pairwise(sorted(edges)))


class Network:
    """A program in the making; each method adds an operation and returns the number of its value."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.shapes, self.operations, self.arrays = [shape], [], {}
        self.reference_steps: list[tuple[tuple[int, ...], tuple[int, ...], Callable]] = []

    # Shared

    def _new(self, shape: Sequence[int]) -> int:
        self.shapes.append(tuple(shape))
        return len(self.shapes) - 1

    def _name(self) -> str:
        return f"layer{len(self.operations)}"

    def _kernel(self, *shape: int) -> np.ndarray:
        return self.rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape).astype(np.float32)

    def _bias(self, kind: str, shape: Sequence[int]) -> np.ndarray | float:
        if kind == "none":
            return 0.0
        return self.rng.normal(0, 0.5, shape if kind == "map" else shape[-1:]).astype(np.float32)

    def counts(self, channels: int, block: int, levels: Sequence[int] | None) -> np.ndarray:
        """Kept counts from the levels (None: 0 to N)."""
        return self.rng.choice(np.arange(block**2 + 1) if levels is None else np.asarray(levels), channels)

    def _add(self, operation: Any, reference: Callable) -> int:
        self.operations.append(operation)
        self.reference_steps.append(((operation.x,), (operation.y,), reference))
        return operation.y

    def program(self, *outputs: int) -> Program:
        return Program(tuple(self.shapes), (0,), outputs, tuple(self.operations))

    def reference(self, *outputs: int) -> Callable[[Any], list[Any]]:
        """The layers on images as they are, by the library and `masked_pointwise`."""

        def evaluate(images: Any) -> list[Any]:
            values = {0: jnp.asarray(images, jnp.float32)}
            for inputs, made, function in self.reference_steps:
                results = function(*(values[value] for value in inputs))
                values.update(zip(made, results if isinstance(results, (tuple, list)) else [results], strict=True))
            return [values[value] for value in outputs]

        return evaluate

    # Operations

    def conv(self, x, outputs, window=(3, 3), stride=(1, 1), groups=1, pads=None, bias="channel", activation="relu6"):
        (*size, channels), name = self.shapes[x], self._name()
        window = window_on(tuple(size), window, stride, pads)
        kernel = self._kernel(*window.window, channels // groups, outputs)
        added = self._bias(bias, (*window.out_size, outputs))
        self.arrays[f"{name}/kernel"] = kernel
        if bias != "none":
            self.arrays[f"{name}/bias"] = added
        y = self._new((*window.out_size, outputs))
        operation = Conv(name, x, y, window, channels, outputs, groups, bias, activation)
        return self._add(operation, lambda x: ACTIVATIONS[activation](window_conv(x, kernel, window, groups) + added))

    def pointwise(
        self, x, outputs, block=1, levels=None, bias="channel", activation="relu6", pooled=False, out_levels=None
    ):
        (*size, channels), name = self.shapes[x], self._name()
        read = self.counts(channels, block, levels)
        made = self.counts(outputs, block, out_levels or levels)
        kernel = self._kernel(channels, outputs)
        written = by_count(np.flatnonzero(made > 0), made)
        product, order = plan_reading(np.arange(channels), read, made[written], block)
        places = {int(channel): place for place, channel in enumerate(written)}
        placement = static_order(np.array([places.get(c, -1) for c in range(outputs)]), len(written))
        added = self._bias(bias, (*size, outputs))
        self.arrays |= pack(name, kernel[order][:, written], product)
        if bias != "none":
            self.arrays[f"{name}/bias"] = added
        y = self._new((outputs,) if pooled else (*size, outputs))
        form = "bands" if product.transforms else "dense"
        operation = Pointwise(name, x, y, form, product, tuple(size), block, placement, bias, activation, pooled)

        def reference(x):
            if len(size) == 2:
                y = masked_pointwise(x, kernel, block, hard_mask(read, block), hard_mask(made, block))
            else:
                y = (x * (read > 0)) @ kernel * (made > 0)
            y = ACTIVATIONS[activation](y + added)
            return y.mean(axis=(1, 2)) if pooled else y

        return self._add(operation, reference)

    def run(
        self,
        x: int,
        wide: int,
        outputs: int,
        block: int | tuple[int, int] = 2,
        levels: Sequence[int] | None = None,
        *,
        window: tuple[int, int] | None = (3, 3),
        stride: tuple[int, int] = (1, 1),
        pads: Any = None,
        tied: bool = True,
        bias: str = "channel",
        activation: str = "none",
    ) -> int:
        """An inverted residual without its addition; of tied masks each level goes its own way."""
        (*size, channels), name = self.shapes[x], self._name()
        blocks = (block, block) if isinstance(block, int) else block
        moved = None if window is None else window_on(tuple(size), window, stride, pads)
        out_size = tuple(size) if moved is None else moved.out_size
        inside = None if levels is None else [level for level in levels if level]
        limits = [range(1, k * k + 1) if inside is None else inside for k in blocks]
        counts_in = self.counts(channels, blocks[0], levels)
        made = self.counts(wide, blocks[0], limits[0])
        read = made if tied else self.counts(wide, blocks[1], limits[1])
        counts_out = self.counts(outputs, blocks[1], levels)
        kernels = self._kernel(channels, wide), self._kernel(wide, outputs)
        taps = None if moved is None else self._kernel(*moved.window, 1, wide)
        shifts = [self._bias("channel", (wide,)) for _ in range(1 if taps is None else 2)]
        added = self._bias(bias, (*out_size, outputs))

        steps = [Step("shift", "relu6"), Step("depthwise", "none", moved), Step("shift", "relu")][
            : 1 if taps is None else 3
        ]
        step_arrays = [shifts[0]] if taps is None else [shifts[0], taps[:, :, 0], shifts[1]]
        at_blocks = runs_at_block_resolution(tuple(size), out_size, blocks)
        means = (made == 1) & (read == 1) & (at_blocks and blocks[0] > 1)
        groups = {"bands": ~means, "means": means}
        if tied:
            groups = {f"coefs{n}": ~means & (made == n) for n in np.unique(made)[::-1]} | {"means": means}
        written = by_count(np.flatnonzero(counts_out > 0), counts_out)
        chains = []
        for chain, members in groups.items():
            if members.any():
                args = counts_in, made, read, counts_out[written], blocks, size
                planned, order, (inner, sorted_) = _chain(chain, np.flatnonzero(members), *args)
                chains.append(planned)
                prefix = f"{name}/{chain}"
                self.arrays |= pack(f"{prefix}/writer", kernels[0][inner][:, order], planned.writer)
                self.arrays |= pack(f"{prefix}/reader", kernels[1][sorted_][:, written], planned.reader)
                for index, (step, array) in enumerate(zip(steps, step_arrays, strict=True)):
                    array = array[..., order]
                    if planned.means and step.window is not None:
                        phases = mean_phases(step.window, blocks[0])
                        array = np.array([array[np.ix_(r, c)].sum((0, 1)) for p in phases for _, _, r, c in p.taps])
                    self.arrays[f"{prefix}/step{index}"] = array
        if bias != "none":
            self.arrays[f"{name}/bias"] = added
        places = {int(channel): place for place, channel in enumerate(written)}
        operation = Run(
            name=name,
            x=x,
            y=self._new((*out_size, outputs)),
            form="groups",
            inputs=channels,
            in_size=tuple(size),
            out_size=out_size,
            blocks=blocks,
            steps=tuple(steps),
            chains=tuple(chains),
            segments=joined_segments([chain.reader for chain in chains], len(written)),
            output_counts=tuple(int(counts_out[channel]) for channel in written),
            outputs=outputs,
            placement=static_order(np.array([places.get(c, -1) for c in range(outputs)]), len(written)),
            bias=bias,
            activation=activation,
        )

        def reference(x):
            masks = [
                hard_mask(c, k)
                for c, k in zip((counts_in, made, read, counts_out), blocks[:1] * 2 + blocks[1:] * 2, strict=True)
            ]
            y = ACTIVATIONS["relu6"](masked_pointwise(x, kernels[0], blocks[0], *masks[:2]) + shifts[0])
            if taps is not None:
                y = ACTIVATIONS["relu"](window_conv(y, taps, moved, wide) + shifts[1])
            return ACTIVATIONS[activation](masked_pointwise(y, kernels[1], blocks[1], *masks[2:]) + added)

        return self._add(operation, reference)

    def take(self, x: int, indices: tuple[int, ...]) -> int:
        *size, channels = self.shapes[x]
        order = np.array([channels if index < 0 else index for index in indices])
        operation = Take(self._name(), x, self._new((*size, len(indices))), indices)
        return self._add(operation, lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)])[..., order])

    def function(self, function: Callable, *inputs: int) -> Any:
        """Any JAX function of values, as the operations of its trace; what it holds are arrays beside it."""
        traced = trace(
            lambda _, *x: function(*x), {}, *(jax.ShapeDtypeStruct((1, *self.shapes[v]), np.float32) for v in inputs)
        )
        numbers, constants = dict(zip(traced.images, inputs, strict=True)), dict(traced.constants)
        for operation in traced.operations:
            name = self._name()
            if all(value in constants for value in operation.inputs):
                evaluate_operations([operation], constants)
                continue
            given = []
            for index, value in enumerate(operation.inputs):
                if value in constants:
                    self.arrays[f"{name}/arg{index}"] = np.asarray(constants[value])
                given.append(-1 - index if value in constants else numbers[value])
            for value in operation.outputs:
                assert traced.shapes[value][0] == 1, (operation, traced.shapes[value])
                numbers[value] = self._new(traced.shapes[value][1:])
            params = json.dumps(params_to_json(operation.kind, operation.params))
            made = tuple(numbers[value] for value in operation.outputs)
            self.operations.append(Apply(name, operation.kind, tuple(given), made, params))
        outputs = tuple(numbers[value] for value in traced.outputs)
        self.reference_steps.append((inputs, outputs, function))
        return outputs if len(outputs) > 1 else outputs[0]


def _chain(name, members, counts_in, made, read, counts_out, blocks, size) -> tuple[Chain, np.ndarray, tuple]:
    """The chain of some wide channels, their order, and the channels that its writer and its reader read, in order."""
    means = name == "means"
    order = by_count(members, made)
    writer, inner = plan_reading(
        np.arange(len(counts_in)), np.minimum(counts_in, 1) if means else counts_in, made[order], blocks[0]
    )
    counts_out = np.minimum(counts_out, 1) if means else counts_out
    reader, sorted_ = plan_reading(order, read, counts_out, blocks[1])
    return Chain(name, len(order), means, writer, reader), order, (inner, sorted_)


def normalised(network: Network) -> int:
    """The images, as a network's first layer reads them."""
    return network.function(lambda x: (x - 120.0) / 60.0, 0)


# levels, block, tied, window, stride, size
RUNS: list[Any] = [
    (None, 2, False, (3, 3), (1, 1), (8, 8)),
    ((0, 1, 4), 2, True, (3, 3), (2, 2), (8, 8)),
    ((1, 9), 3, True, (5, 5), (1, 1), (12, 9)),
    ((0, 1, 4, 16), 4, True, (3, 3), (2, 2), (8, 16)),
    ((0, 1, 49), 7, True, (3, 3), (2, 2), (14, 14)),
    # Blocks that do not divide the map; a window and strides that differ along the axes; no window.
    ((0, 1, 4), 2, True, (3, 3), (2, 2), (7, 9)),
    (None, 4, False, (3, 3), (1, 1), (10, 6)),
    ((1, 4), 2, True, (1, 3), (1, 2), (8, 8)),
    (None, 3, True, None, (1, 1), (9, 9)),
    ((0, 16), (4, 4), False, (3, 3), (1, 1), (8, 8)),
    (None, (2, 3), False, (3, 3), (2, 2), (12, 12)),
]
