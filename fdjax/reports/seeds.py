"""Groups runs that differ only by their seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import mean
from typing import Any

from fdjax.config import Config
from fdjax.reports.results import Result


def flat_settings(config: Config) -> dict[str, Any]:
    """Returns every setting of a config by the name of its flag, such as "learn.block"."""
    flat = {}
    for field, value in config.to_dict().items():
        flat |= {f"{field}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {field: value}
    return flat


def run_settings(result: Result) -> dict[str, Any]:
    """Returns the settings that can change the figures of a run, without its seed."""
    config, masked = result.config, result.has_masks
    fields = {"data", "model", *result.own_phases} | ({"learn", "distill"} if masked else set())
    unused = {"data.path"}
    if "learn" not in result.own_phases:
        unused |= {"learn.epochs", "learn.steps"}
    if not config.distill.weight:
        unused.add("distill.temperature")
    settings = {name: value for name, value in flat_settings(config).items() if name.partition(".")[0] in fields}
    origin = {"phases": result.phases, "data": result.data, "imported": result.imported}
    return origin | {k: v for k, v in settings.items() if k not in unused}


def settings_key(result: Result, *left_out: str) -> str:
    """Returns a key that is equal for two runs if `run_settings` are equal except for `left_out`."""
    return json.dumps({name: value for name, value in run_settings(result).items() if name not in left_out})


def seed_groups(results: Sequence[Result]) -> list[list[Result]]:
    """Returns the runs in the order of the table, in groups that differ only by their seed."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(settings_key(result), []).append(result)
    ordered = [sorted(group, key=lambda result: (result.seed, result.name)) for group in groups.values()]

    def place(group: list[Result]) -> tuple:
        first = group[0]
        share = mean(result.macs_ratio for result in group)
        return first.task, first.is_pruned, first.masks or first.filters or "", -round(share, 3), first.name

    return sorted(ordered, key=place)
