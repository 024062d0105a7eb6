"""The sources of weights, and the conventions by which their networks were trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

Framework = Literal["torch", "keras"]


@dataclasses.dataclass(frozen=True)
class Conventions:
    """What a network needs besides its weights.

    Attributes:
      padding: padding of convolutions, "torch" (window // 2 zeros on each side) or "same" (TensorFlow's SAME).
      batch_norm_epsilon: added to the variance in every batch norm.
      input_mean: mean per channel, in raw units 0..255, which is subtracted from images.
      input_std: standard deviation per channel, in the same units, by which images are then divided.
      eval_crop: side of the square cut from the middle of a test image, as a share of its shorter side.
      interpolation: the interpolation by which the source resizes test images.
    """

    padding: Literal["same", "torch"]
    batch_norm_epsilon: float
    input_mean: tuple[float, ...]
    input_std: tuple[float, ...]
    eval_crop: float
    interpolation: Literal["bilinear", "bicubic"]


@dataclasses.dataclass(frozen=True)
class Format:
    """A source of weights.

    Attributes:
      name: the value of --format.
      framework: the framework whose names and layouts the variables have.
      conventions: the conventions of its networks.
    """

    name: str
    framework: Framework
    conventions: Conventions


_IMAGENET_MEAN = tuple(255 * mean for mean in (0.485, 0.456, 0.406))
_IMAGENET_STD = tuple(255 * std for std in (0.229, 0.224, 0.225))
_HALF = (127.5,) * 3

FORMATS: Mapping[str, Format] = {
    found.name: found
    for found in (
        Format(
            "torchvision", "torch", Conventions("torch", 1e-5, _IMAGENET_MEAN, _IMAGENET_STD, 0.875, "bilinear")
        ),
        Format("timm", "torch", Conventions("torch", 1e-5, _IMAGENET_MEAN, _IMAGENET_STD, 0.875, "bicubic")),
        Format("timm_tf", "torch", Conventions("same", 1e-3, _HALF, _HALF, 0.875, "bicubic")),
        Format(
            "efficientnet_lite", "torch", Conventions("same", 1e-3, (127.0,) * 3, (128.0,) * 3, 0.875, "bicubic")
        ),
        Format("keras", "keras", Conventions("same", 1e-3, _HALF, _HALF, 0.875, "bilinear")),
    )
}  # fmt: skip
