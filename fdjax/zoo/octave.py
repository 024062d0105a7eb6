"""MobileNets in two frequencies by octave convolution: Chen et al. 2019, "Drop an Octave" (arXiv 1904.05049).

A baseline: a share of the channels runs at half resolution, everywhere and from the start. Nothing is wrapped in a DCT,
and nothing has masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import flax.linen as nn
import jax

from fdjax.ops.octave import FREQUENCIES, Split, octave_pointwise, product_name, split_channels
from fdjax.zoo.mobilenet import DEPTHWISE_FAN_OUT, BlockPlan, MobileNet
from fdjax.zoo.network import FAN_OUT, Size
from fdjax.zoo.normalization import BatchNorm, Depthwise, Pointwise

Maps = dict[str, jax.Array]
Norms = Callable[..., BatchNorm]


class OctaveBlockPlan(NamedTuple):
    """An inverted residual block, and the channels of its maps: its input, the wide ones, its output."""

    block: BlockPlan
    inputs: Split
    wide: Split
    outputs: Split


class _Kernel(nn.Module):
    """The kernel of a product, of its own name."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", FAN_OUT, self.shape)


class OctavePointwise(nn.Module):
    """Up to four products (`fdjax.ops.octave.octave_pointwise`), and a batch norm in each frequency that they make.

    Attributes:
      features: D of the two frequencies.
      norm: makes a batch norm of a given name.
      relu6: a ReLU6 follows.
    """

    features: Split
    norm: Norms
    relu6: bool = False

    @nn.compact
    def __call__(self, maps: Maps) -> Maps:
        """See `octave_pointwise`."""
        kernels = {
            name: _Kernel((maps[source].shape[-1], features), name=name)().astype(maps[source].dtype)
            for source in maps
            for target, features in zip(FREQUENCIES, self.features, strict=True)
            if features
            for name in [product_name(source, target)]
        }
        made = octave_pointwise(maps, kernels)
        return {name: self.norm(relu6=self.relu6, name=f"{name}_norm")(y) for name, y in made.items()}


class OctaveDepthwise(nn.Module):
    """ReLU6, a depthwise convolution, batch norm and ReLU6, each frequency by itself.

    Attributes:
      window: its side.
      stride: of both frequencies.
      padding: "same" or "torch".
      norm: makes a batch norm of a given name.
    """

    window: int
    stride: int
    padding: str
    norm: Norms

    @nn.compact
    def __call__(self, maps: Maps) -> Maps:
        """The maps at 1/stride of their resolution."""
        made = {}
        for name, x in maps.items():
            taps = self.param(name, DEPTHWISE_FAN_OUT, (self.window, self.window, x.shape[-1]))
            made[name] = self.norm(relu6=True, name=f"{name}_norm")(x, Depthwise(taps, self.stride, self.padding))
        return made


class OctaveResidual(nn.Module):
    """Expand, depthwise, project, and the residual where shapes allow it.

    Attributes:
      plan: channels, stride and sizes.
      norm: makes a batch norm of a given name.
      padding: of the depthwise layer.
    """

    plan: OctaveBlockPlan
    norm: Norms
    padding: str

    @nn.compact
    def __call__(self, maps: Maps) -> Maps:
        """Maps of `plan.inputs` channels at `plan.block.in_size` -> of `plan.outputs` at `plan.block.out_size`."""
        plan, y = self.plan.block, maps
        if plan.has_expand:
            y = OctavePointwise(self.plan.wide, self.norm, name="expand")(y)
        y = OctaveDepthwise(plan.window, plan.stride, self.padding, self.norm, name="depthwise")(y)
        y = OctavePointwise(self.plan.outputs, self.norm, name="project")(y)
        return {name: maps[name] + y[name] for name in y} if plan.residual else y


def _halved(size: Size) -> Size:
    return size[0] // 2, size[1] // 2


def _is_even(size: Size) -> bool:
    return not (size[0] % 2 or size[1] % 2)


class OctaveMobileNet(MobileNet):
    """A MobileNet of linear bottlenecks whose maps have a high and a low frequency.

    Each map has as many channels in all as in the plain network, the share `octave` of them, rounded down, low. Only
    maps with even sides have low channels, and of a block's wide maps, which keep their channels through the depthwise
    layer, only those that are even before and after it; so that no map is padded to be halved. The stem's map and that
    which the head reads are all high. A depthwise layer with a stride has it in both frequencies (the authors' code
    averages 2x2 pixels instead, before a layer without: as many MACs).

    Fields that speak of blocks and masks have no effect: no layer is wrapped.

    Attributes (those of `MobileNet`, and):
      octave: share of low channels, above 0 to below 1.
      octave_maps: "all" maps have low channels, or only the "wide" ones inside of the blocks, between the expand and
        the project layer. The latter is Oct-MobileNetV2 as its authors publish it
        (https://github.com/facebookresearch/OctConv); there the first block, too, has an expand layer.
    """

    octave: float = 0.5
    octave_maps: str = "wide"

    def octave_blocks(self, size: Size) -> Iterator[OctaveBlockPlan]:
        """The blocks, in order, for maps of `size` after the stem."""
        plans = list(self.blocks(size))
        # The last block that changes the map between blocks for another: for that which the head reads.
        last = max((index for index, plan in enumerate(plans) if not plan.residual), default=0)
        inputs = Split(self.stem_channels, 0)
        for index, plan in enumerate(plans):
            if self.octave_maps == "wide":
                plan = plan._replace(has_expand=True)
            # Only the first block may have no expand layer: its wide maps are the stem's.
            wide = inputs
            if plan.has_expand:
                wide = self._split(plan.wide_channels, _is_even(plan.in_size) and _is_even(plan.out_size))
            between = self.octave_maps == "all" and index < last and _is_even(plan.out_size)
            outputs = inputs if plan.residual else self._split(plan.out_channels, between)
            yield OctaveBlockPlan(plan, inputs, wide, outputs)
            inputs = outputs

    def _split(self, channels: int, splits: bool) -> Split:
        return split_channels(channels, self.octave) if splits else Split(channels, 0)

    @property
    def title(self) -> str:
        """See `FrequencyNetwork.title`."""
        return f"{self.variant}_octave{self.octave:g}{'_all' if self.octave_maps == 'all' else ''}"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Normalised images [B, H, W, C] -> logits [B, num_classes]; see `MobileNet`.

        Raises:
          ValueError: no map can have low channels.
        """
        norm = self.norms(train)
        pixels = f"{x.shape[1]}x{x.shape[2]}"
        x = self.apply_stem(x, norm)
        maps, plans = {"high": x}, list(self.octave_blocks((x.shape[1], x.shape[2])))
        if not any(plan.wide.low or plan.outputs.low for plan in plans):
            raise ValueError(
                f"octave {self.octave:g} leaves no low channel in {self.variant} at {pixels} pixels: only maps with "
                "even sides have them; give a larger share, or another image size"
            )
        for plan in plans:
            maps = OctaveResidual(plan, norm, self.padding, name=plan.block.name)(maps)
        x = maps["high"]
        assert self.head_channels is not None
        kernel = _Kernel((x.shape[-1], self.head_channels), name="head")()
        return self.classify(norm(relu6=True, name="head_norm")(x, Pointwise(kernel)))
