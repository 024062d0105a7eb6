"""The network of a run."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Literal

from fdjax.config.checked import Checked

# The factory of networks that are read from ONNX files; its argument `file` is the path.
ONNX_FACTORY = "fdjax.onnx.module:onnx_network"
_FUNCTION = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """The network."""

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
    """Network: mobilenetv2 (the original), its two CIFAR variants, a small one for 28x28 images; mobilenetv1;
    efficientnet_lite0; CIFAR's ResNets of 20 to 110 layers (which have no pointwise layers to wrap) and ResNeXt-29;
    ImageNet's ResNet-50 and ResNeXt-50."""
    factory: str | None = None
    """Function that returns a network of your own, in place of `name`: package.module:function. It is imported and
    called, also when a checkpoint is read, so its code runs. It returns a Flax Linen module with
    __call__(images, train). Of the other settings here, only precision and count_classifier apply to it."""
    arguments: tuple[tuple[str, bool | int | float | str], ...] = ()
    """Arguments of the factory, as pairs of name and value, such as width 0.5 depth 3. It also gets num_classes, if it
    has such a parameter."""
    width: float = 1.0
    """Multiplier of the channels, above 0 to 10; channels are rounded to multiples of 8."""
    cardinality: int | None = None
    """Groups of a ResNeXt's 3x3 convolutions (None: the network's own, 32)."""
    group_width: int | None = None
    """Channels per group in a ResNeXt's first stage (None: the network's own, 4)."""
    inner_channels: tuple[int, ...] = ()
    """Channels of the first convolution of each block of a ResNet or ResNeXt, in order, after filters have been removed
    (none: the network's own)."""
    octave: float = 0.0
    """Share, 0 to below 1, of each map's channels that run at half resolution (octave convolution, a baseline without
    masks, for MobileNetV2 and EfficientNet-Lite0); 0: off."""
    octave_maps: Literal["wide", "all"] = "wide"
    """Maps with low-resolution channels, with octave: the wide ones inside blocks, as in the published Oct-MobileNetV2,
    or all."""
    batch_norm_epsilon: float = 1e-5
    """Number added to the variance in every batch norm (usual in PyTorch; 1e-3 in TensorFlow)."""
    padding: Literal["same", "torch"] = "same"
    """Padding of convolutions. same: TensorFlow's SAME. torch: window // 2 zeros on each side."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type in which the network computes during training; weights, statistics and losses are float32. bfloat16 is for
    GPU and TPU."""
    count_classifier: bool = False
    """Include the classifier's MACs in every total (usually true for ImageNet and false for CIFAR)."""

    def _check(self) -> None:
        self._require(
            self.factory is None or re.fullmatch(_FUNCTION, self.factory) is not None,
            "factory",
            "package.module:function, such as my_networks:small, or None",
        )
        names = [name for name, _ in self.arguments]
        self._require(not names or self.factory is not None, "arguments", "left out if there is no factory")
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

    @property
    def onnx_file(self) -> Path | None:
        """The ONNX file that the network is read from; None if it comes from elsewhere."""
        file = dict(self.arguments).get("file") if self.factory == ONNX_FACTORY else None
        return None if file is None else Path(str(file)).expanduser()

    def with_onnx_file(self, file: Path) -> ModelConfig:
        """Returns the settings of the network in another ONNX file, which is made absolute."""
        arguments = {**dict(self.arguments), "file": str(file.expanduser().resolve())}
        return dataclasses.replace(self, factory=ONNX_FACTORY, arguments=tuple(arguments.items()))
