"""Injects faults on purpose: `python -m tools.faults`; docs/reliability.md has the results."""
