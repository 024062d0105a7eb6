"""Checkpoints: the only module that uses Orbax, with checksums, because Orbax restores flipped bits silently.

The checkpoint of a step is a folder with the arrays of a run's state, a JSON object, and a manifest with the sha256 of
every file. The module knows nothing about training: the state is any pytree, and the JSON object is the caller's.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from fdjax.errors import RunStopped, UserError, first_line
from fdjax.provenance import file_sha256

CHECKPOINT_FOLDER = "checkpoints"
MANIFEST = "manifest.sha256.json"
_STATE, _META = "state", "meta"
# Suffixes of folders: a checkpoint step that is being written, and a folder that was in the place of a step.
_DRAFT, _FOREIGN = ".fdjax-draft", ".no-checkpoint"
_ORBAX_DRAFT = ".orbax-checkpoint-tmp"
# Approximate size in bytes of a checkpoint without its arrays.
_OVERHEAD = 100_000

logging.getLogger("absl").setLevel(logging.ERROR)


class DamagedCheckpoint(UserError):
    """A checkpoint with files that are missing or changed."""


def _alone() -> ocp.options.MultiprocessingOptions:
    """Returns options for this process to read or write alone: others may be elsewhere, and hold the same state."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    process = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process{process}"
    )


def _files(folder: Path) -> dict[str, Path]:
    return {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def _check_room(folder: Path, size: int) -> None:
    """Raises `OSError` if a folder has no room for `size` bytes, before each of Orbax's threads prints a traceback."""
    if not hasattr(os, "posix_fallocate"):
        return
    probe = folder / "probe"
    try:
        with probe.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size + size // 10 + _OVERHEAD)
    except OSError as error:
        # Other errors mean that the file system cannot reserve space, or limits the size of a file.
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            raise
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _describe(state: Any) -> dict[str, str]:
    """Returns path of every array -> its dtype and shape."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: the folder of the checkpoint steps; it is made on the first save.
      keep: how many of the latest steps to keep, 2 or more, so that one is whole while another is written.
      keep_best: whether to keep the step with the highest score as well.
    """

    def __init__(self, folder: Path, *, keep: int = 2, keep_best: bool = False):
        self.folder = folder.resolve()
        self._keep = keep
        self._keep_best = keep_best
        self._begun = False

    def steps(self) -> list[int]:
        """Lists the existing steps, ascending: damaged ones too, but none that a killed run left unfinished."""
        if not self.folder.is_dir():
            return []
        return sorted(
            int(path.name)
            for path in self.folder.iterdir()
            if path.name.isdecimal() and path.name == str(int(path.name)) and (path / MANIFEST).is_file()
        )

    def save(self, step: int, state: Any, meta: dict[str, Any], score: float | None = None) -> None:
        """Writes a checkpoint, waits until it is on disk, and then removes the steps that are not to be kept.

        Args:
          step: number of the step, which names the checkpoint.
          state: a pytree of arrays, each of which is whole in this process.
          meta: a JSON object.
          score: the score of the step, where higher is better; used if `keep_best`.

        Raises:
          RunStopped: the checkpoint cannot be written. Earlier checkpoints are unchanged.
        """
        try:
            if not self._begun:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._discard_unfinished()
                self._begun = True
            self._write(step, state, {**meta, "score": score})
        except Exception as error:  # Orbax raises many types, also a bare Exception.
            shutil.rmtree(self._draft(step), ignore_errors=True)
            raise RunStopped(f"step {step} cannot be saved in {self.folder}: {first_line(error)}") from error
        # Old steps are removed only after the new one is complete, because a run may be killed at any time.
        kept = set(self.steps()[-self._keep :]) | ({self._highest()} if self._keep_best else set())
        for other in self.steps():
            if other not in kept and other != step:
                shutil.rmtree(self.folder / str(other), ignore_errors=True)

    def _draft(self, step: int) -> Path:
        return self.folder / f"{step}{_DRAFT}"

    def _write(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        draft, final = self._draft(step), self.folder / str(step)
        draft.mkdir()
        _check_room(draft, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as writer:
            writer.save(draft / _STATE, state)
            writer.wait_until_finished()
        (draft / _META).mkdir()
        (draft / _META / "metadata").write_text(json.dumps(meta))
        files = {name: file_sha256(path) for name, path in _files(draft).items()}
        manifest = {"files": files, "arrays": _describe(state)}
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=0))
        if final.exists():
            # Either a damaged checkpoint that the run has skipped, or a foreign folder, which is moved, not removed.
            ours = (final / MANIFEST).is_file()
            aside = self._aside(final, _DRAFT if ours else _FOREIGN)
            final.rename(aside)
            draft.rename(final)
            if ours:
                shutil.rmtree(aside, ignore_errors=True)
        else:
            # The rename is atomic: a step exists whole or not at all.
            draft.rename(final)

    @staticmethod
    def _aside(folder: Path, ending: str) -> Path:
        names = (folder.with_name(f"{folder.name}.{number}{ending}") for number in itertools.count(1))
        return next(path for path in names if not path.exists())

    def _discard_unfinished(self) -> None:
        """Removes what a killed run left unfinished, here or inside Orbax, and nothing else."""
        for path in self.folder.iterdir():
            if path.is_dir() and (path.name.endswith(_DRAFT) or _ORBAX_DRAFT in path.name):
                shutil.rmtree(path)

    def discard_after(self, step: int) -> None:
        """Removes the checkpoints after `step`, which a run that resumes there will write again."""
        for later in self.steps():
            if later > step:
                shutil.rmtree(self.folder / str(later))

    def verify(self, step: int) -> None:
        """Checks every file of a step against its manifest.

        Raises:
          DamagedCheckpoint: a file is missing, changed or cannot be read; the message names it.
        """
        folder = self.folder / str(step)
        files = _files(folder)
        for name, digest in self._manifest(step)["files"].items():
            if name not in files:
                raise DamagedCheckpoint(f"checkpoint {folder} is damaged: its file {name} is missing")
            try:
                found = file_sha256(files[name])
            except OSError as error:
                raise DamagedCheckpoint(f"checkpoint {folder}: its file {name} cannot be read: {error}") from error
            if found != digest:
                raise DamagedCheckpoint(f"checkpoint {folder} is damaged: its file {name} is not what was written")

    def _manifest(self, step: int) -> dict[str, Any]:
        file = self.folder / str(step) / MANIFEST
        try:
            manifest = json.loads(file.read_text())
            found = {"files": dict(manifest["files"]), "arrays": dict(manifest["arrays"])}
            if not all(isinstance(text, str) for part in found.values() for pair in part.items() for text in pair):
                raise ValueError("its entries are not texts")
            return found
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedCheckpoint(f"checkpoint {file.parent} has no readable {MANIFEST}: {error}") from error

    def sound_steps(self, below: int | None = None) -> Iterator[int]:
        """Yields the undamaged steps, newest first, and reports on stderr which damaged steps it skips.

        `below` limits them to earlier steps.
        """
        for candidate in reversed(self.steps()):
            if below is not None and candidate >= below:
                continue
            try:
                self.verify(candidate)
            except DamagedCheckpoint as error:
                print(f"warning: {error}; trying the one before it", file=sys.stderr)
            else:
                yield candidate

    def _scores(self, *, warns: bool = False) -> list[tuple[float, int]]:
        """Returns (score, step) of every step with a score and readable metadata, highest score first."""
        found = []
        for step in self.steps():
            try:
                score = self.meta(step)["score"]
            except (DamagedCheckpoint, KeyError) as error:
                if warns:
                    print(f"warning: {error}; the best is chosen among the others", file=sys.stderr)
                continue
            if isinstance(score, int | float) and math.isfinite(score):
                found.append((float(score), step))
        return sorted(found, reverse=True)

    def _highest(self) -> int | None:
        scores = self._scores()
        return scores[0][1] if scores else None

    def best(self) -> int | None:
        """Returns the undamaged step with the highest score, or None; reports on stderr which steps it skips."""
        for _, step in self._scores(warns=True):
            try:
                self.verify(step)
                return step
            except DamagedCheckpoint as error:
                print(f"warning: {error}; trying the next best", file=sys.stderr)
        return None

    def meta(self, step: int) -> dict[str, Any]:
        """Returns the JSON object of a step.

        Raises:
          DamagedCheckpoint: the object cannot be read.
        """
        file = self.folder / str(step) / _META / "metadata"
        try:
            found = json.loads(file.read_text())
            if not isinstance(found, dict):
                raise ValueError("it is not a JSON object")
            return found
        except (OSError, ValueError, RecursionError) as error:
            raise DamagedCheckpoint(
                f"checkpoint {self.folder / str(step)} has no readable metadata: {error}"
            ) from error

    def mismatch(self, step: int, like: Any) -> str | None:
        """Compares a step with a pytree.

        Args:
          step: number of the step.
          like: a pytree of arrays or `jax.ShapeDtypeStruct`.

        Returns:
          The first difference in structure, shape or dtype, in words, or None.
        """
        held, asked = self._manifest(step)["arrays"], _describe(like)
        for name in sorted(held.keys() | asked.keys()):
            if held.get(name) != asked.get(name):
                return f"holds {held.get(name, 'nothing')} at {name}, not {asked.get(name, 'nothing')}"
        return None

    def restore(self, step: int, like: Any) -> Any:
        """Restores the arrays of a step.

        Args:
          step: number of an undamaged step.
          like: a pytree of arrays or `jax.ShapeDtypeStruct`, whose structure, shapes and dtypes the step must have.

        Returns:
          A pytree like `like`.

        Raises:
          DamagedCheckpoint: the files cannot be read, or hold something else.
        """
        folder = self.folder / str(step)
        # Orbax would cast other dtypes, and truncate or pad other shapes.
        problem = self.mismatch(step, like)
        if problem is not None:
            raise DamagedCheckpoint(f"checkpoint {folder} {problem}")
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), like)
        try:
            with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as reader:
                return reader.restore(folder / _STATE, target)
        except Exception as error:  # Orbax raises many types, also a bare Exception.
            raise DamagedCheckpoint(f"checkpoint {folder} cannot be restored: {first_line(error)}") from error


def find_checkpoint(path: str, which: str = "latest") -> tuple[Checkpoints, int]:
    """Finds the checkpoint that `path` refers to.

    Args:
      path: a workdir, its checkpoint folder, or the folder of one step.
      which: "latest", "best" (on the validation share) or a step number; not for the folder of one step.

    Returns:
      The checkpoints of the run, and the number of the step.

    Raises:
      UserError: there is no checkpoint, or not the requested one.
    """
    given = Path(path).expanduser().resolve()
    if not given.is_dir():
        raise UserError(f"no checkpoint directory {path!r}; give a workdir, its {CHECKPOINT_FOLDER} folder or one step")
    if given.name.isdecimal() and (given / MANIFEST).is_file():
        if which not in ("latest", given.name):
            raise UserError(f"{path!r} is the folder of one step; give its workdir to choose {which!r}")
        found = Checkpoints(given.parent)
        found.verify(int(given.name))
        return found, int(given.name)
    for folder in (given / CHECKPOINT_FOLDER, given):
        found = Checkpoints(folder)
        if found.steps():
            break
    else:
        raise UserError(
            f"{path!r} holds no checkpoint; give a workdir, its {CHECKPOINT_FOLDER} folder or one step of it"
        )
    if which == "latest":
        step = next(found.sound_steps(), None)
        if step is None:
            raise UserError(f"every checkpoint in {found.folder} is damaged")
        return found, step
    if which == "best":
        step = found.best()
        if step is None:
            raise UserError(
                f"{path!r} has no best checkpoint: its run held out no validation share (data.validation), or the "
                "checkpoints with its accuracy are damaged"
            )
    elif which.isdecimal() and int(which) in found.steps():
        step = int(which)
    else:
        steps = ", ".join(map(str, found.steps()))
        raise UserError(f"no checkpoint {which!r} in {path!r}; accepted are latest, best, {steps}")
    found.verify(step)
    return found, step
