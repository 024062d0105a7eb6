"""Runs of a frozen network: writer, depthwise step and reader in one pass, chain by chain."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from fdjax.errors import UserError
from fdjax.frozen.native import parts
from fdjax.frozen.native.calls import Calls
from fdjax.frozen.native.emit_layers import POINT, Arrays, Results, add_bias, analysed, clamp
from fdjax.frozen.native.parts import Pixels, Reader, Writer
from fdjax.frozen.native.source import PANEL, RANGES, Raw, Source, padded, round8
from fdjax.frozen.products import mean_phases
from fdjax.frozen.program import Chain, Run


@dataclasses.dataclass(frozen=True)
class Means:
    """The struct of the same name in `runs.h`, field by field."""

    writer: Writer
    reader: Reader
    out_height: int
    out_width: int
    rows: int
    pitch: int
    top: int
    left: int
    stride_rows: int
    stride_columns: int
    phases: int
    range: tuple[float, float]
    taps: int
    bias: int
    ends: Raw
    tap_rows: Raw
    tap_columns: Raw
    shares: Raw


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Which of a run's channelwise steps are the shift before the depthwise step, that step, and the shift after."""

    before: int | None
    depthwise: int | None
    after: int | None


def _steps(run: Run) -> _Steps:
    kinds = [step.kind for step in run.steps]
    at = kinds.index("depthwise") if "depthwise" in kinds else len(kinds)
    if at > 1 or len(kinds) - at > 2 or "depthwise" in kinds[at + 1 :]:
        raise UserError(
            f"the run {run.name} has the steps {', '.join(kinds)}; native code has a kernel for shift, depthwise, "
            "shift: use another engine for this network"
        )
    last = len(kinds) - 1
    return _Steps(0 if at == 1 else None, at if at < len(kinds) else None, last if at < last else None)


def emit_run(source: Source, calls: Calls, run: Run, arrays: Arrays, added: int | None) -> None:
    """A run; `added` is the value that is added to it, if any."""
    _RunEmitter(source, calls, run, arrays, added).emit()


class _RunEmitter:
    """The calls of one run."""

    def __init__(self, source: Source, calls: Calls, run: Run, arrays: Arrays, added: int | None):
        self.source, self.calls, self.run, self.arrays = source, calls, run, arrays
        self.steps, self.added = _steps(run), added
        self.window = run.depthwise or dataclasses.replace(POINT, in_size=run.in_size, out_size=run.out_size)

    def emit(self) -> None:
        run, calls, source = self.run, self.calls, self.source
        y, pixels = calls.result(run.y), math.prod(run.out_size)
        bias = self.arrays[f"{run.name}/bias"] if run.bias != "none" else np.zeros(run.outputs, np.float32)
        add_bias(source, calls, pixels, bias, None if self.added is None else calls.value(self.added), y)
        chains = [chain for chain in run.chains if chain.channels]
        x, coefs = calls.value(run.x), ""
        writers = [chain.writer for chain in chains if chain.means or chain.writer.transforms]
        if writers:
            needed = parts.needed_coefs(writers, run.inputs, run.blocks[0] ** 2)
            coefs = analysed(source, calls, x, run.in_size, run.inputs, run.blocks[0], needed)
        results = Results(source, calls, run, run.out_size, run.blocks[1], [chain.reader for chain in chains])
        for chain in chains:
            kind = "chain_of_means" if chain.means else "chain"
            made = self._means(chain, results) if chain.means else self._chain(chain, results, y, len(chains) == 1)
            part, to = made
            reads = coefs if chain.means or chain.writer.transforms else x
            calls.add(f"{kind}({part}, {reads}, {{w}}, scratch, {to}, n);")
        results.finish(y)
        if not results.image and len(chains) != 1:
            clamp(calls, pixels, run.outputs, run.activation, y)

    def _step(self, chain: Chain, index: int | None, default: np.ndarray) -> np.ndarray:
        return default if index is None else self.arrays[f"{self.run.name}/{chain.name}/step{index}"]

    def _activation(self, index: int | None) -> str:
        return "none" if index is None else self.run.steps[index].activation

    def _kernel(self, chain: Chain, side: str) -> np.ndarray:
        plan = chain.writer if side == "writer" else chain.reader
        return parts.kernel_of(self.arrays, f"{self.run.name}/{chain.name}/{side}", plan)

    def _chain(self, chain: Chain, results: Results, y: str, only: bool) -> tuple[str, str]:
        run, source, zeros = self.run, self.source, np.zeros(chain.channels, np.float32)
        bias, before = self._step(chain, self.steps.before, zeros), self._activation(self.steps.before)
        kernel = self._kernel(chain, "writer")
        if chain.writer.transforms:
            args = source, run.in_size, run.blocks[0], run.inputs, chain.writer, kernel, bias, before
            writer = parts.by_bands(*args)
        else:
            writer = parts.on_map(source, run.in_size, run.inputs, chain.writer, kernel, bias, before)
        taps = self._step(chain, self.steps.depthwise, np.ones((1, 1, chain.channels), np.float32))
        kernel = self._kernel(chain, "reader")
        reader, to = results.reader(chain.reader, kernel, chain.channels, writer.panel, y, only=only)
        after = self._step(chain, self.steps.after, zeros), self._activation(self.steps.after)
        made = parts.chain_of(source, writer, self.window, taps, *after, reader)
        return source.constant(made, f"{run.name}/{chain.name}"), to

    def _means(self, chain: Chain, results: Results) -> tuple[str, str]:
        run, source, block = self.run, self.source, self.run.blocks[0]
        zeros, pitch = np.zeros(chain.channels, np.float32), round8(run.inputs)
        size, out = ((height // block, width // block) for height, width in (run.in_size, run.out_size))
        phases, stride = mean_phases(self.window, block), self.window.stride
        offsets = [tap[:2] for phase in phases for tap in phase.taps]
        taps = self._step(chain, self.steps.depthwise, np.ones((len(offsets), chain.channels), np.float32))
        before = [max(0, -min(offset[axis] for offset in offsets)) for axis in (0, 1)]
        reach = [max(offset[axis] for offset in offsets) + stride[axis] * (out[axis] - 1) + 1 for axis in (0, 1)]
        rows, columns = (before[axis] + max(size[axis], reach[axis]) for axis in (0, 1))
        order, num_coefs = parts.order_of(chain.writer), block * block
        pixels = Pixels(num_coefs * math.prod(size) * pitch, size[1] * pitch, pitch, order.tolist())
        bias, activation = self._step(chain, self.steps.before, zeros), self._activation(self.steps.before)
        kernel = self._kernel(chain, "writer")
        writer = parts.on_pixels(source, size, pixels, kernel, bias, activation)
        rows_of = np.zeros((chain.channels, chain.reader.outputs), np.float32)
        rows_of[parts.order_of(chain.reader)] = self._kernel(chain, "reader")
        ints = np.cumsum([len(phase.taps) for phase in phases]), [o[0] for o in offsets], [o[1] for o in offsets]
        means = Means(
            writer, parts.to_map(source, rows_of, writer.panel, results.image), out[0], out[1], rows, columns,
            before[0], before[1], stride[0], stride[1], len(phases), RANGES[self._activation(self.steps.after)],
            source.weight(padded(taps)), source.weight(padded(self._step(chain, self.steps.after, zeros))),
            source.table(ints[0]), source.table(ints[1]), source.table(ints[2]),
            source.table([phase.weight for phase in phases], "float"),
        )  # fmt: skip
        source.needs(PANEL * (rows * columns + math.prod(out)))
        return source.constant(means, f"{run.name}/{chain.name}"), results.coefs
