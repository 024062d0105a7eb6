"""Reads every file of a run or of a frozen network and reports which are sound; changes nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fdjax.checkpoint import CHECKPOINT_FOLDER, Checkpoints
from fdjax.config import Config
from fdjax.errors import UserError
from fdjax.training.lock import holder
from fdjax.training.restore import restore
from fdjax.training.workdir import (
    CONFIG_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    MetricsLog,
    check_nothing_lost,
    read_json,
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result for one file or checkpoint step.

    Attributes:
      name: name of the file or the step.
      sound: whether it is undamaged.
      words: what it holds, or what is wrong with it.
    """

    name: str
    sound: bool
    words: str


@dataclasses.dataclass(frozen=True)
class Health:
    """The results for a folder, and what the next command would do."""

    findings: tuple[Finding, ...]
    next: str

    @property
    def sound(self) -> bool:
        """Whether all findings are sound."""
        return all(finding.sound for finding in self.findings)


def check_run(workdir: Path) -> Health:
    """Reads all checkpoints of a run, and its other files.

    Raises:
      UserError: if `workdir` holds no run.
    """
    if not workdir.is_dir() or not ((workdir / CONFIG_FILE).exists() or (workdir / CHECKPOINT_FOLDER).exists()):
        raise UserError(f"--workdir {workdir} holds no run (no {CONFIG_FILE}, no {CHECKPOINT_FOLDER}); give a workdir")
    checkpoints = Checkpoints(workdir / CHECKPOINT_FOLDER)
    steps = [_step(checkpoints, step) for step in checkpoints.steps()]
    sound = [int(finding.name.split()[1]) for finding in steps if finding.sound]
    files = [_config(workdir), _metrics(workdir), _summary(workdir)]
    return Health(tuple(steps + [finding for finding in files if finding]), _what_follows(workdir, checkpoints, sound))


def _step(checkpoints: Checkpoints, step: int) -> Finding:
    name = f"step {step}"
    try:
        checkpoints.verify(step)
        restored = restore(checkpoints, step)
    except UserError as error:
        return Finding(name, False, str(error))
    score = checkpoints.meta(step).get("score")
    # The score of a later phase is higher by the phase's number.
    words = f"{restored.phase.name}, step {restored.phase_step:,} of {restored.phase.steps:,}"
    return Finding(name, True, words if score is None else f"{words}, {score - restored.phase.index:.2%} on validation")


def _config(workdir: Path) -> Finding:
    found = read_json(workdir / CONFIG_FILE)
    try:
        if found is None:
            raise ValueError("it is missing, or is not a JSON object")
        Config.from_dict(found)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return Finding(CONFIG_FILE, False, f"{error}; the newest checkpoint has a copy, from which it is written again")
    return Finding(CONFIG_FILE, True, "the run's settings")


def _metrics(workdir: Path) -> Finding:
    file = workdir / METRICS_FILE
    if not file.is_file():
        return Finding(METRICS_FILE, False, "it is missing: curves will begin where the run resumes")
    lines, records = len(file.read_text(errors="replace").splitlines()), len(MetricsLog(file, writes=False).read())
    if records < lines:
        return Finding(METRICS_FILE, False, f"{lines - records:,} of {lines:,} lines cannot be read and are skipped")
    return Finding(METRICS_FILE, True, f"{records:,} records")


def _summary(workdir: Path) -> Finding | None:
    if not (workdir / SUMMARY_FILE).exists():
        return None
    found = read_json(workdir / SUMMARY_FILE)
    if found is None or not isinstance(found.get("top1"), int | float):
        return Finding(SUMMARY_FILE, False, "it is damaged; the same train.py command writes it again")
    return Finding(SUMMARY_FILE, True, f"{found['top1']:.2%} top-1")


def _what_follows(workdir: Path, checkpoints: Checkpoints, sound: list[int]) -> str:
    held = holder(workdir)
    if held:
        return f"{held} is at work there"
    if sound and max(sound) == _last_step_of_summary(workdir):
        return "the run is finished: the same train.py command does nothing"
    if sound:
        return f"the same train.py command goes on from step {max(sound):,}"
    if checkpoints.steps():
        return "no step can be restored: bring back a copy of the checkpoints, or give another --workdir"
    try:
        check_nothing_lost(workdir, checkpoints.folder)
    except UserError as error:
        return str(error)
    return "no step had been saved: the same train.py command begins anew"


def _last_step_of_summary(workdir: Path) -> int | None:
    """Returns the number of steps that the run in its summary did; None if the summary does not say."""
    try:
        return sum(phase["steps"] for phase in (read_json(workdir / SUMMARY_FILE) or {})["phases"])
    except (KeyError, TypeError):
        return None


def check_frozen(folder: Path) -> Health:
    """Reads a frozen network.

    Raises:
      UserError: if `folder` is empty or missing.
    """
    from fdjax.frozen.artifact import MANIFEST, load

    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(f"--frozen {folder} holds no frozen network; fdjax freeze writes one")
    try:
        network = load(folder)
    except UserError as error:
        return Health((Finding(folder.name, False, str(error)),), "freeze the checkpoint again (fdjax freeze)")
    size = sum(array.nbytes for array in network.frozen.arrays.values())
    words = f"{len(network.frozen.arrays)} arrays, {size / 1e6:.1f} MB, checked against {MANIFEST}"
    return Health((Finding(folder.name, True, words),), "fdjax predict, bench and export read it")
