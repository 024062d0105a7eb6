"""Folding the residual blocks of ResNets: from trained variables and hard masks to their plans and arrays.

The map that runs from block to block keeps all its channels, in their order. Inside a bottleneck, channels that the
first layer does not make or the last one does not read are left out: without groups one by one, with groups where
nothing is read of a whole group.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fdjax.frozen.kernels import pack
from fdjax.frozen.parameters import Parameters
from fdjax.frozen.plan import (
    ConvPlan,
    PointwisePlan,
    ResidualPlan,
    by_count,
    plan_reading,
    static_order,
    taps_on_the_map,
)
from fdjax.ops.depthwise import conv_pads
from fdjax.spec import LayerSpec

HostArrays = dict[str, np.ndarray]
# Kept counts of a wrapped layer's sides, input [C] and output [D].
Sides = tuple[np.ndarray, np.ndarray]


def fold_residual(
    name: str, roles: Mapping[str, LayerSpec], parameters: Parameters, sides: Mapping[str, Sides], padding: str
) -> tuple[ResidualPlan, HostArrays]:
    """Folds one block.

    Args:
      name: of the block.
      roles: its layers: "conv1", "conv2", of a bottleneck "conv3", and "shortcut" where there is a projection.
      parameters: of the network.
      sides: layer name -> kept counts, of the wrapped ones (`fdjax.spec.effective_counts`).
      padding: "same" or "torch".

    Returns:
      The plan, and float64 arrays (`fdjax.frozen.kernels.residual` names them).
    """
    first, last = roles["conv1"], roles.get("conv3", roles["conv2"])
    arrays: HostArrays = {}
    if "conv3" in roles:
        layers = _bottleneck(roles, parameters, sides, padding, arrays)
    else:
        layers = (_conv(first, parameters, padding, arrays), _conv(last, parameters, padding, arrays))
    projection = _conv(roles["shortcut"], parameters, padding, arrays) if "shortcut" in roles else None
    plan = ResidualPlan(
        name=name,
        form=_form(layers, roles),
        inputs=first.in_channels,
        outputs=last.out_channels,
        in_size=first.in_size,
        out_size=last.out_size,
        stride=first.in_size[0] // last.out_size[0],
        layers=layers,
        projection=projection,
    )
    return plan, arrays


def _form(layers: tuple[ConvPlan | PointwisePlan, ...], roles: Mapping[str, LayerSpec]) -> str:
    products = [layer.product for layer in layers if isinstance(layer, PointwisePlan)]
    if any(product.transforms for product in products):
        return "bands"
    full = sum(layer.dense_macs for role, layer in roles.items() if role != "shortcut")
    return "dense" if sum(layer.macs() for layer in layers) == full else "channels"


def _conv_plan(layer: LayerSpec, inputs: int, outputs: int, groups: int, padding: str) -> ConvPlan:
    pads = [conv_pads(length, layer.stride, layer.window, padding) for length in layer.in_size]
    return ConvPlan(inputs, outputs, layer.window, layer.stride, groups, (pads[0], pads[1]), layer.out_size)


def _folded(layer: LayerSpec, parameters: Parameters) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias with the batch norm in them."""
    slope, shift = parameters.batch_norm(f"{layer.name}_norm")
    return parameters.at(f"{layer.name}/kernel") * slope, shift


def _conv(layer: LayerSpec, parameters: Parameters, padding: str, arrays: HostArrays) -> ConvPlan:
    arrays[f"{layer.name}/kernel"], arrays[f"{layer.name}/bias"] = _folded(layer, parameters)
    return _conv_plan(layer, layer.in_channels, layer.out_channels, layer.groups, padding)


def _bottleneck(
    roles: Mapping[str, LayerSpec],
    parameters: Parameters,
    sides: Mapping[str, Sides],
    padding: str,
    arrays: HostArrays,
) -> tuple[ConvPlan | PointwisePlan, ...]:
    conv1, conv2, conv3 = (roles[role] for role in ("conv1", "conv2", "conv3"))
    (reads, made), (read, writes) = sides[conv1.name], sides[conv3.name]
    kernel, bias = _folded(conv2, parameters)
    if conv2.groups == 1:
        # In the order of their counts, which is folded into the kernels.
        before, after = (_at_least_one(by_count(np.flatnonzero(counts), counts)) for counts in (made, read))
        groups, removed = 1, np.flatnonzero(made == 0)
        # A removed channel is constant before the convolution, and after it but for what padding does to the borders.
        _, shift = parameters.batch_norm(f"{conv1.name}_norm")
        left = _of_constant(np.maximum(shift[removed], 0), kernel[:, :, removed][..., after], conv2, padding)
        bias = bias[after] + (left if np.ptp(left, axis=(0, 1)).any() else left[0, 0])
        kernel = kernel[:, :, before][..., after] * (made[before] > 0)[:, None]
    else:
        alive = _at_least_one(np.flatnonzero((read > 0).reshape(conv2.groups, -1).any(axis=1)))
        groups, width = len(alive), conv2.in_channels // conv2.groups
        before = after = (alive[:, None] * width + np.arange(width)).ravel()
        kernel, bias = kernel[..., after], bias[after]
    first = _pointwise(conv1, parameters, (np.arange(conv1.in_channels), before), (reads, made), arrays)
    arrays[f"{conv2.name}/kernel"], arrays[f"{conv2.name}/bias"] = kernel, bias
    middle = _conv_plan(conv2, len(before), len(after), groups, padding)
    last = _pointwise(conv3, parameters, (after, np.arange(conv3.out_channels)), (read, writes), arrays)
    return first, middle, last


def _at_least_one(indices: np.ndarray) -> np.ndarray:
    """A convolution without a channel is none: where nothing is left, one stays."""
    return indices if len(indices) else np.zeros(1, np.int64)


def _pointwise(
    layer: LayerSpec,
    parameters: Parameters,
    maps: tuple[np.ndarray, np.ndarray],
    counts: Sides,
    arrays: HostArrays,
) -> PointwisePlan:
    """Plans a layer between maps that have these channels, in this order, and adds its arrays."""
    assert layer.block is not None
    kernel, bias = _folded(layer, parameters)
    inputs, outputs = counts
    made = by_count(maps[1][outputs[maps[1]] > 0], outputs)
    product, read = plan_reading(maps[0], inputs, outputs[made], layer.block)
    arrays |= pack(layer.name, kernel[read][:, made], product)
    arrays[f"{layer.name}/bias"] = bias[maps[1]]
    places = {int(channel): place for place, channel in enumerate(made)}
    placement = np.array([places.get(int(channel), -1) for channel in maps[1]], np.int64)
    return PointwisePlan(product, layer.in_size, layer.block, static_order(placement, len(made)))


def _of_constant(values: np.ndarray, kernel: np.ndarray, layer: LayerSpec, padding: str) -> np.ndarray:
    """A convolution of maps of constant `values` [C] with a kernel [window, window, C, D]: [H', W', D]."""
    rows, columns = taps_on_the_map(layer.in_size, layer.out_size, layer.stride, layer.window, padding)
    return np.einsum("ri,sj,ijcd,c->rsd", rows, columns, kernel, values, optimize=True)
