"""From trained variables and hard masks to the arrays and plans of a frozen network.

Batch norm goes into kernels and biases. Channels whose value does not depend on the image are removed: on the narrow
side (the map that runs from block to block) a channel that nothing writes or nothing reads, on the wide side one that
the expand layer does not produce or the project layer does not read. What a removed channel leaves behind is folded
into the bias that follows, as a map where it differs at the borders. Channels are sorted by kept count, and the order
is folded into the kernels on both sides of a map wherever its readers agree.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from fdjax.frozen.kernels import pack
from fdjax.frozen.octave import fold_octave, is_octave
from fdjax.frozen.parameters import Parameters, Variables
from fdjax.frozen.plan import (
    BlockPlan,
    ChainPlan,
    HeadPlan,
    NetworkPlan,
    StemPlan,
    UnitPlan,
    by_count,
    conv_pads,
    mean_phases,
    plan_product,
    plan_reading,
    runs_at_block_resolution,
    static_order,
    taps_on_the_map,
)
from fdjax.frozen.residual import fold_residual
from fdjax.ops.blocks import num_blocks
from fdjax.ops.dct import dct_basis
from fdjax.spec import Counts, LayerSpec, NetworkSpec, blocks, effective_counts, tied_mask, units

# Beyond so many, groups are too narrow to be worth a chain each.
_MAX_GROUPS = 4

HostArrays = dict[str, np.ndarray]
Candidates = Mapping[str, tuple[BlockPlan, HostArrays]]
Choose = Callable[[Candidates], str]


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A frozen network: its plan, and its float32 arrays by name (`fdjax.frozen.kernels` says which)."""

    plan: NetworkPlan
    arrays: HostArrays


def fewest_macs(candidates: Candidates) -> str:
    """The name of the candidate with the fewest multiply-accumulates; the first of equals."""
    return min(candidates, key=lambda name: candidates[name][0].macs())


def freeze(spec: NetworkSpec, variables: Variables, counts: Counts, choose: Choose = fewest_macs) -> Frozen:
    """Compiles hard masks into a dense network.

    Args:
      spec: the network.
      variables: the collections `params` and `batch_stats`, nested dicts of arrays.
      counts: path of every FCMask -> kept counts, as they are after the gate.
      choose: picks among the exact forms of each block, by their names.

    Returns:
      The network, equal to the masked one up to rounding.

    Raises:
      ValueError: variables or counts that are not the spec's.
    """
    network = _Network(spec, variables, counts)
    arrays: HostArrays = {**network.stem_arrays()}
    plans = []
    for candidates in network.candidates():
        plan, own = candidates[choose(candidates)]
        plans.append(plan)
        arrays |= own
    head, own = network.head()
    arrays |= own
    plan = NetworkPlan(spec.input_shape, spec.num_classes, network.stem_plan(), tuple(plans), head)
    return Frozen(plan, {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()})


@dataclasses.dataclass
class _Stream:
    """The narrow map between blocks that change it for another, with what each writes and reads of its channels.

    Attributes:
      width: channels before any is removed.
      varies: [width], whether some block writes something that depends on the image.
      read: [width], whether some block reads it.
      reader_counts: the kept counts of the first reader that does not keep as much of all channels.
    """

    width: int
    varies: np.ndarray
    read: np.ndarray
    reader_counts: np.ndarray | None = None

    def reads(self, counts: np.ndarray) -> None:
        self.read |= counts > 0
        if self.reader_counts is None and len(np.unique(counts)) > 1:
            self.reader_counts = counts

    def order(self) -> np.ndarray:
        """The channels that remain, in the order of the frozen network."""
        alive = np.flatnonzero(self.varies & self.read)
        if self.reader_counts is None:
            return alive
        return alive[np.argsort(-self.reader_counts[alive], kind="stable")]


@dataclasses.dataclass(frozen=True)
class UnitParts:
    """An inverted residual block, folded, before a form is chosen. Channels are the spec's, biases float64.

    Attributes:
      name: of the unit.
      expand: its spec, or None.
      depthwise: its spec.
      project: its spec.
      padding: of the depthwise layer.
      tied: its wide channels share one FCMask.
      stream: the channels of the input map, in the order they lie.
      narrow_counts: [C] kept by the expand layer's input side.
      wide_counts: ([E], [E]) kept by the expand layer's output side and the project layer's input side.
      out_counts: [D] kept by the project layer's output side.
      out_stream: the channels of the output map, in order.
      alive: [E], the wide channels that depend on the image.
      kernels: expand [C, E] or None, depthwise [window, window, E], project [E, D].
      biases: expand [E] (constant inputs included), depthwise [E], and project [D] or [H', W', D].
      residual: the input is added.
      linear: no activation follows the project layer.
    """

    name: str
    expand: LayerSpec | None
    depthwise: LayerSpec
    project: LayerSpec
    padding: str
    tied: bool
    stream: np.ndarray
    narrow_counts: np.ndarray
    wide_counts: tuple[np.ndarray, np.ndarray]
    out_counts: np.ndarray
    out_stream: np.ndarray
    alive: np.ndarray
    kernels: tuple[np.ndarray | None, np.ndarray, np.ndarray]
    biases: tuple[np.ndarray, np.ndarray, np.ndarray]
    residual: bool
    linear: bool

    @property
    def blocks(self) -> tuple[int, int]:
        """K of the expand and of the project layer; without an expand layer the project layer's twice."""
        assert self.project.block is not None
        return (self.expand.block if self.expand and self.expand.block else self.project.block), self.project.block


class _Network:
    """The spec's layers with their masks, folded one after the other."""

    def __init__(self, spec: NetworkSpec, variables: Variables, counts: Counts):
        self.spec, self._parameters = spec, Parameters(variables, spec.batch_norm_epsilon)
        for path, (channels, num_coefs) in spec.mask_sizes.items():
            given = np.asarray(counts[path]) if path in counts else None
            if given is None or given.shape != (channels,) or given.min() < 0 or given.max() > num_coefs:
                raise ValueError(f"counts of {path} must be {channels} integers from 0 to {num_coefs}")
        self._counts = {path: np.asarray(counts[path], np.int64) for path in spec.mask_sizes}
        self._layers = {layer.name: layer for layer in spec.layers}
        self._streams, self._constant = self._follow_streams(), np.zeros(0)

    def _in(self, layer: LayerSpec) -> np.ndarray:
        return layer.input_counts(self._counts)

    def _out(self, layer: LayerSpec) -> np.ndarray:
        return layer.output_counts(self._counts)

    def _follow_streams(self) -> list[_Stream]:
        """The streams of the network, in order; a block with a residual goes on with its own.

        In a ResNet and in an octave network there is one, of which all remains.
        """
        width = self._layers["stem"].out_channels
        if not units(self.spec):
            return [_Stream(width, np.ones(width, bool), np.ones(width, bool))]
        streams = [_Stream(width, np.ones(width, bool), np.zeros(width, bool))]
        for roles in units(self.spec).values():
            streams[-1].reads(self._in(roles["expand" if "expand" in roles else "project"]))
            written = self._out(roles["project"]) > 0
            if self._is_residual(roles):
                streams[-1].varies |= written
            else:
                streams.append(_Stream(len(written), written, np.zeros(len(written), bool)))
        head = self._layers.get("head")
        streams[-1].reads(self._in(head) if head else np.ones(streams[-1].width, np.int64))
        return streams

    def _is_residual(self, roles: Mapping[str, LayerSpec]) -> bool:
        first = roles.get("expand", roles["depthwise"])
        same_shape = roles["depthwise"].stride == 1 and first.in_channels == roles["project"].out_channels
        return self.spec.linear_bottlenecks and same_shape

    def stem_plan(self) -> StemPlan:
        layer = self._layers["stem"]
        pads = [conv_pads(length, layer.stride, layer.window, self.spec.padding) for length in layer.in_size]
        pool_pads = None
        if self.spec.stem_pool:
            pool = [conv_pads(length, 2, 3, self.spec.padding) for length in layer.out_size]
            pool_pads = (pool[0], pool[1])
        # MobileNets have depthwise layers and ReLU6, ResNets have neither.
        relu6 = any(layer.kind == "depthwise" for layer in self.spec.layers)
        return StemPlan(layer.window, layer.stride, (pads[0], pads[1]), layer.out_size, relu6, pool_pads)

    def stem_arrays(self) -> HostArrays:
        slope, shift = self._parameters.batch_norm("stem_norm")
        channels = self.spec.input_shape[2]
        mean = np.asarray(self.spec.input_mean or [0.0] * channels)
        std = np.asarray(self.spec.input_std or [1.0] * channels)
        kernel = self._parameters.at("stem/kernel") * slope / std[:, None]
        order = self._streams[0].order()
        return {"stem/mean": mean, "stem/kernel": kernel[..., order], "stem/bias": shift[order]}

    def candidates(self) -> Iterator[Candidates]:
        """The exact forms of each block by name, in order."""
        if units(self.spec):
            yield from map(unit_candidates, self.units())
            return
        sides = effective_counts(self.spec, self._counts)
        for name, roles in blocks(self.spec).items():
            if is_octave(roles):
                plan, arrays = fold_octave(name, roles, self._parameters, self.spec.padding)
            else:
                plan, arrays = fold_residual(name, roles, self._parameters, sides, self.spec.padding)
            yield {plan.form: (plan, arrays)}

    def units(self) -> Iterator[UnitParts]:
        """The inverted residual blocks in order; what their removed input channels leave is followed on the way."""
        streams = iter(self._streams)
        stream = next(streams)
        self._constant = np.zeros(stream.width)
        for name, roles in units(self.spec).items():
            residual = self._is_residual(roles)
            out_stream = stream if residual else next(streams)
            yield self._unit(name, roles, stream, out_stream, residual)
            _, shift = self._parameters.batch_norm(f"{name}/project_norm")
            shift = shift if self.spec.linear_bottlenecks else np.clip(shift, 0, 6)
            self._constant = self._constant + shift if residual else shift
            stream = out_stream

    def _unit(
        self, name: str, roles: Mapping[str, LayerSpec], stream: _Stream, out_stream: _Stream, residual: bool
    ) -> UnitParts:
        expand, depthwise, project = roles.get("expand"), roles["depthwise"], roles["project"]
        slope, shift = self._parameters.batch_norm(f"{name}/depthwise_norm")
        depthwise_kernel, depthwise_bias = self._parameters.at(f"{name}/depthwise") * slope, shift
        slope, project_bias = self._parameters.batch_norm(f"{name}/project_norm")
        project_kernel = self._parameters.at(f"{name}/project/kernel") * slope
        read, out_counts = self._in(project), self._out(project)
        constant_inputs = np.where(stream.varies, 0.0, self._constant)
        if expand is None:
            narrow_counts, made = read, np.where(stream.varies, project.num_coefs, 0)
            expand_kernel, expand_bias = None, constant_inputs
        else:
            narrow_counts, made = self._in(expand), self._out(expand)
            slope, shift = self._parameters.batch_norm(f"{name}/expand_norm")
            expand_kernel = self._parameters.at(f"{name}/expand/kernel") * slope
            # A constant has only its mean, which every channel keeps that keeps anything.
            left = (constant_inputs * (narrow_counts > 0)) @ expand_kernel
            expand_bias = shift + left * (made > 0)
        removed = np.flatnonzero((made == 0) & (read > 0))
        if len(removed):
            # Constant before the depthwise layer, and after it but for what its padding does to the borders.
            values = np.clip(expand_bias[removed], 0, 6)
            wide = _depthwise_of_constant(values, depthwise_kernel[..., removed], depthwise, self.spec.padding)
            wide = np.clip(wide + depthwise_bias[removed], 0, 6)
            left = _masked_pointwise(wide, project_kernel[removed], project, read[removed], out_counts)
            project_bias = left + project_bias if np.ptp(left, axis=(0, 1)).any() else left[0, 0] + project_bias
        return UnitParts(
            name=name,
            expand=expand,
            depthwise=depthwise,
            project=project,
            padding=self.spec.padding,
            tied=tied_mask(roles) is not None,
            stream=stream.order(),
            narrow_counts=narrow_counts,
            wide_counts=(made, read),
            out_counts=out_counts,
            out_stream=out_stream.order(),
            alive=(made > 0) & (read > 0),
            kernels=(expand_kernel, depthwise_kernel, project_kernel),
            biases=(expand_bias, depthwise_bias, project_bias),
            residual=residual,
            linear=self.spec.linear_bottlenecks,
        )

    def head(self) -> tuple[HeadPlan | None, HostArrays]:
        """The head, if there is one, and the classifier; call it after `candidates`."""
        layer, stream = self._layers.get("head"), self._streams[-1]
        classifier, classifier_bias = (self._parameters.at(f"classifier/{name}") for name in ("kernel", "bias"))
        if layer is None:
            # In a ResNet the stream is the stem's, and nothing of it is removed.
            order = stream.order() if units(self.spec) else np.arange(len(classifier))
            removed = np.setdiff1d(np.arange(len(classifier)), order)
            bias = classifier_bias + self._constant[removed] @ classifier[removed] if len(removed) else classifier_bias
            return None, {"classifier/kernel": classifier[order], "classifier/bias": bias}
        slope, shift = self._parameters.batch_norm("head_norm")
        kernel = self._parameters.at("head/kernel") * slope
        if layer.block is None:
            # Not wrapped: as one of 1x1 blocks that keep everything.
            product = plan_product(*(np.ones(length, np.int64) for length in kernel.shape), block=1)
            arrays = {**pack("head", kernel, product), "head/bias": shift}
            arrays |= {"classifier/kernel": classifier, "classifier/bias": classifier_bias}
            return HeadPlan("dense", layer.in_channels, layer.in_size, 1, product), arrays
        inputs, outputs = self._in(layer), self._out(layer)
        constant_inputs = np.where(stream.varies, 0.0, self._constant) * (inputs > 0)
        bias = shift + (constant_inputs @ kernel) * (outputs > 0)
        removed = outputs == 0
        made = by_count(np.flatnonzero(~removed), outputs)
        product, read = plan_reading(stream.order(), inputs, outputs[made], layer.block)
        arrays = {
            **pack("head", kernel[read][:, made], product),
            "head/bias": bias[made],
            "classifier/kernel": classifier[made],
            "classifier/bias": classifier_bias + np.clip(bias[removed], 0, 6) @ classifier[removed],
        }
        plain = len(made) == layer.out_channels and len(read) == layer.in_channels
        form = "dense" if plain else "channels"
        if product.transforms:
            only_outputs = all(segment[2] <= 1 for segment in product.output_segments) and product.whole[1] > 0
            form = "groups" if only_outputs and len(np.unique(inputs[read])) == 1 else "bands"
        return HeadPlan(form, len(stream.order()), layer.in_size, layer.block, product), arrays


def _depthwise_of_constant(values: np.ndarray, kernel: np.ndarray, layer: LayerSpec, padding: str) -> np.ndarray:
    """The depthwise layer on maps of constant `values` [C]: [H', W', C]; only the taps on the map count."""
    rows, columns = taps_on_the_map(layer.in_size, layer.out_size, layer.stride, layer.window, padding)
    return np.einsum("ri,sj,ijc->rsc", rows, columns, kernel, optimize=True) * values


def _masked_pointwise(
    x: np.ndarray, kernel: np.ndarray, layer: LayerSpec, input_counts: np.ndarray, output_counts: np.ndarray
) -> np.ndarray:
    """`fdjax.ops.masked_pointwise` with hard masks, on one map, in float64."""
    block, (height, width) = layer.block, layer.in_size
    assert block is not None
    rows, columns = num_blocks(height, block), num_blocks(width, block)
    padded = np.pad(x, ((0, rows * block - height), (0, columns * block - width), (0, 0)), mode="edge")
    blocks = padded.reshape(rows, block, columns, block, -1)
    basis, bands = dct_basis(block, np.float64), np.arange(block**2)[:, None]
    coefs = np.einsum("rasbc,nab->nrsc", blocks, basis, optimize=True)
    coefs *= (bands < input_counts)[:, None, None]
    coefs = (coefs @ kernel) * (bands < output_counts)[:, None, None]
    blocks = np.einsum("nrsc,nab->rasbc", coefs, basis, optimize=True)
    return blocks.reshape(rows * block, columns * block, -1)[:height, :width]


# The forms of a block

# Channels of which vector units take whole numbers at once.
_EVEN = 16


def unit_candidates(unit: UnitParts) -> Candidates:
    """The exact forms of a block by name.

    "bands" runs all wide channels as one chain, layer by layer (dense, or with fewer channels, where the masks need no
    transform). "filled" does so without leaving out removed narrow channels: it multiplies them by zero, and gathers
    nothing. "even" is like it, and has some removed wide channels, as zeros, to make their number one that vector units
    like. "means" takes the channels that keep only the mean out of the chain, if they can run at block resolution.
    "groups" does so with every kept count, for tied masks. Those that would come to the same are left out.
    """
    made, read = unit.wide_counts
    sizes = unit.depthwise.in_size, unit.depthwise.out_size
    is_mean = unit.alive & (made == 1) & (read == 1)
    # With 1x1 blocks the mean is the pixel.
    low_resolution = unit.expand is not None and unit.blocks[0] > 1 and runs_at_block_resolution(*sizes, unit.blocks)
    is_mean &= low_resolution
    candidates: Candidates = {"bands": _build(unit, {"bands": unit.alive})}
    plan = candidates["bands"][0]
    if not _transforms(plan):
        if _gathers(plan):
            candidates["filled"] = _build(_filled(unit), {"bands": unit.alive})
        even = _evened(_filled(unit))
        if even is not None:
            candidates["even"] = _build(even, {"bands": even.alive})
    if is_mean.any():
        candidates["means"] = _build(unit, {"bands": unit.alive & ~is_mean, "means": is_mean})
    partial = unit.alive & (made < unit.project.num_coefs) & ~is_mean
    levels = np.unique(made[partial])
    whole = unit.alive & (made == unit.project.num_coefs)
    if unit.tied and len(levels) <= _MAX_GROUPS and (len(levels) > 1 or (len(levels) and whole.any())):
        groups = {f"coefs{level}": partial & (made == level) for level in reversed(levels)}
        candidates["groups"] = _build(unit, {"whole": whole, **groups, "means": is_mean})
    return candidates


def _transforms(plan: UnitPlan) -> bool:
    """Whether a block transforms anything."""
    products = [p for chain in plan.chains for p in (chain.expand, chain.project) if p is not None]
    return any(product.transforms for product in products)


def _gathers(plan: UnitPlan) -> bool:
    """Whether a block picks channels of its narrow input, or places those of its output."""
    return plan.placement is not None or any(c.expand is not None and c.expand.input_order for c in plan.chains)


def _filled(unit: UnitParts) -> UnitParts:
    """The block with zeros in its kernels for removed narrow channels, which are then whole."""
    expand, depthwise, project = unit.kernels
    num_coefs = unit.project.num_coefs
    narrow, out = unit.narrow_counts, unit.out_counts
    if expand is not None and unit.expand is not None:
        expand = expand * (narrow > 0)[:, None]
        narrow = np.where(narrow > 0, narrow, unit.expand.num_coefs)
    kernels = expand, depthwise, project * (out > 0)
    return dataclasses.replace(
        unit, kernels=kernels, narrow_counts=narrow, out_counts=np.where(out > 0, out, num_coefs)
    )


def _evened(unit: UnitParts) -> UnitParts | None:
    """The block with as many removed wide channels, all zero, as make the number of wide channels a multiple.

    None where it is one, or nothing is left to make it one.
    """
    expand, depthwise, project = unit.kernels
    # Without an expand layer the wide channels are the input map's.
    at_hand = ~unit.alive if expand is not None else ~unit.alive & np.isin(np.arange(len(unit.alive)), unit.stream)
    zeros = np.flatnonzero(at_hand)[: -int(unit.alive.sum()) % _EVEN]
    if not len(zeros) or not unit.alive.any():
        return None
    made, read = (counts.copy() for counts in unit.wide_counts)
    made[zeros] = unit.expand.num_coefs if unit.expand else unit.project.num_coefs
    read[zeros] = unit.project.num_coefs
    alive = unit.alive.copy()
    alive[zeros] = True
    return dataclasses.replace(
        unit,
        alive=alive,
        wide_counts=(made, read),
        kernels=(None if expand is None else expand * unit.alive, depthwise * unit.alive, project),
        biases=(unit.biases[0] * unit.alive, unit.biases[1] * unit.alive, unit.biases[2]),
    )


def _build(unit: UnitParts, groups: Mapping[str, np.ndarray]) -> tuple[UnitPlan, HostArrays]:
    """A block as one chain for each group of wide channels [E] (bool); "means" runs at block resolution."""
    arrays: HostArrays = {}
    chains = [_chain(unit, name, np.flatnonzero(members), arrays) for name, members in groups.items() if members.any()]
    written = by_count(unit.out_stream[unit.out_counts[unit.out_stream] > 0], unit.out_counts)
    places = {int(channel): place for place, channel in enumerate(written)}
    placement = np.array([places.get(int(channel), -1) for channel in unit.out_stream], np.int64)
    bias = unit.biases[2][..., unit.out_stream]
    plan = UnitPlan(
        name=unit.name,
        form=_form(unit, chains),
        inputs=len(unit.stream),
        in_size=unit.depthwise.in_size,
        out_size=unit.depthwise.out_size,
        stride=unit.depthwise.stride,
        padding=unit.padding,
        blocks=unit.blocks,
        residual=unit.residual,
        chains=tuple(chains),
        segments=_output_segments(chains, len(written)),
        output_counts=tuple(int(unit.out_counts[channel]) for channel in written),
        outputs=len(unit.out_stream),
        placement=static_order(placement, len(written)),
        border=bias.ndim > 1,
        window=unit.depthwise.window,
        relu6=not unit.linear,
    )
    return plan, {f"{unit.name}/bias": bias, **arrays}


def _form(unit: UnitParts, chains: list[ChainPlan]) -> str:
    if len(chains) > 1 or any(chain.means for chain in chains):
        return "groups"
    products = [product for chain in chains for product in (chain.expand, chain.project) if product is not None]
    if any(product.transforms for product in products):
        return "bands"
    expand, project = unit.expand, unit.project
    channels = [expand.in_channels, expand.out_channels] if expand is not None else []
    complete = [*channels, project.in_channels, project.out_channels]
    return "dense" if [n for p in products for n in (p.inputs, p.outputs)] == complete else "channels"


def _chain(unit: UnitParts, name: str, channels: np.ndarray, arrays: HostArrays) -> ChainPlan:
    """Plans one chain and adds its arrays."""
    means = name == "means"
    made, read = unit.wide_counts
    # Sorted by what the expand layer makes; among those that make most, those that the project layer reads most of lie
    # last, next to their like among the others, so that what it reads whole is one stretch.
    most = made[channels].max(initial=0)
    wide = channels[np.lexsort((np.where(made[channels] == most, read[channels], -read[channels]), -made[channels]))]
    expand_kernel, depthwise_kernel, project_kernel = unit.kernels
    prefix = f"{unit.name}/{name}"
    expand, select = None, None
    if expand_kernel is None:
        places = {int(channel): place for place, channel in enumerate(unit.stream)}
        select = static_order(np.array([places[int(channel)] for channel in wide], np.int64), len(unit.stream))
    else:
        inputs = np.minimum(unit.narrow_counts, 1) if means else unit.narrow_counts
        expand, narrow = plan_reading(unit.stream, inputs, made[wide], unit.blocks[0])
        arrays |= pack(f"{prefix}/expand", expand_kernel[narrow][:, wide], expand)
        arrays[f"{prefix}/expand_bias"] = unit.biases[0][wide]
    order = np.argsort(-read[wide], kind="stable")
    made_outputs = unit.out_stream[unit.out_counts[unit.out_stream] > 0]
    outputs = by_count(made_outputs, unit.out_counts)
    out_counts = np.minimum(unit.out_counts, 1) if means else unit.out_counts
    project = plan_product(read[wide][order], out_counts[outputs], unit.blocks[1], static_order(order, len(wide)))
    kernel = depthwise_kernel[..., wide]
    if means:
        depthwise = unit.depthwise
        phases = mean_phases(depthwise.in_size, depthwise.stride, unit.padding, unit.blocks[0], depthwise.window)
        kernel = np.array([kernel[np.ix_(r, c)].sum(axis=(0, 1)) for phase in phases for _, _, r, c in phase.taps])
    arrays[f"{prefix}/depthwise"] = kernel
    arrays[f"{prefix}/depthwise_bias"] = unit.biases[1][wide]
    arrays |= pack(f"{prefix}/project", project_kernel[wide[order]][:, outputs], project)
    return ChainPlan(name, len(wide), means, expand, project, select)


def _output_segments(chains: list[ChainPlan], outputs: int) -> tuple[tuple[int, int, int], ...]:
    """What the chains' project layers make together: (start, stop, coefficients) of the output channels."""
    counts, edges = np.zeros(outputs, np.int64), {0, outputs}
    for chain in chains:
        for start, stop, count in chain.project.output_segments:
            counts[start:stop] = np.maximum(counts[start:stop], count)
            edges |= {start, stop}
    cuts = sorted(edges)
    return tuple((start, stop, int(counts[start])) for start, stop in itertools.pairwise(cuts))
