"""What starts from a checkpoint: freeze, prune, calibrate, profile, import."""
