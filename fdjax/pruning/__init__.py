"""Pruning: learned or profiled masks become hard masks, blocks are chosen, and filters are removed."""

from fdjax.pruning.expected import expected_macs
from fdjax.pruning.harden import HardMasks, even_groups, gate_counts, harden, harden_to_target, mac_ratio, round_masks

__all__ = [
    "HardMasks",
    "even_groups",
    "expected_macs",
    "gate_counts",
    "harden",
    "harden_to_target",
    "mac_ratio",
    "round_masks",
]
