"""The frozen network: hard masks compiled into a dense network that needs neither Flax nor training code."""

from fdjax.frozen.artifact import FrozenNetwork, check_target, load, save
from fdjax.frozen.choice import Stopwatch, release_slower
from fdjax.frozen.fold import Frozen, fewest_macs, freeze
from fdjax.frozen.network import apply
from fdjax.frozen.plan import NetworkPlan

__all__ = [
    "Frozen",
    "FrozenNetwork",
    "NetworkPlan",
    "Stopwatch",
    "apply",
    "check_target",
    "fewest_macs",
    "freeze",
    "load",
    "release_slower",
    "save",
]
