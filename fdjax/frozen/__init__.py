"""The frozen network: hard masks compiled into a dense network that needs neither Flax nor training code."""

from fdjax.frozen.fold import Frozen, fewest_macs, freeze
from fdjax.frozen.network import apply
from fdjax.frozen.plan import NetworkPlan

__all__ = ["Frozen", "NetworkPlan", "apply", "fewest_macs", "freeze"]
