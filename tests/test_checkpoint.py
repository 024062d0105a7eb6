"""Checkpoints: damage is noticed, and passed over."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from fdjax import checkpoint
from fdjax.checkpoint import MANIFEST, Checkpoints, DamagedCheckpoint, find_checkpoint
from fdjax.errors import UserError

STATE = {"params": {"a": jnp.arange(3.0), "b/c": jnp.ones((2, 2))}, "step": jnp.zeros((), jnp.int32)}


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, keep_best=True)
    for step, score in ((1, 0.9), (2, 0.1), (3, 0.2), (4, 0.3)):
        state = {**STATE, "step": jnp.asarray(step, jnp.int32)}
        checkpoints.save(step, state, {"name": f"step {step}"}, score)
    return checkpoints


def largest_file(checkpoints, step):
    files = [p for p in (checkpoints.folder / str(step) / "state").rglob("*") if p.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def test_a_file_that_cannot_be_read_is_damage(saved, monkeypatch, capsys):
    def unreadable(path):
        if path.is_relative_to(saved.folder / "4"):
            raise OSError(5, "Input/output error")
        return sha256(path)

    sha256 = checkpoint.file_sha256
    monkeypatch.setattr(checkpoint, "file_sha256", unreadable)
    with pytest.raises(DamagedCheckpoint, match=r"4: its file .* cannot be read: .*Input/output error"):
        saved.verify(4)
    assert next(saved.sound_steps()) == 3 and "trying the one before it" in capsys.readouterr().err


def test_the_latest_and_the_best_are_kept(saved):
    assert saved.steps() == [1, 3, 4]
    assert saved.best() == 1
    assert find_checkpoint(str(saved.folder.parent), "best")[1] == 1


def test_the_best_is_kept_after_a_restart(saved):
    again = Checkpoints(saved.folder, keep=2, keep_best=True)
    for step, score in ((5, 0.4), (6, 0.5), (7, 0.3)):
        again.save(step, STATE, {}, score)
    assert again.steps() == [1, 6, 7]
    assert again.best() == 1


def test_what_lies_beyond_a_step_can_be_discarded(saved):
    saved.discard_after(3)
    assert saved.steps() == [1, 3]


def test_state_and_meta_come_back(saved):
    restored = saved.restore(4, STATE)
    np.testing.assert_array_equal(restored["params"]["b/c"], np.ones((2, 2)))
    assert int(restored["step"]) == 4
    assert saved.meta(4)["name"] == "step 4"


@pytest.mark.parametrize("place", ["workdir", "folder", "step"])
def test_a_workdir_its_folder_and_a_step_are_found(saved, place):
    path = {"workdir": saved.folder.parent, "folder": saved.folder, "step": saved.folder / "3"}[place]
    assert find_checkpoint(str(path))[1] == (3 if place == "step" else 4)


def test_a_flipped_bit_is_noticed_and_the_newest_sound_step_is_taken(saved, capsys):
    file = largest_file(saved, 4)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(DamagedCheckpoint, match="is not what was written"):
        find_checkpoint(str(saved.folder), "4")
    assert find_checkpoint(str(saved.folder))[1] == 3
    assert file.name in capsys.readouterr().err


def test_a_truncated_and_a_missing_file_are_named(saved):
    file = largest_file(saved, 4)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpoint, match=file.name):
        saved.verify(4)
    file.unlink()
    with pytest.raises(DamagedCheckpoint, match="is missing"):
        saved.verify(4)


def test_a_half_written_step_does_not_count_and_can_be_written_again(saved):
    (saved.folder / "4" / MANIFEST).unlink()
    fresh = Checkpoints(saved.folder)
    assert fresh.steps() == [1, 3]
    fresh.save(4, STATE, {"name": "again"})
    assert fresh.meta(4)["name"] == "again"


def test_other_shapes_and_types_are_refused(saved):
    with pytest.raises(DamagedCheckpoint):
        saved.restore(4, {**STATE, "params": {"a": jnp.arange(4.0), "b/c": jnp.ones((2, 2))}})
    with pytest.raises(DamagedCheckpoint):
        saved.restore(4, {**STATE, "step": jnp.zeros((), jnp.float32)})


@pytest.mark.parametrize("content", [None, "empty"])
def test_what_is_no_checkpoint_directory_is_said(tmp_path, content):
    path = tmp_path / "nothing"
    if content:
        path.mkdir()
    with pytest.raises(UserError, match="checkpoint"):
        find_checkpoint(str(path))
    with pytest.raises(UserError):
        find_checkpoint(__file__)
