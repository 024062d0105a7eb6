"""Faults, tried on purpose: `python -m tools.faults`; docs/reliability.md has what came of it."""
