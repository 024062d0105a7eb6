"""What each source calls the layers of a network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fdjax.errors import UserError
from fdjax.nn import MobileNetV2


class Layer(NamedTuple):
    """A layer with the batch norm that follows it.

    Attributes:
      ours: path of its parameters; its batch norm is that with "_norm" at the end.
      theirs: its name in the file.
      norm: its batch norm's name in the file; None where it has none.
    """

    ours: str
    theirs: str
    norm: str | None = None


def layers_of(network: MobileNetV2, source: str) -> list[Layer]:
    """The layers of `network` under the names of a source, in the order of evaluation.

    Args:
      network: whose layers they are.
      source: a key of `FORMATS`.

    Raises:
      UserError: the source has no such network.
    """
    if source not in _MOBILENET:
        raise UserError(f"--format {source} has no weights for {network.variant}; accepted are {', '.join(_MOBILENET)}")
    return list(_MOBILENET[source](network))


def _torchvision_mobilenet(network: MobileNetV2) -> Iterator[Layer]:
    yield Layer("stem", "features.0.0", "features.0.1")
    number = 0
    for number, plan in enumerate(network.blocks((1, 1)), start=1):
        conv = f"features.{number}.conv"
        wide = ("expand", "depthwise") if plan.has_expand else ("depthwise",)
        for at, role in enumerate(wide):
            yield Layer(f"{plan.name}/{role}", f"{conv}.{at}.0", f"{conv}.{at}.1")
        yield Layer(f"{plan.name}/project", f"{conv}.{len(wide)}", f"{conv}.{len(wide) + 1}")
    yield Layer("head", f"features.{number + 1}.0", f"features.{number + 1}.1")
    yield Layer("classifier", "classifier.1")


def _timm_mobilenet(network: MobileNetV2) -> Iterator[Layer]:
    yield Layer("stem", "conv_stem", "bn1")
    first: dict[int, int] = {}
    for number, plan in enumerate(network.blocks((1, 1))):
        block = f"blocks.{plan.stage}.{number - first.setdefault(plan.stage, number)}"
        convs = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"}
        if not plan.has_expand:
            convs = {"depthwise": "conv_dw", "project": "conv_pw"}
        for at, (role, conv) in enumerate(convs.items(), start=1):
            yield Layer(f"{plan.name}/{role}", f"{block}.{conv}", f"{block}.bn{at}")
    yield Layer("head", "conv_head", "bn2")
    yield Layer("classifier", "classifier")


def _efficientnet_lite(network: MobileNetV2) -> Iterator[Layer]:
    yield Layer("stem", "_conv_stem", "_bn0")
    for number, plan in enumerate(network.blocks((1, 1))):
        block = f"_blocks.{number}"
        for at, role in enumerate(("expand", "depthwise", "project")):
            if role != "expand" or plan.has_expand:
                yield Layer(f"{plan.name}/{role}", f"{block}._{role}_conv", f"{block}._bn{at}")
    yield Layer("head", "_conv_head", "_bn1")
    yield Layer("classifier", "_fc")


def _keras_mobilenetv2(network: MobileNetV2) -> Iterator[Layer]:
    yield Layer("stem", "Conv1", "bn_Conv1")
    for number, plan in enumerate(network.blocks((1, 1))):
        block = f"block_{number}" if number else "expanded_conv"
        for role in ("expand", "depthwise", "project"):
            if role != "expand" or plan.has_expand:
                yield Layer(f"{plan.name}/{role}", f"{block}_{role}", f"{block}_{role}_BN")
    yield Layer("head", "Conv_1", "Conv_1_bn")
    yield Layer("classifier", "predictions")


_MOBILENET = {
    "torchvision": _torchvision_mobilenet,
    "timm": _timm_mobilenet,
    "timm_tf": _timm_mobilenet,
    "efficientnet_lite": _efficientnet_lite,
    "keras": _keras_mobilenetv2,
}
