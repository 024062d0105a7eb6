"""Writes the runs of a frozen network: writer, depthwise step and reader in one pass, chain by chain."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from fdjax.errors import UserError
from fdjax.frozen.native import parts
from fdjax.frozen.native.calls import Calls
from fdjax.frozen.native.emit_layers import POINT
from fdjax.frozen.native.results import Results
from fdjax.frozen.native.source import PANEL, RANGE_OF, Raw, Source, cpp, round8
from fdjax.frozen.native.statements import Arrays, analysed, clamp
from fdjax.frozen.native.structs import NOTHING, Pixels, Reader, Writer
from fdjax.frozen.products import MeanPhase, Size, mean_phases
from fdjax.frozen.program import Chain, Run

# The number of blocks, of several images, that a chain of means computes together.
_BLOCKS = 64


@dataclasses.dataclass(frozen=True)
class Means:
    """The struct of the same name in `chains.h`, field by field."""

    writer: Writer
    reader: Reader
    blocks: int
    out_blocks: int
    at_once: int
    taps: int
    range: Raw
    where: Raw
    make: Raw


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The places of a run's channelwise steps: the shift before the depthwise step, that step, the shift after it."""

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
    """Adds a run.

    Args:
      source, calls: what is added to.
      run: the run.
      arrays: the network's arrays, by name.
      added: the value that is added to the run's output, or None.
    """
    _RunEmitter(source, calls, run, arrays, added).emit()


class _RunEmitter:
    """Writes the statements of one run."""

    def __init__(self, source: Source, calls: Calls, run: Run, arrays: Arrays, added: int | None):
        self.source, self.calls, self.run, self.arrays = source, calls, run, arrays
        self.steps, self.added = _steps(run), added
        self.window = run.depthwise or dataclasses.replace(POINT, in_size=run.in_size, out_size=run.out_size)

    def emit(self) -> None:
        run, calls, source = self.run, self.calls, self.source
        y, pixels = calls.result(run.y), math.prod(run.out_size)
        bias = self.arrays[f"{run.name}/bias"] if run.bias != "none" else np.zeros(run.outputs, np.float32)
        chains = [chain for chain in run.chains if chain.channels]
        x, coefs = calls.value(run.x), ""
        writers = [chain.writer for chain in chains if chain.means or chain.writer.transforms]
        if writers:
            needed = parts.needed_coefs(writers, run.inputs, run.blocks[0] ** 2)
            coefs = analysed(source, calls, x, run.in_size, run.inputs, run.blocks[0], needed)
        results = Results(source, calls, run, run.out_size, run.blocks[1], [chain.reader for chain in chains])
        fused = bool(chains) and not chains[0].means and not chains[0].reader.transforms
        begins = results.begin(bias, None if self.added is None else calls.value(self.added), fused=fused)
        for chain in chains:
            kind = "chain_of_means" if chain.means else "chain"
            if chain.means:
                part, to = self._means(chain, results)
            else:
                part, to = self._chain(chain, results, y, begins, only=len(chains) == 1)
                begins = NOTHING
            reads = coefs if chain.means or chain.writer.transforms else x
            calls.add(f"{kind}({part}, {reads}, {{w}}, scratch, {to}, n, ahead);")
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

    def _chain(self, chain: Chain, results: Results, y: str, begins: Raw | int, *, only: bool) -> tuple[str, str]:
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
        reader = dataclasses.replace(reader, bias=begins)
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
        blocks, out_blocks = math.prod(size), math.prod(out)
        at_once = max(1, _BLOCKS // blocks)
        order = parts.order_of(chain.writer)
        pixels = Pixels(block * block * blocks * pitch, size[1] * pitch, pitch, order.tolist())
        bias, activation = self._step(chain, self.steps.before, zeros), self._activation(self.steps.before)
        writer = parts.on_pixels(source, size, pixels, self._kernel(chain, "writer"), bias, activation)
        kernel = results.columns(self._kernel(chain, "reader"))
        rows = np.zeros((chain.channels, kernel.shape[1]), np.float32)
        rows[parts.order_of(chain.reader)] = kernel
        reader = parts.to_map(source, rows, writer.panel, results.image)
        more = taps, self._step(chain, self.steps.after, zeros)
        reads = sorted(set(offsets))
        means = Means(
            parts.with_weights(source, writer, more, reader.rows, reader.panel), reader, blocks, out_blocks, at_once,
            len(offsets), RANGE_OF[self._activation(self.steps.after)],
            source.table(_where(size, out, stride, reads)),
            Raw(f"means_of_blocks<{_phases(source, phases, reads)}>"),
        )  # fmt: skip
        source.needs(PANEL * at_once * (blocks + 1 + out_blocks))
        return source.constant(means, f"{run.name}/{chain.name}"), results.coefs


def _phases(source: Source, phases: Sequence[MeanPhase], reads: Sequence[Size]) -> str:
    """Declares the phases of a chain of means, which read blocks at the offsets `reads`; returns the struct's name."""
    at, begins, shares = list[int](), list[bool](), list[float]()
    for phase in phases:
        last = len(phase.taps) - 1
        at += [reads.index(tap[:2]) for tap in phase.taps]
        begins += [number == 0 for number in range(len(phase.taps))]
        shares += [phase.weight if number == last else 0.0 for number in range(len(phase.taps))]
    return source.struct(
        f"  static constexpr int reads = {len(reads)}, taps = {len(at)}, at[] = {cpp(at)};\n"
        f"  static constexpr bool begins[] = {cpp(begins)};\n  static constexpr float share[] = {cpp(shares)};\n"
    )


def _where(size: Size, out: Size, stride: Size, reads: Sequence[Size]) -> list[int]:
    """Returns for every output block the places of the blocks that it reads, in floats of its panel.

    Blocks outside the map are at the end of the panel, where there is a block of zeros.
    """
    found = []
    for row, column in itertools.product(range(out[0]), range(out[1])):
        for down, across in reads:
            i, j = row * stride[0] + down, column * stride[1] + across
            inside = 0 <= i < size[0] and 0 <= j < size[1]
            found.append(PANEL * (i * size[1] + j if inside else math.prod(size)))
    return found
