"""The networks by their `model.name`, made from a config."""

from __future__ import annotations

from typing import Any

from fdjax.config import LearnConfig, ModelConfig
from fdjax.errors import UserError
from fdjax.zoo.mobilenet import VARIANTS as MOBILENETS
from fdjax.zoo.mobilenet import MobileNet
from fdjax.zoo.network import FrequencyNetwork
from fdjax.zoo.octave import OctaveMobileNet
from fdjax.zoo.resnet import VARIANTS as RESNETS
from fdjax.zoo.resnet import ResNet


def make_network(model: ModelConfig, learn: LearnConfig, num_classes: int) -> FrequencyNetwork:
    """Makes the Flax module of a config.

    Args:
      model: the network and its width.
      learn: the layers, blocks, sides, tying and levels of its masks.
      num_classes: number of outputs.

    Returns:
      The unbound module.

    Raises:
      UserError: the network cannot have such masks.
    """
    common: dict[str, Any] = {
        "variant": model.name,
        "num_classes": num_classes,
        "width": model.width,
        "padding": model.padding,
        "batch_norm_epsilon": model.batch_norm_epsilon,
    }
    if model.octave:
        return OctaveMobileNet(**common, octave=model.octave, octave_maps=model.octave_maps)
    check_tying(model, learn)
    common |= {
        "levels": learn.counts_below_whole,
        "block": learn.block,
        "block_by_map": dict(learn.block_by_map),
        "block_by_layer": dict(learn.block_by_layer),
        "include": learn.include,
        "exclude": learn.exclude,
        "sides": learn.sides,
    }
    if model.name in MOBILENETS:
        return MobileNet(**common, tied=learn.tied)
    fields = ("cardinality", "group_width", "inner_channels")
    return ResNet(**common, **{field: getattr(model, field) for field in fields})


def check_tying(model: ModelConfig, learn: LearnConfig) -> None:
    """Raises `UserError` if masks are to be tied in a network without inverted residual blocks."""
    if learn.tied and (model.name in RESNETS or not MOBILENETS[model.name].linear):
        raise UserError(
            f"learn.tied is for networks of inverted residual blocks, which {model.name} is not; turn it off"
        )
