"""The frozen network: a channel graph and hard masks become a program of dense operations, which emitters execute."""

from fdjax.frozen.artifact import FrozenNetwork, check_target, load, save
from fdjax.frozen.assemble import Frozen, fewest_macs, freeze
from fdjax.frozen.choice import Stopwatch, release_slower
from fdjax.frozen.program import Program

__all__ = [
    "Frozen",
    "FrozenNetwork",
    "Program",
    "Stopwatch",
    "check_target",
    "fewest_macs",
    "freeze",
    "load",
    "release_slower",
    "save",
]
