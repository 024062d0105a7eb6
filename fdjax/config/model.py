"""Which network a run trains."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from fdjax.config.checked import Checked

_FUNCTION = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """Which network."""

    name: Literal[
        "mobilenetv2",
        "mobilenetv2_cifar10",
        "mobilenetv2_cifar100",
        "mobilenetv2_small",
        "mobilenetv1",
        "efficientnet_lite0",
        "resnet20",
        "resnet32",
        "resnet44",
        "resnet56",
        "resnet110",
        "resnet50",
        "resnext50_32x4d",
        "resnext29",
    ] = "mobilenetv2"
    """mobilenetv2 (the original), its two CIFAR variants, a small one for 28x28 images; mobilenetv1;
    efficientnet_lite0; CIFAR's ResNets of 20 to 110 layers (no pointwise layers: nothing to wrap) and ResNeXt-29;
    ImageNet's ResNet-50 and ResNeXt-50."""
    factory: str | None = None
    """A network of your own in place of `name`: package.module:function. It is imported and called, so it is code that
    runs, also when a checkpoint is read. It returns a Flax Linen module with __call__(images, train), for which only
    precision and count_classifier hold of the other settings here."""
    arguments: tuple[tuple[str, bool | int | float | str], ...] = ()
    """With factory: pairs of name and value that the function is called with, such as width 0.5 depth 3. It is given
    num_classes too, if it takes that."""
    width: float = 1.0
    """Width multiplier; channels are rounded to multiples of 8."""
    cardinality: int | None = None
    """ResNeXt: groups of the 3x3 convolutions (None: the network's own, 32)."""
    group_width: int | None = None
    """ResNeXt: channels of each group in the first stage (None: the network's own, 4)."""
    inner_channels: tuple[int, ...] = ()
    """ResNet, ResNeXt: channels of each block's first convolution, in order, where filters have been removed (none: the
    network's own)."""
    octave: float = 0.0
    """MobileNetV2, EfficientNet-Lite0: share, 0 to below 1, of each map's channels that run at half resolution (octave
    convolution: a baseline, of which nothing has masks); 0: off."""
    octave_maps: Literal["wide", "all"] = "wide"
    """With octave: only the wide maps inside of blocks have such channels, as Oct-MobileNetV2 is published, or all."""
    batch_norm_epsilon: float = 1e-5
    """Added to the variance in every batch norm (PyTorch's custom; TensorFlow's is 1e-3)."""
    padding: Literal["same", "torch"] = "same"
    """Convolution padding: TensorFlow's SAME, or one zero on each side."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in while it trains; weights, statistics and losses are float32. bfloat16: GPU, TPU."""
    count_classifier: bool = False
    """Count the classifier's MACs in every total (the custom: true for ImageNet, false for CIFAR)."""

    def _check(self) -> None:
        self._require(
            self.factory is None or re.fullmatch(_FUNCTION, self.factory) is not None,
            "factory",
            "package.module:function, such as my_networks:small, or None",
        )
        names = [name for name, _ in self.arguments]
        self._require(not names or self.factory is not None, "arguments", "left out where there is no factory")
        self._require(
            len({*names}) == len(names) and all(name.isidentifier() for name in names),
            "arguments",
            "pairs of an argument's name and its value, each name once",
        )
        self._require(0 < self.width <= 10, "width", "a multiplier above 0 and at most 10")
        grouped = self.name.startswith("resnext")
        for field in ("cardinality", "group_width"):
            value = getattr(self, field)
            self._require(
                value is None or (grouped and value >= 1), field, "at least 1, and only for a resnext, or None"
            )
        residual = self.name.startswith("resne")
        self._require(
            not self.inner_channels or (residual and min(self.inner_channels) >= 1),
            "inner_channels",
            "numbers of at least 1, and only for a resnet or resnext",
        )
        bottlenecks = self.name.startswith("mobilenetv2") or self.name == "efficientnet_lite0"
        self._require(
            not self.octave or (0 < self.octave < 1 and bottlenecks),
            "octave",
            "a share from 0 to below 1, and above 0 only for a mobilenetv2 or efficientnet_lite0",
        )
        self._require(self.batch_norm_epsilon > 0, "batch_norm_epsilon", "above 0")
