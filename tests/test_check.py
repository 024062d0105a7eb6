"""`fdjax check`: what is sound, what is not, and what the next command will do; nothing is changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fdjax.checkpoint import CHECKPOINT_FOLDER, Checkpoints
from fdjax.commands.main import fdjax_command
from fdjax.training.lock import locked
from fdjax.training.restore import restore
from fdjax.training.workdir import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, MetricsLog
from tests.frozen_checkpoints import CONFIG, write_checkpoint


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """Two steps and the files beside them."""
    folder = write_checkpoint(write_checkpoint(tmp_path / "run", "pretrain"), "learn", 3)
    (folder / CONFIG_FILE).write_text(json.dumps(CONFIG.to_dict()))
    MetricsLog(folder / METRICS_FILE).write({"step": 1, "phase": "pretrain"})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check(folder: Path, tmp_path: Path) -> tuple[int, dict]:
    before = contents(folder)
    status = fdjax_command(["check", "--workdir", str(folder), "--json", str(tmp_path / "found.json")])
    assert contents(folder) == before
    return status, json.loads((tmp_path / "found.json").read_text())


def damaged(found: dict) -> list[str]:
    return [finding["name"] for finding in found["findings"] if not finding["sound"]]


def test_a_sound_run(workdir, tmp_path) -> None:
    status, found = check(workdir, tmp_path)
    last = Checkpoints(workdir / CHECKPOINT_FOLDER).steps()[-1]
    assert (status, damaged(found), found["sound"]) == (0, [], True)
    assert found["next"] == f"the same train.py command goes on from step {last:,}"


def test_the_validation_accuracy_is_that_of_the_step(workdir, tmp_path) -> None:
    checkpoints = Checkpoints(workdir / CHECKPOINT_FOLDER)
    restored = restore(checkpoints, checkpoints.steps()[-1])
    assert restored.phase.index > 0
    # As a run saves it: the checkpoints of a later phase go before those of an earlier one.
    meta = checkpoints.meta(checkpoints.steps()[-1])
    step = checkpoints.steps()[-1] + 1
    checkpoints.save(step, restored.state, meta, score=restored.phase.index + 0.25)
    (found,) = (of for of in check(workdir, tmp_path)[1]["findings"] if of["name"] == f"step {step}")
    assert found["words"].endswith(", 25.00% on validation")


def test_of_a_finished_run_it_says_so(workdir, tmp_path) -> None:
    last = Checkpoints(workdir / CHECKPOINT_FOLDER).steps()[-1]
    summary = {"top1": 0.5, "phases": [{"name": "pretrain", "steps": last - 1}, {"name": "learn", "steps": 1}]}
    (workdir / SUMMARY_FILE).write_text(json.dumps(summary))
    assert "is finished" in check(workdir, tmp_path)[1]["next"]
    summary["phases"].pop()  # A run that was prolonged after it had finished, and is not finished again.
    (workdir / SUMMARY_FILE).write_text(json.dumps(summary))
    assert f"goes on from step {last:,}" in check(workdir, tmp_path)[1]["next"]


def test_what_is_damaged_is_named_and_what_follows_is_said(workdir, tmp_path) -> None:
    first, last = Checkpoints(workdir / CHECKPOINT_FOLDER).steps()
    file = next(path for path in (workdir / CHECKPOINT_FOLDER / str(last) / "state").rglob("d/*") if path.is_file())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (workdir / METRICS_FILE).write_text('{"step": 1, "phase": "pretrain"}\n{"step')
    (workdir / CONFIG_FILE).write_text("[]")
    status, found = check(workdir, tmp_path)
    assert (status, damaged(found)) == (1, [f"step {last}", CONFIG_FILE, METRICS_FILE])
    assert f"from step {first:,}" in found["next"]


def test_a_run_at_work_and_one_whose_steps_are_all_gone(workdir, tmp_path) -> None:
    with locked(workdir):
        assert "is at work there" in check(workdir, tmp_path)[1]["next"]
    for step in Checkpoints(workdir / CHECKPOINT_FOLDER).steps():
        (workdir / CHECKPOINT_FOLDER / str(step) / "meta" / "metadata").write_text("{}")
    status, found = check(workdir, tmp_path)
    assert status == 1 and "no step can be restored" in found["next"]


def test_what_is_no_run_is_refused(tmp_path, capsys) -> None:
    for arguments in (["--workdir", str(tmp_path)], ["--frozen", str(tmp_path)], []):
        with pytest.raises(SystemExit) as ended:
            fdjax_command(["check", *arguments])
        assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: ")
