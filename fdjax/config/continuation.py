"""Whether a run may go on with another config than the one that it has."""

from __future__ import annotations

from fdjax.config.phases import PHASES
from fdjax.config.run import Config

_FREE_TO_CHANGE = ("checkpoint", "compute")


def continuation_problem(saved: Config, asked: Config, current_phase: str | None) -> str | None:
    """Says why a run of `saved` cannot go on as `asked`, or returns None when it can.

    It can when `asked` differs only in more phases at the end, in settings of phases that have not begun, in a longer
    current phase (`current_phase`: the one the run is in or ended with), in where the data lie, in how steps are fed,
    or in how often it saves. A run without a checkpoint yet (`current_phase` None) is held to all its phases.
    """
    begun = len(saved.phases) if current_phase is None else saved.phases.index(current_phase) + 1
    done = saved.phases[:begun]
    if asked.phases[: len(done)] != done:
        return f"its phases so far are {', '.join(done)}, and those asked for are {', '.join(asked.phases)}"
    old, new = saved.to_dict(), asked.to_dict()
    differences = []
    for field, before in old.items():
        after = new[field]
        not_begun = field in PHASES and field not in done and not (field == "learn" and "alternate" in done)
        not_begun |= field == "distill" and done == ("pretrain",)  # it has no part in pretraining
        if field in ("phases", *_FREE_TO_CHANGE) or not_begun or before == after:
            continue
        if not isinstance(before, dict):
            differences.append(f"{field} is {before!r} there and {after!r} here")
            continue
        for name, value in before.items():
            longer = field == current_phase and name in ("epochs", "steps")
            if value == after[name] or longer or (field, name) in (("data", "path"), ("data", "workers")):
                continue
            differences.append(f"{field}.{name} is {value!r} there and {after[name]!r} here")
    return "; ".join(differences) or None
