"""Whether a run may continue with a config other than its own."""

from __future__ import annotations

from pathlib import Path

from fdjax.config.model import ModelConfig
from fdjax.config.phases import PHASES
from fdjax.config.run import Config

_FREE_TO_CHANGE = ("checkpoint", "compute")


def continuation_problem(saved: Config, asked: Config, current_phase: str | None) -> str | None:
    """Explains why a run cannot continue with another config.

    The run can continue if the configs differ only in phases added at the end, in settings of phases that have not
    begun, in a longer current phase, in where the data or the network's ONNX file lie, in how steps are fed, or in how
    often the run saves. A run without a checkpoint has to keep all its phases.

    Args:
      saved: the config that the run was started with.
      asked: the config to continue with.
      current_phase: the phase that the run is in or ended with; None if it has no checkpoint yet.

    Returns:
      The differences that do not fit, or None if the run can continue.
    """
    begun = len(saved.phases) if current_phase is None else saved.phases.index(current_phase) + 1
    done = saved.phases[:begun]
    if asked.phases[: len(done)] != done:
        return f"its phases so far are {', '.join(done)}, and the config asks for {', '.join(asked.phases)}"
    old, new = saved.to_dict(), asked.to_dict()
    differences = []
    for field, before in old.items():
        after = new[field]
        not_begun = field in PHASES and field not in done and not (field == "learn" and "alternate" in done)
        not_begun |= field == "distill" and done == ("pretrain",)  # Pretraining does not distil.
        if field in ("phases", *_FREE_TO_CHANGE) or not_begun or before == after:
            continue
        if not isinstance(before, dict):
            differences.append(f"{field} is {before!r} there and {after!r} here")
            continue
        for name, value in before.items():
            longer = field == current_phase and name in ("epochs", "steps")
            if value == after[name] or longer or (field, name) in (("data", "path"), ("data", "workers")):
                continue
            if (field, name) == ("data", "unlabelled") and None not in (value, after[name]):
                continue  # As data.path, they may have been moved.
            if (field, name) == ("model", "arguments") and _but_for_onnx_file(saved) == _but_for_onnx_file(asked):
                continue  # The file may have been moved; whether it is the same one is not the config's.
            differences.append(f"{field}.{name} is {value!r} there and {after[name]!r} here")
    return "; ".join(differences) or None


def _but_for_onnx_file(config: Config) -> ModelConfig:
    return config.model if config.model.onnx_file is None else config.model.with_onnx_file(Path())
