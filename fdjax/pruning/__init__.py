"""Pytrees in, masks out."""

from fdjax.pruning.harden import HardMasks, gate_counts, harden, harden_to_target, mac_ratio, round_masks

__all__ = ["HardMasks", "gate_counts", "harden", "harden_to_target", "mac_ratio", "round_masks"]
