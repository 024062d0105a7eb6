"""The names of the layers of each network in each source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from fdjax.errors import UserError
from fdjax.zoo import RESNETS, FrequencyNetwork, MobileNet, OctaveMobileNet, ResNet


class Layer(NamedTuple):
    """A layer, with the batch norm that follows it.

    Attributes:
      ours: path of its parameters; its batch norm has this path with "_norm" appended.
      theirs: its name in the file.
      norm: the name of its batch norm in the file; None if it has none.
      alias: another name that it may have in files.
    """

    ours: str
    theirs: str
    norm: str | None = None
    alias: str | None = None


def layers_of(network: FrequencyNetwork, source: str) -> list[Layer]:
    """Lists the layers of `network` under the current names of a source, with the classifier last.

    Args:
      network: the network.
      source: a key of `FORMATS`.

    Returns:
      The layers.

    Raises:
      UserError: the source has no such network.
    """
    return next(iter(schemes_of(network, source).values()))


def schemes_of(network: FrequencyNetwork, source: str) -> dict[str, list[Layer]]:
    """Lists the layers as in `layers_of`, under every known naming scheme of files with the source's conventions.

    Returns:
      Name of the scheme -> layers; the source's own scheme comes first.

    Raises:
      UserError: the source has no such network.
    """
    if isinstance(network, OctaveMobileNet):
        raise UserError("no source has weights of a network with model.octave; leave it out (--model.octave 0)")
    names = _sources(network)
    if source not in names:
        raise UserError(f"--format {source} has no {network.variant}; its formats are {', '.join(names)}")
    schemes = {source: list(names[source](network))}
    if source == "torchvision":  # The other schemes share its conventions.
        schemes |= {name: list(make(network)) for name, make in _others(network).items()}
    return schemes


Names = Callable[[Any], Iterator[Layer]]


def _sources(network: FrequencyNetwork) -> dict[str, Names]:
    if isinstance(network, ResNet):
        return {"torchvision": _torchvision_resnet, "timm": _torchvision_resnet}
    if network.variant == "mobilenetv1":
        return {"keras": _keras_mobilenetv1}
    if network.variant == "efficientnet_lite0":
        return {
            "timm": _timm_mobilenet,
            "timm_tf": _timm_mobilenet,
            "efficientnet_lite": _efficientnet_lite,
        }
    return {"torchvision": _torchvision_mobilenet, "timm": _timm_mobilenet, "keras": _keras_mobilenetv2}


def _others(network: FrequencyNetwork) -> dict[str, Names]:
    """Returns the naming schemes of well-known repositories and of older versions, for networks in PyTorch."""
    if isinstance(network, ResNet):
        return {"kuangliu/pytorch-cifar": _kuangliu_resnet}
    if network.variant == "efficientnet_lite0":
        return {}
    return {
        "tonylins/pytorch-mobilenet-v2, first version": _flat_mobilenet,
        "tonylins/pytorch-mobilenet-v2": _tonylins_mobilenet,
    }


def _torchvision_mobilenet(network: MobileNet) -> Iterator[Layer]:
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


def _flat_mobilenet(network: MobileNet) -> Iterator[Layer]:
    """Names layers as torchvision and tonylins first did: convolution, norm and activation in one row per unit."""
    for layer in _torchvision_mobilenet(network):
        unit, _, rest = layer.theirs.partition(".conv.")
        if not rest:
            yield layer._replace(alias="classifier") if layer.ours == "classifier" else layer
            continue
        at = 3 * int(rest.partition(".")[0])
        yield layer._replace(theirs=f"{unit}.conv.{at}", norm=f"{unit}.conv.{at + 1}")


def _tonylins_mobilenet(network: MobileNet) -> Iterator[Layer]:
    for layer in _flat_mobilenet(network):
        if layer.ours == "head":
            yield layer._replace(theirs="conv.0", norm="conv.1")
        elif layer.ours == "classifier":
            yield layer._replace(theirs="classifier", alias="classifier.1")
        else:
            yield layer


def _timm_mobilenet(network: MobileNet) -> Iterator[Layer]:
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


def _efficientnet_lite(network: MobileNet) -> Iterator[Layer]:
    yield Layer("stem", "_conv_stem", "_bn0")
    for number, plan in enumerate(network.blocks((1, 1))):
        block = f"_blocks.{number}"
        for at, role in enumerate(("expand", "depthwise", "project")):
            if role != "expand" or plan.has_expand:
                yield Layer(f"{plan.name}/{role}", f"{block}._{role}_conv", f"{block}._bn{at}")
    yield Layer("head", "_conv_head", "_bn1")
    yield Layer("classifier", "_fc")


def _keras_mobilenetv2(network: MobileNet) -> Iterator[Layer]:
    yield Layer("stem", "Conv1", "bn_Conv1")
    for number, plan in enumerate(network.blocks((1, 1))):
        block = f"block_{number}" if number else "expanded_conv"
        for role in ("expand", "depthwise", "project"):
            if role != "expand" or plan.has_expand:
                yield Layer(f"{plan.name}/{role}", f"{block}_{role}", f"{block}_{role}_BN")
    yield Layer("head", "Conv_1", "Conv_1_bn")
    yield Layer("classifier", "predictions", alias="Logits")


def _keras_mobilenetv1(network: MobileNet) -> Iterator[Layer]:
    yield Layer("stem", "conv1", "conv1_bn")
    for number, plan in enumerate(network.blocks((1, 1)), start=1):
        for role, conv in (("depthwise", "dw"), ("project", "pw")):
            yield Layer(f"{plan.name}/{role}", f"conv_{conv}_{number}", f"conv_{conv}_{number}_bn")
    yield Layer("classifier", "conv_preds")


def _torchvision_resnet(network: ResNet) -> Iterator[Layer]:
    yield Layer("stem", "conv1", "bn1")
    plans = network.blocks((1, 1))
    for stage, repeats in enumerate(RESNETS[network.variant].repeats, start=1):
        for repeat, plan in zip(range(repeats), plans, strict=False):
            block = f"layer{stage}.{repeat}"
            for number in (1, 2, 3) if plan.bottleneck else (1, 2):
                yield Layer(f"{plan.name}/conv{number}", f"{block}.conv{number}", f"{block}.bn{number}")
            if plan.has_projection:
                yield Layer(f"{plan.name}/shortcut", f"{block}.downsample.0", f"{block}.downsample.1")
    # Common CIFAR ResNets with shortcuts without parameters call it "linear".
    yield Layer("classifier", "fc", alias="linear")


def _kuangliu_resnet(network: ResNet) -> Iterator[Layer]:
    for layer in _torchvision_resnet(network):
        if layer.norm is not None:
            theirs, norm = (name.replace(".downsample.", ".shortcut.") for name in (layer.theirs, layer.norm))
            yield layer._replace(theirs=theirs, norm=norm)
        else:
            yield layer
