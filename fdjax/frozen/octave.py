"""Blocks of octave networks (`fdjax.zoo.octave`), frozen: batch norms go into kernels and biases; nothing is pruned.

Plan, folding and evaluation together: they share nothing with the products of masked layers. Between blocks a map with
low channels is a dict of its two parts (`fdjax.ops.octave`), one without is an array as elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fdjax.frozen.parameters import Parameters
from fdjax.ops.depthwise import depthwise_conv
from fdjax.ops.macs import conv_macs, depthwise_macs
from fdjax.ops.octave import FREQUENCIES, octave_pointwise, product_name
from fdjax.spec import LayerSpec

Size = tuple[int, int]
# Channels of the high and of the low part of a map.
Channels = tuple[int, int]
Maps = jax.Array | dict[str, jax.Array]
HostArrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class OctavePlan:
    """An inverted residual block in two frequencies.

    Attributes:
      name: of the block.
      inputs: channels of its input map.
      wide: of the maps around its depthwise layer.
      outputs: of its output map.
      in_size: (H, W) of the high part of its input.
      out_size: (H, W) of that of its output.
      stride: of the depthwise layer.
      padding: "same" or "torch".
      window: of the depthwise layer.
      has_expand: whether there is an expand layer.
      residual: its input is added.
      form: "dense", always.
    """

    name: str
    inputs: Channels
    wide: Channels
    outputs: Channels
    in_size: Size
    out_size: Size
    stride: int
    padding: str
    window: int
    has_expand: bool
    residual: bool
    form: str = "dense"

    @property
    def widest(self) -> int:
        """Channels of its widest map, of four low ones one."""
        return max(high + -(-low // 4) for high, low in (self.inputs, self.wide, self.outputs))

    def macs(self) -> int:
        """Multiply-accumulates; means and repetitions of 2x2 pixels are not counted."""
        total = self._products(self.wide, self.outputs, self.out_size)
        if self.has_expand:
            total += self._products(self.inputs, self.wide, self.in_size)
        sizes = self.out_size, _halved(self.out_size)
        return total + sum(depthwise_macs(s, c, self.window) for s, c in zip(sizes, self.wide, strict=True))

    @staticmethod
    def _products(inputs: Channels, outputs: Channels, size: Size) -> int:
        at_half = sum(inputs) * sum(outputs) - inputs[0] * outputs[0]
        return conv_macs(size, inputs[0], outputs[0]) + conv_macs(_halved(size), 1, at_half)

    def random_maps(self, key: jax.Array, batch: int) -> Maps:
        """An input of `batch` images, of values from 0 to 6."""
        sizes = self.in_size, _halved(self.in_size)
        maps = {
            name: jax.random.uniform(key, (batch, *size, channels), jnp.float32, 0, 6)
            for name, size, channels in zip(FREQUENCIES, sizes, self.inputs, strict=True)
            if channels
        }
        return _bare(maps)


def _halved(size: Size) -> Size:
    return size[0] // 2, size[1] // 2


def _bare(maps: dict[str, jax.Array]) -> Maps:
    return maps if "low" in maps else maps["high"]


def is_octave(roles: Mapping[str, LayerSpec]) -> bool:
    """Whether a block's layers are those of an octave network."""
    return "depthwise/high" in roles


def fold_octave(
    name: str, roles: Mapping[str, LayerSpec], parameters: Parameters, padding: str
) -> tuple[OctavePlan, HostArrays]:
    """Folds one block.

    Args:
      name: of the block.
      roles: its layers: "expand/high_to_low" and so on where it has them, "depthwise/high", ..., "project/...".
      parameters: of the network.
      padding: "same" or "torch".

    Returns:
      The plan, and float64 arrays (`octave` names them).
    """
    arrays: HostArrays = {}
    for layer in roles.values():
        slope, shift = parameters.batch_norm(layer.norm)
        is_depthwise = layer.kind == "depthwise"
        kernel = parameters.at(layer.name if is_depthwise else f"{layer.name}/kernel")
        arrays[layer.name] = kernel * slope
        # Products that make one map have one batch norm.
        arrays[_bias(layer.norm)] = shift
    wide, first = _channels(roles, "depthwise/{}", "in"), roles["depthwise/high"]
    has_expand = "expand/high_to_high" in roles
    inputs = _channels(roles, "expand/{}_to_high", "in") if has_expand else wide
    outputs = _channels(roles, "project/high_to_{}", "out")
    plan = OctavePlan(
        name=name,
        inputs=inputs,
        wide=wide,
        outputs=outputs,
        in_size=first.in_size,
        out_size=first.out_size,
        stride=first.stride,
        padding=padding,
        window=first.window,
        has_expand=has_expand,
        residual=first.stride == 1 and inputs == outputs,
    )
    return plan, arrays


def _bias(norm: str) -> str:
    return f"{norm.removesuffix('norm')}bias"


def _channels(roles: Mapping[str, LayerSpec], role: str, side: str) -> Channels:
    """Channels that the layers `role` of the high and of the low frequency have on a side; 0 where there is none."""
    found = (roles.get(role.format(frequency)) for frequency in FREQUENCIES)
    high, low = (0 if layer is None else layer.in_channels if side == "in" else layer.out_channels for layer in found)
    return high, low


def octave(x: Maps, arrays: Mapping[str, jax.Array], plan: OctavePlan) -> Maps:
    """A block: maps of `plan.inputs` channels [B, H, W, C], [B, H/2, W/2, C'] -> of `plan.outputs` at 1/stride.

    Arrays, under the block's name: "expand/high_to_high" [C, E] and the other products that there are, likewise of
    "project"; "depthwise/high" and "/low" [window, window, E]; of all three the biases "/high_bias" and "/low_bias".
    """
    maps = x if isinstance(x, dict) else {"high": x}

    def biased(made: dict[str, jax.Array], layer: str) -> dict[str, jax.Array]:
        return {name: y + arrays[f"{plan.name}/{layer}/{name}_bias"] for name, y in made.items()}

    def pointwise(maps: dict[str, jax.Array], layer: str) -> dict[str, jax.Array]:
        names = [product_name(source, target) for source in FREQUENCIES for target in FREQUENCIES]
        paths = {name: f"{plan.name}/{layer}/{name}" for name in names}
        return biased(octave_pointwise(maps, {n: arrays[path] for n, path in paths.items() if path in arrays}), layer)

    y = pointwise(maps, "expand") if plan.has_expand else maps
    y = {
        name: depthwise_conv(jnp.clip(z, 0, 6), arrays[f"{plan.name}/depthwise/{name}"], plan.stride, plan.padding)
        for name, z in y.items()
    }
    y = {name: jnp.clip(z, 0, 6) for name, z in biased(y, "depthwise").items()}
    y = pointwise(y, "project")
    return _bare({name: maps[name] + z for name, z in y.items()} if plan.residual else y)
