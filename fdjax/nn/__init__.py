"""Flax Linen modules on top of `fdjax.ops`."""

from fdjax.nn.frequency import FCMASK, FrequencyPointwise
from fdjax.nn.mobilenetv2 import VARIANTS, MobileNetV2, WideGroups

__all__ = ["FCMASK", "VARIANTS", "FrequencyPointwise", "MobileNetV2", "WideGroups"]
