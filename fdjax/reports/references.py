"""Published figures of MobileNetV2 on ImageNet, for comparison in plots.

MACs are in millions, with the classifier, and top-1 is in percent, as printed in the sources.
"""

from __future__ import annotations

from typing import NamedTuple

from fdjax.reports.results import Result

# The share of contiguous channel masks that the paper reports, and its network.
PAPERS_CONTIGUITY, PAPERS_CONTIGUITY_NETWORK = 0.988, "ResNeXt-29"
# The MACs of MobileNetV2 1.0-224, in millions, for figures that are published as a share of them.
_WHOLE = 300.0


class Reference(NamedTuple):
    """Published figures of a network, or of several.

    Attributes:
      name: the name in a legend.
      source: the source of the figures.
      points: MACs in millions and top-1 in percent.
      sizes: whether the points are one network in different sizes.
    """

    name: str
    source: str
    points: tuple[tuple[float, float], ...]
    sizes: bool = False


_SLIM = "TF-slim, README of MobileNet: V2 checkpoints"
MOBILENET_V2_IMAGENET = (
    Reference("MobileNetV2 1.4 and 1.3, 224", _SLIM, ((582, 75.0), (509, 74.4)), True),
    Reference(
        "MobileNetV2 1.0, 224 to 96", _SLIM, ((300, 71.8), (221, 70.7), (154, 68.8), (99, 65.3), (56, 60.3)), True
    ),
    Reference(
        "MobileNetV2 0.75, 224 to 96", _SLIM, ((209, 69.8), (153, 68.7), (107, 66.4), (69, 63.2), (39, 58.8)), True
    ),
    Reference("MobileNetV2 0.5, 224 to 96", _SLIM, ((97, 65.4), (71, 63.9), (50, 61.0), (32, 57.7), (18, 51.2)), True),
    Reference("MobileNetV2 0.35, 224 to 96", _SLIM, ((59, 60.3), (43, 58.2), (30, 55.7), (20, 50.8), (11, 45.5)), True),
    Reference("AMC", "He et al., ECCV 2018: 0.70x", ((0.70 * _WHOLE, 70.85),)),
    Reference("OctConv", "Chen et al., ICCV 2019 (with label smoothing)", ((256, 72.0), (295, 73.0))),
    Reference("MetaPruning", "Liu et al., ICCV 2019", ((303, 72.7), (140, 68.2), (43, 58.3))),
    Reference("uniform, half", "uniform channel pruning: -50%", ((0.50 * _WHOLE, 65.8),)),
    Reference("PPSM", "PPSM: -28.7%", ((0.713 * _WHOLE, 71.43),)),
)


def references_for(result: Result) -> tuple[Reference, ...]:
    """Returns the published figures of a run's network on its data set, or none.

    A data set counts as ImageNet if it has 1000 classes and is called imagenet..., or is a folder or a prepared set.
    """
    data = result.config.data.name
    imagenet = result.num_classes == 1000 and (data in ("folder", "prepared") or data.startswith("imagenet"))
    return MOBILENET_V2_IMAGENET if imagenet and result.network == "mobilenetv2" else ()
