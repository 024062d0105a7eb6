"""Faults of every kind in a run's workdir and around its process: it resumes rightly, or says why it does not."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fdjax.checkpoint import CHECKPOINT_FOLDER, MANIFEST, Checkpoints
from fdjax.errors import RunInterrupted, RunStopped, UserError
from fdjax.training import loop
from fdjax.training.announce import changes
from fdjax.training.lock import LOCK_FILE, locked
from fdjax.training.restore import open_checkpoint
from fdjax.training.run import train
from fdjax.training.stopping import Stopping
from fdjax.training.workdir import MetricsLog
from tests.tiny_run import STEPS, get_config

ROOT = Path(__file__).parents[1]
CONFIG = dataclasses.replace(get_config(), phases=("pretrain",))

pytestmark = pytest.mark.usefixtures("quick_runs")


def weights(workdir: Path) -> list[bytes]:
    import jax

    _, _, restored = open_checkpoint(str(workdir))
    return [leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(restored.state.params))]


class Interrupted(Stopping):
    """Asks the run to stop after so many steps."""

    def __init__(self, steps: int):
        super().__init__()
        self._left = steps

    @property
    def asked(self) -> bool:
        # The run looks after each step.
        self._left -= 1
        if self._left == 0:
            self._asked = ("asked", 143)
        return super().asked


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A finished run of six steps, and one that was stopped at the fifth, after two of its three saves."""
    import jax

    folder = tmp_path_factory.mktemp("runs")
    jax.config.update("jax_disable_most_optimizations", True)  # As `quick_runs` has it, so that the bits agree.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fdjax.training.measure.plot_run", lambda *arguments, **options: [])
        train(CONFIG, str(folder / "finished"))
        with pytest.raises(RunInterrupted):
            train(CONFIG, str(folder / "stopped"), stopping=Interrupted(5))
    jax.config.update("jax_disable_most_optimizations", False)
    return {"finished": folder / "finished", "stopped": folder / "stopped"}


@pytest.fixture
def stopped(runs, tmp_path) -> Path:
    return shutil.copytree(runs["stopped"], tmp_path / "run")


def test_a_run_that_is_asked_to_stop_saves_the_step_it_is_at_and_ends_bit_for_bit_the_same(runs, stopped) -> None:
    steps = Checkpoints(stopped / CHECKPOINT_FOLDER)
    assert steps.steps()[-1] == 5
    train(CONFIG, str(stopped))
    assert weights(stopped) == weights(runs["finished"])


def test_stopped_while_it_is_measured_at_the_end_of_a_phase_it_is_measured_later(runs, tmp_path, monkeypatch) -> None:
    def stop(*arguments):
        raise RunInterrupted("asked", 143)

    with monkeypatch.context() as patch, pytest.raises(RunInterrupted):
        patch.setattr(loop.Run, "_finish_phase", stop)
        train(CONFIG, str(tmp_path / "run"))
    assert Checkpoints(tmp_path / "run" / CHECKPOINT_FOLDER).steps()[-1] == STEPS
    summary = train(CONFIG, str(tmp_path / "run"))
    assert [phase["name"] for phase in summary["phases"]] == ["pretrain"]
    assert weights(tmp_path / "run") == weights(runs["finished"])


# -- two processes


def test_a_second_process_is_told_who_works_in_the_workdir(stopped) -> None:
    before = sorted(path.name for path in (stopped / CHECKPOINT_FOLDER).iterdir())
    with locked(stopped):
        with pytest.raises(UserError, match=rf"process {os.getpid()} on .* is at work there"):
            train(CONFIG, str(stopped))
        assert sorted(path.name for path in (stopped / CHECKPOINT_FOLDER).iterdir()) == before
    assert not (stopped / LOCK_FILE).exists()


def test_the_lock_of_a_killed_process_is_taken_over(stopped) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import os, signal
from pathlib import Path
from fdjax.training.announce import changes
from fdjax.training.lock import locked
with locked(Path({str(stopped)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == -signal.SIGKILL
    assert (stopped / LOCK_FILE).exists()
    with locked(stopped):
        assert json.loads((stopped / LOCK_FILE).read_text())["process"] == os.getpid()


# -- what is deleted or damaged


def test_folders_that_are_not_the_runs_own_are_left_alone(stopped) -> None:
    mine = stopped / CHECKPOINT_FOLDER / "notes"
    mine.mkdir()
    (mine / "read me").write_text("mine")
    train(CONFIG, str(stopped))
    assert (mine / "read me").read_text() == "mine"


@pytest.mark.parametrize("loss", ["manifests", "folder"])
def test_a_run_that_has_lost_all_its_checkpoints_is_not_begun_anew(stopped, loss) -> None:
    if loss == "folder":
        shutil.rmtree(stopped / CHECKPOINT_FOLDER)
    else:
        for manifest in (stopped / CHECKPOINT_FOLDER).glob(f"*/{MANIFEST}"):
            manifest.unlink()
    with pytest.raises(UserError, match=r"had saved step 5.* bring back a copy"):
        train(CONFIG, str(stopped))


SIDE_FILES = ("config.json", "metrics.jsonl", "saved.json", "older metadata", "soft_masks.npz")


@pytest.mark.parametrize("name", SIDE_FILES)
@pytest.mark.parametrize("damage", [b"\xff\xfe{", b"[1, 2]"])
def test_a_damaged_side_file_does_not_stop_a_run_whose_checkpoint_is_sound(runs, stopped, name, damage) -> None:
    file = stopped / name
    if name == "older metadata":
        file = stopped / CHECKPOINT_FOLDER / "2" / "meta" / "metadata"
    file.write_bytes(damage)
    train(CONFIG, str(stopped))
    assert weights(stopped) == weights(runs["finished"])
    assert json.loads((stopped / "config.json").read_text())["phases"] == ["pretrain"]


def test_a_damaged_record_of_the_run_that_it_started_from_is_passed_over(runs, tmp_path, capsys) -> None:
    config = dataclasses.replace(get_config(), phases=("pretrain", "learn"))
    workdir, source = tmp_path / "run", str(runs["finished"])
    with pytest.raises(RunInterrupted):
        train(config, str(workdir), init=source, stopping=Interrupted(1))
    (workdir / "init.json").write_bytes(b"\xff{")
    summary = train(config, str(workdir), init=source)
    assert [phase["name"] for phase in summary["phases"]] == ["learn"]
    assert "init.json is damaged" in capsys.readouterr().err
    assert json.loads((workdir / "init.json").read_text()) == {"checkpoint": source}


def test_a_damaged_record_that_nothing_can_stand_in_for_is_named(runs, tmp_path, monkeypatch) -> None:
    config = dataclasses.replace(get_config(), phases=("pretrain", "learn"))

    def stop(*arguments):
        raise RunInterrupted("asked", 143)

    with monkeypatch.context() as patch, pytest.raises(RunInterrupted):
        patch.setattr(loop.Run, "begin_phase", stop)
        train(config, str(tmp_path / "run"), init=str(runs["finished"]))
    for name in ("init.json", "config.json"):
        (tmp_path / "run" / name).write_bytes(b"{")
        with pytest.raises(UserError, match=name):
            train(config, str(tmp_path / "run"))


@pytest.mark.parametrize("damage", [b"", b'{"phases": 3}'])
def test_a_damaged_summary_is_written_anew(runs, tmp_path, damage) -> None:
    workdir = shutil.copytree(runs["finished"], tmp_path / "run")
    (workdir / "summary.json").write_bytes(damage)
    train(CONFIG, str(workdir))
    whole, again = (json.loads((folder / "summary.json").read_text()) for folder in (runs["finished"], workdir))
    assert again["phases"] == whole["phases"] and again["macs"] == whole["macs"] and 0 < again["top1"] < 1


def test_records_that_are_none_are_passed_over(tmp_path) -> None:
    lines = [b'{"step": 1, "phase": "learn"}', b"[1]", b"3", b'{"step": "x", "phase": "learn"}', b"\xff", b'{"step": 2']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.read() == [{"step": 1, "phase": "learn"}]
    log.cut_back(1)
    assert log.read() == [{"step": 1, "phase": "learn"}]


def test_a_step_that_verifies_but_does_not_restore_is_passed_over(runs, stopped, capsys) -> None:
    newest = stopped / CHECKPOINT_FOLDER / "5"
    manifest = json.loads((newest / MANIFEST).read_text())
    name = next(iter(manifest["arrays"]))
    manifest["arrays"][name] = "float16[3]"
    (newest / MANIFEST).write_text(json.dumps(manifest))
    assert open_checkpoint(str(stopped))[1] == 4
    assert "trying the one before it" in capsys.readouterr().err
    with pytest.raises(UserError):
        open_checkpoint(str(newest))
    train(CONFIG, str(stopped))
    assert weights(stopped) == weights(runs["finished"])


@pytest.mark.parametrize("manifest", ["[]", '{"files": 3, "arrays": {}}', '{"files": {"a": 1}, "arrays": {}}', "{"])
def test_a_manifest_of_other_types_is_a_damaged_one(stopped, manifest) -> None:
    (stopped / CHECKPOINT_FOLDER / "5" / MANIFEST).write_text(manifest)
    assert open_checkpoint(str(stopped))[1] == 4


def test_the_best_is_found_although_another_step_is_damaged(tmp_path) -> None:
    import numpy as np

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3, keep_best=True)
    for step, score in ((1, 0.2), (2, 0.9), (3, 0.1), (4, 0.5)):
        checkpoints.save(step, {"a": np.zeros(2)}, {}, score)
    (checkpoints.folder / "4" / "meta" / "metadata").write_text("{")
    assert checkpoints.best() == 2
    (checkpoints.folder / "2" / "meta" / "metadata").write_text('{"score": 0.95}')
    assert checkpoints.best() == 3


# -- saving


def test_nothing_old_goes_before_the_new_step_is_whole(tmp_path, monkeypatch) -> None:
    """Killed anywhere while a step is written, the best and the latest are there."""
    import numpy as np

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, keep_best=True)
    for step, score in ((1, 0.9), (2, 0.1), (3, 0.2)):
        checkpoints.save(step, {"a": np.zeros(2)}, {}, score)
    before, seen = checkpoints.steps(), []
    rename = Path.rename

    def watch(self, target):
        if Path(target).name == "4":
            seen.append(checkpoints.steps())
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watch)
    checkpoints.save(4, {"a": np.zeros(2)}, {}, 0.95)
    assert before == [1, 2, 3] and seen == [before]
    assert checkpoints.steps() == [3, 4] and checkpoints.best() == 4


@pytest.mark.parametrize("fault", ["full", "read-only", "gone"])
def test_a_disk_that_fails_stops_the_run_in_one_line(stopped, monkeypatch, fault) -> None:
    if fault == "full":

        def full(*arguments):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
        expected = r"step 6 cannot be saved .*No space left on device; the last good checkpoint is step 5"
    elif fault == "read-only":

        def read_only(*arguments):
            raise OSError(errno.EROFS, "Read-only file system", "metrics.jsonl")

        monkeypatch.setattr(MetricsLog, "write", read_only)
        expected = r"Read-only file system: metrics.jsonl; the last good checkpoint is step 5"
    else:
        record = loop.Measurements.record

        def remove(self, *arguments):
            shutil.rmtree(stopped)
            return record(self, *arguments)

        monkeypatch.setattr(loop.Measurements, "record", remove)
        expected = r"No such file or directory.*no checkpoint was saved"
    with pytest.raises(RunStopped, match=expected) as raised:
        train(CONFIG, str(stopped))
    assert "\n" not in str(raised.value)


# -- signals


def start(workdir: Path, *more: str) -> subprocess.Popen[str]:
    config = str(ROOT / "tests" / "tiny_run.py")
    flags = ["--phases", "pretrain", "--pretrain.steps", "100000", "--checkpoint.every-epochs", "1000"]
    command = [sys.executable, str(ROOT / "train.py"), "--config", config, "--workdir", str(workdir), *flags, *more]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait_for_records(workdir: Path, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not MetricsLog(workdir / "metrics.jsonl").read():
        time.sleep(0.2)
    assert process.poll() is None, process.communicate()[1]


@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGTERM, 143, id="term"),
        pytest.param(signal.SIGINT, 130, id="int"),
        pytest.param(None, 124, id="limit", marks=pytest.mark.slow),  # It waits for half a minute.
    ],
)
def test_a_signal_or_the_time_limit_saves_and_stops(tmp_path, number, status) -> None:
    process = start(tmp_path / "run", *(() if number else ("--time-limit", "30")))
    try:
        wait_for_records(tmp_path / "run", process)
        if number:
            process.send_signal(number)
        errors = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == status, errors
    assert "the same command goes on" in errors and "Traceback" not in errors
    (step,) = Checkpoints(tmp_path / "run" / CHECKPOINT_FOLDER).steps()
    assert step > 0 and open_checkpoint(str(tmp_path / "run"))[1] == step


def test_a_second_signal_stops_at_once() -> None:
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import os, signal, time
from fdjax.training.stopping import Stopping
with Stopping() as stopping, stopping.saving():
    os.kill(os.getpid(), signal.SIGTERM)
    while not stopping.asked:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=50, check=False, capture_output=True, text=True)
    assert done.returncode == 143 and "stopped at once" in done.stderr


def test_a_run_that_goes_on_elsewhere_is_told_that_its_last_bits_may_differ(stopped, capsys) -> None:
    train(CONFIG, str(stopped))
    assert "note: " not in capsys.readouterr().out
    now = {"jax": "2", "devices": "2 x cpu", "processor": "a"}
    said = changes({"jax": "1", "devices": "2 x cpu"}, now)
    assert said.startswith("note: jax: 1 then, 2 now. Results may differ") and "devices" not in said
    assert changes({}, now) == ""


def test_a_checkpoint_says_what_its_bits_depend_on(stopped) -> None:
    _, _, restored = open_checkpoint(str(stopped))
    assert set(restored.made_on) == {"jax", "devices", "processor"}
