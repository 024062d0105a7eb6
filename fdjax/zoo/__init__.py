"""The networks: Flax Linen modules on top of `fdjax.ops`."""

from fdjax.zoo.frequency import FCMASK, FrequencyPointwise
from fdjax.zoo.mobilenet import VARIANTS as MOBILENETS
from fdjax.zoo.mobilenet import MobileNet, WideGroups
from fdjax.zoo.network import FrequencyNetwork
from fdjax.zoo.octave import OctaveMobileNet
from fdjax.zoo.registry import check_tying, make_network
from fdjax.zoo.resnet import VARIANTS as RESNETS
from fdjax.zoo.resnet import ResNet

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
    "check_tying",
    "make_network",
]
