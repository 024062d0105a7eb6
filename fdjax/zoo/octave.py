"""MobileNets in two frequencies by octave convolution: Chen et al. 2019, "Drop an Octave" (arXiv 1904.05049).

This is a baseline: a share of the channels runs at half resolution from the start. No layer is wrapped in a DCT, and
there are no masks.
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
    """An inverted residual block, and the high and low channels of its input, wide and output maps."""

    block: BlockPlan
    inputs: Split
    wide: Split
    outputs: Split


class _Kernel(nn.Module):
    """The kernel of one product, under a name of its own."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", FAN_OUT, self.shape)


class OctavePointwise(nn.Module):
    """Up to four products (`fdjax.ops.octave.octave_pointwise`), and a batch norm per frequency of their result.

    Attributes:
      features: output channels of the two frequencies.
      norm: makes a batch norm with a given name.
      relu6: whether a ReLU6 follows.
    """

    features: Split
    norm: Norms
    relu6: bool = False

    @nn.compact
    def __call__(self, maps: Maps) -> Maps:
        """Applies the products and the norms to maps as in `octave_pointwise`."""
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
    """ReLU6, a depthwise convolution, batch norm and ReLU6, on each frequency separately.

    Attributes:
      window: side of the square window.
      stride: stride in both frequencies.
      padding: "same" or "torch".
      norm: makes a batch norm with a given name.
    """

    window: int
    stride: int
    padding: str
    norm: Norms

    @nn.compact
    def __call__(self, maps: Maps) -> Maps:
        """Returns the maps at 1/stride of their resolution."""
        made = {}
        for name, x in maps.items():
            taps = self.param(name, DEPTHWISE_FAN_OUT, (self.window, self.window, x.shape[-1]))
            made[name] = self.norm(relu6=True, name=f"{name}_norm")(x, Depthwise(taps, self.stride, self.padding))
        return made


class OctaveResidual(nn.Module):
    """An expand, a depthwise and a project layer, with a residual connection where the shapes allow it.

    Attributes:
      plan: channels, stride and sizes.
      norm: makes a batch norm with a given name.
      padding: padding of the depthwise layer, "same" or "torch".
    """

    plan: OctaveBlockPlan
    norm: Norms
    padding: str

    @nn.compact
    def __call__(self, maps: Maps) -> Maps:
        """Takes maps of `plan.inputs` channels at `plan.block.in_size` to `plan.outputs` at `plan.block.out_size`."""
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

    Each map has as many channels in total as in the plain network; the share `octave` of them, rounded down, is low.
    Only maps with even sides have low channels, so that no map has to be padded before it is halved. A block's wide
    maps keep their channels through the depthwise layer, so they have low channels only if they are even before and
    after it. The stem's map and the head's input are all high. A depthwise layer with a stride has it in both
    frequencies. (The authors' code averages 2x2 pixels before a layer without a stride, which takes as many MACs.)

    Fields about blocks and masks have no effect, because no layer is wrapped.

    Attributes (in addition to those of `MobileNet`):
      octave: share of low channels, above 0 and below 1.
      octave_maps: which maps have low channels: "all", or only the "wide" ones inside blocks, between the expand and
        the project layer. The latter is Oct-MobileNetV2 as its authors publish it
        (https://github.com/facebookresearch/OctConv), where the first block has an expand layer as well.
    """

    octave: float = 0.5
    octave_maps: str = "wide"

    def octave_blocks(self, size: Size) -> Iterator[OctaveBlockPlan]:
        """Plans the blocks, in order, for maps of `size` (H, W) after the stem."""
        plans = list(self.blocks(size))
        # The last block without a residual starts the map that the head reads.
        last = max((index for index, plan in enumerate(plans) if not plan.residual), default=0)
        inputs = Split(self.stem_channels, 0)
        for index, plan in enumerate(plans):
            if self.octave_maps == "wide":
                plan = plan._replace(has_expand=True)
            # Only the first block may lack an expand layer; its wide map is then the stem's.
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
        """Computes logits, as in `MobileNet`.

        Args:
          x: normalised images, [B, H, W, C].
          train: whether to use and update the statistics of the batch.

        Returns:
          Logits, [B, num_classes].

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
                "even sides have low channels; give a larger share, or another image size"
            )
        for plan in plans:
            maps = OctaveResidual(plan, norm, self.padding, name=plan.block.name)(maps)
        x = maps["high"]
        assert self.head_channels is not None
        kernel = _Kernel((x.shape[-1], self.head_channels), name="head")()
        return self.classify(norm(relu6=True, name="head_norm")(x, Pointwise(kernel)))
