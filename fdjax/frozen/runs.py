"""Runs (a pointwise layer, a depthwise one, and the pointwise layer that reads it), and the exact schedules of one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np

from fdjax.frozen.layers import HostArrays, OpenLayer, places, with_bias
from fdjax.frozen.products import (
    by_count,
    mean_phases,
    pack,
    plan_product,
    plan_reading,
    runs_at_block_resolution,
    static_order,
)
from fdjax.frozen.program import Chain, Run, Step

# With more groups than this, they are too narrow for a chain each to save time.
_MAX_GROUPS = 4
# A number of channels that is a multiple of this fills vector units.
_EVEN = 16
# The schedule with all channels of the space, in which removed channels are zeros.
DENSE = "dense"

# Schedules by name: the operation, and its arrays.
Candidates = Mapping[str, tuple[Run, HostArrays]]


@dataclasses.dataclass(frozen=True)
class RunParts:
    """A run before a schedule is chosen. Channels are the graph's, arrays float64.

    Attributes:
      name: the run's name.
      writer: the layer that makes the space.
      depthwise: the layer that works on it.
      reader: the layer that reads it.
      alive: whether each channel of the space is kept, bool [E].
      kernels: writer [C, E], depthwise [rows, columns, E], reader [E, D].
      biases: writer [E], depthwise [E], reader [D] or [H', W', D].
      counts: kept counts of the writer's input [C] and output [E], and of the reader's input [E] and output [D].
    """

    name: str
    writer: OpenLayer
    depthwise: OpenLayer
    reader: OpenLayer
    alive: np.ndarray
    kernels: tuple[np.ndarray, np.ndarray, np.ndarray]
    biases: tuple[np.ndarray, np.ndarray, np.ndarray]
    counts: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

    @property
    def blocks(self) -> tuple[int, int]:
        """K of the writer and of the reader."""
        return self.writer.block, self.reader.block


def find_run(reader: OpenLayer) -> RunParts | None:
    """Returns the run that ends in a layer, or None."""
    depthwise = reader.source
    if reader.kind != "pointwise" or reader.pooled or depthwise is None or not depthwise.depthwise:
        return None
    writer = depthwise.source
    if writer is None or writer.kind != "pointwise" or writer.pooled or len(writer.size) != 2 or writer.bias.ndim > 1:
        return None
    assert depthwise.window is not None
    if depthwise.bias.ndim > 1 or depthwise.window.dilation != (1, 1):
        return None
    made, read = writer.counts[1], reader.counts[0]
    alive = np.zeros(len(made), bool)
    alive[depthwise.y_order] = True
    return RunParts(
        name=_common_name(writer.name, reader.name),
        writer=writer,
        depthwise=depthwise,
        reader=reader,
        alive=alive & (made > 0) & (read > 0),
        kernels=(writer.kernel, depthwise.kernel[:, :, 0], reader.kernel),
        biases=(writer.bias, depthwise.bias, reader.bias),
        counts=(writer.counts[0], made, read, reader.counts[1]),
    )


def _common_name(writer: str, reader: str) -> str:
    parts = [
        a
        for a, b in itertools.takewhile(lambda p: p[0] == p[1], zip(writer.split("/"), reader.split("/"), strict=False))
    ]
    return "/".join(parts) or f"{writer}..{reader}"


def schedules(run: RunParts) -> Candidates:
    """Makes the exact schedules of a run.

    "bands" computes all channels of the space as one chain, layer by layer; if the masks need no transform, it is
    dense, or has fewer channels. "filled" is like it, but does not leave out removed narrow channels: it multiplies
    them by zero and does not have to gather. "even" is like "filled", and keeps some removed channels of the space as
    zeros, so that their number fills vector units; "dense" keeps all of them. "means" computes the channels that keep
    only the mean in another chain, at block resolution. "groups" has a chain for every kept count, if writer and reader
    keep the same. Schedules that would be equal are left out.

    Args:
      run: the run.

    Returns:
      The operation and its arrays, by the schedule's name.
    """
    _, made, read, _ = run.counts
    window, num_coefs = run.depthwise.window, run.reader.block**2
    assert window is not None
    is_mean = run.alive & (made == 1) & (read == 1)
    # With 1x1 blocks the mean is the pixel, so there is nothing to gain.
    is_mean &= run.blocks[0] > 1 and runs_at_block_resolution(window.in_size, window.out_size, run.blocks)
    candidates = {"bands": build(run, {"bands": run.alive})}
    plan = candidates["bands"][0]
    if not _transforms(plan):
        if plan.placement is not None or any(chain.writer.input_order for chain in plan.chains):
            candidates["filled"] = build(_filled(run), {"bands": run.alive})
        zeros = np.flatnonzero(~run.alive)
        some = min(-int(run.alive.sum()) % _EVEN, len(zeros))
        # If "even" takes all removed channels, it is the dense schedule already.
        fillings = {"even": zeros[:some]} if some == len(zeros) else {"even": zeros[:some], DENSE: zeros}
        for name, filling in fillings.items():
            if len(filling) and run.alive.any():
                filled = _with_zeros(_filled(run), filling)
                candidates[name] = build(filled, {"bands": filled.alive})
    if is_mean.any():
        candidates["means"] = build(run, {"bands": run.alive & ~is_mean, "means": is_mean})
    partial = run.alive & (made < num_coefs) & ~is_mean
    levels = np.unique(made[partial])
    whole = run.alive & (made == num_coefs)
    alike = np.array_equal(made[run.alive], read[run.alive])
    if alike and len(levels) <= _MAX_GROUPS and (len(levels) > 1 or (len(levels) and whole.any())):
        groups = {f"coefs{level}": partial & (made == level) for level in reversed(levels)}
        candidates["groups"] = build(run, {"whole": whole, **groups, "means": is_mean})
    return candidates


def _transforms(plan: Run) -> bool:
    return any(product.transforms for chain in plan.chains for product in (chain.writer, chain.reader))


def _filled(run: RunParts) -> RunParts:
    """The run with zeros in its kernels for removed narrow channels, which are then whole."""
    narrow, made, read, out = run.counts
    writer, depthwise, reader = run.kernels
    counts = (
        np.where(narrow > 0, narrow, run.writer.block**2),
        made,
        read,
        np.where(out > 0, out, run.reader.block**2),
    )
    return dataclasses.replace(
        run, kernels=(writer * (narrow > 0)[:, None], depthwise, reader * (out > 0)), counts=counts
    )


def _with_zeros(run: RunParts, zeros: np.ndarray) -> RunParts:
    """Adds the removed channels with the numbers `zeros` to the run; all their weights are zero."""
    narrow, made, read, out = (counts.copy() for counts in run.counts)
    made[zeros], read[zeros] = run.writer.block**2, run.reader.block**2
    alive = run.alive.copy()
    alive[zeros] = True
    writer, depthwise, reader = run.kernels
    return dataclasses.replace(
        run,
        alive=alive,
        counts=(narrow, made, read, out),
        kernels=(writer * run.alive, depthwise * run.alive, reader * run.alive[:, None]),
        biases=(run.biases[0] * run.alive, run.biases[1] * run.alive, run.biases[2]),
    )


def build(run: RunParts, groups: Mapping[str, np.ndarray]) -> tuple[Run, HostArrays]:
    """Makes a run with one chain for each group of channels.

    Args:
      run: the run.
      groups: the channels of each chain, bool [E], by its name; "means" is computed at block resolution.

    Returns:
      The operation and its arrays.
    """
    arrays: HostArrays = {}
    chains = [_chain(run, name, np.flatnonzero(members), arrays) for name, members in groups.items() if members.any()]
    out_counts, out_order, window = run.counts[3], run.reader.y_order, run.depthwise.window
    assert window is not None
    written = by_count(out_order[out_counts[out_order] > 0], out_counts)
    made = Run(
        name=run.name,
        x=run.writer.x,
        y=run.reader.y,
        form=_form(run, chains),
        inputs=len(run.writer.x_order),
        in_size=window.in_size,
        out_size=window.out_size,
        blocks=run.blocks,
        steps=(
            Step("shift", run.writer.activation),
            Step("depthwise", window=window),
            Step("shift", run.depthwise.activation),
        ),
        chains=tuple(chains),
        segments=_output_segments(chains, len(written)),
        output_counts=tuple(int(out_counts[channel]) for channel in written),
        outputs=len(out_order),
        placement=places(out_order, written),
        bias=with_bias(run.name, run.biases[2][..., out_order], arrays),
        activation=run.reader.activation,
        layers=(run.writer.name, run.reader.name),
    )
    return made, arrays


def _form(run: RunParts, chains: list[Chain]) -> str:
    if len(chains) > 1 or any(chain.means for chain in chains):
        return "groups"
    products = [product for chain in chains for product in (chain.writer, chain.reader)]
    if any(product.transforms for product in products):
        return "bands"
    complete = [*run.kernels[0].shape, *run.kernels[2].shape]
    return "dense" if [n for p in products for n in (p.inputs, p.outputs)] == complete else "channels"


def _chain(run: RunParts, name: str, channels: np.ndarray, arrays: HostArrays) -> Chain:
    """Plans one chain and adds its arrays."""
    means = name == "means"
    narrow_counts, made, read, out_counts = run.counts
    # Channels are sorted by the writer's counts. Among those with the highest, the ones that the reader reads most of
    # come last, beside such channels among the others, so that the channels that it reads whole are contiguous.
    most = made[channels].max(initial=0)
    wide = channels[np.lexsort((np.where(made[channels] == most, read[channels], -read[channels]), -made[channels]))]
    writer_kernel, depthwise_kernel, reader_kernel = run.kernels
    prefix = f"{run.name}/{name}"
    inputs = np.minimum(narrow_counts, 1) if means else narrow_counts
    writer, narrow = plan_reading(run.writer.x_order, inputs, made[wide], run.blocks[0], run.writer.num_blocks)
    arrays |= pack(f"{prefix}/writer", writer_kernel[narrow][:, wide], writer)
    order = np.argsort(-read[wide], kind="stable")
    out_order = run.reader.y_order
    outputs = by_count(out_order[out_counts[out_order] > 0], out_counts)
    out = np.minimum(out_counts, 1) if means else out_counts
    here, blocks = static_order(order, len(wide)), run.reader.num_blocks
    reader = plan_product(read[wide][order], out[outputs], run.blocks[1], here, blocks)
    kernel, window = depthwise_kernel[..., wide], run.depthwise.window
    if means:
        assert window is not None
        phases = mean_phases(window, run.blocks[0])
        kernel = np.array([kernel[np.ix_(r, c)].sum(axis=(0, 1)) for phase in phases for _, _, r, c in phase.taps])
    arrays[f"{prefix}/step0"] = run.biases[0][wide]
    arrays[f"{prefix}/step1"] = kernel
    arrays[f"{prefix}/step2"] = run.biases[1][wide]
    arrays |= pack(f"{prefix}/reader", reader_kernel[wide[order]][:, outputs], reader)
    return Chain(name, len(wide), means, writer, reader)


def _output_segments(chains: list[Chain], outputs: int) -> tuple[tuple[int, int, int], ...]:
    """Returns (start, stop, coefficients) of the outputs that the readers of all chains make together."""
    counts, edges = np.zeros(outputs, np.int64), {0, outputs}
    for chain in chains:
        for start, stop, count in chain.reader.output_segments:
            counts[start:stop] = np.maximum(counts[start:stop], count)
            edges |= {start, stop}
    cuts = sorted(edges)
    return tuple((start, stop, int(counts[start])) for start, stop in itertools.pairwise(cuts))
