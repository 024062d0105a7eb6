"""Pytrees in, masks out."""

from fdjax.pruning.expected import expected_macs
from fdjax.pruning.harden import HardMasks, gate_counts, harden, harden_to_target, mac_ratio, round_masks

__all__ = ["HardMasks", "expected_macs", "gate_counts", "harden", "harden_to_target", "mac_ratio", "round_masks"]
