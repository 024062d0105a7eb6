"""Flax Linen modules on top of `fdjax.ops`."""

from fdjax.nn.frequency import FCMASK, FrequencyPointwise
from fdjax.nn.mobilenet import VARIANTS as MOBILENETS
from fdjax.nn.mobilenet import MobileNet, WideGroups
from fdjax.nn.network import FrequencyNetwork
from fdjax.nn.octave import OctaveMobileNet
from fdjax.nn.resnet import VARIANTS as RESNETS
from fdjax.nn.resnet import ResNet

__all__ = [
    "FCMASK",
    "MOBILENETS",
    "RESNETS",
    "FrequencyNetwork",
    "FrequencyPointwise",
    "MobileNet",
    "OctaveMobileNet",
    "ResNet",
    "WideGroups",
]
