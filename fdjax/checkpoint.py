"""Checkpoints: Orbax behind one module, with our own checksums, because Orbax restores flipped bits without a word.

A checkpoint is one step's folder: the arrays of a run's state, a JSON object beside them, and a manifest with the
sha256 of every file. The module knows nothing of training: state is any pytree, the JSON object anybody's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from fdjax.errors import UserError

CHECKPOINT_FOLDER = "checkpoints"
MANIFEST = "manifest.sha256.json"
_STATE, _META = "state", "meta"

logging.getLogger("absl").setLevel(logging.ERROR)


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are missing or not what was written."""


def _alone() -> ocp.options.MultiprocessingOptions:
    """This process reads or writes without the others: they may be elsewhere, and what they hold is the same."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    process = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process{process}"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    return {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def _describe(state: Any) -> dict[str, str]:
    """Path of every array -> its type and shape."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: where the steps lie; made on the first save.
      keep: how many of the latest are kept, 2 or more: one is always whole while another is written.
      keep_best: keep the one with the highest score too.
    """

    def __init__(self, folder: Path, *, keep: int = 2, keep_best: bool = False):
        self.folder = folder.resolve()
        self._keep = keep
        self._keep_best = keep_best
        self._writer: ocp.CheckpointManager | None = None

    def steps(self) -> list[int]:
        """The steps there are, ascending, sound or not; ones that were being written when a run was killed are not."""
        if not self.folder.is_dir():
            return []
        return sorted(
            int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and (path / MANIFEST).is_file()
        )

    def save(self, step: int, state: Any, meta: dict[str, Any], score: float | None = None) -> None:
        """Writes a checkpoint and waits until it is on disk.

        Args:
          step: its name.
          state: a pytree of arrays, all of them whole in this process.
          meta: JSON types.
          score: higher is better; compared if `keep_best`.
        """
        if self._writer is None:
            self._discard_unfinished()
            kept: list[policies.PreservationPolicy] = [policies.LatestN(self._keep)]
            if self._keep_best:
                kept.append(
                    policies.BestN(get_metric_fn=lambda m: m["score"], n=1, keep_checkpoints_without_metrics=False)
                )
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                # Without it the scores are not written, and a resumed run forgets its best.
                best_fn=(lambda m: m["score"]) if self._keep_best else None,
                best_mode="max",
                enable_async_checkpointing=False,
                create=False,
                multiprocessing_options=_alone(),
            )
            self.folder.mkdir(parents=True, exist_ok=True)
            self._writer = ocp.CheckpointManager(self.folder, options=options)
        items = ocp.args.Composite(
            **{_STATE: ocp.args.StandardSave(state), _META: ocp.args.JsonSave({**meta, "score": score})}
        )
        self._writer.save(step, args=items, metrics=None if score is None else {"score": score}, force=True)
        self._writer.wait_until_finished()
        folder = self.folder / str(step)
        files = {name: _sha256(path) for name, path in _files(folder).items()}
        manifest = {"files": files, "arrays": _describe(state)}
        # The manifest comes last and in one move: a step without it was never finished.
        draft = folder / (MANIFEST + ".draft")
        draft.write_text(json.dumps(manifest, indent=0))
        draft.rename(folder / MANIFEST)

    def _discard_unfinished(self) -> None:
        """Removes steps without a manifest: a killed run left them half written, and Orbax does not replace them."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if path.is_dir() and not (path / MANIFEST).is_file():
                shutil.rmtree(path)

    def discard_after(self, step: int) -> None:
        """Removes the checkpoints after `step`: a run that goes on from there will write them again."""
        for later in self.steps():
            if later > step:
                shutil.rmtree(self.folder / str(later))

    def verify(self, step: int) -> None:
        """Checks every file of a step against its manifest.

        Raises:
          DamagedCheckpoint: a file is missing, new or changed; the message names it.
        """
        folder = self.folder / str(step)
        files = _files(folder)
        for name, digest in self._manifest(step)["files"].items():
            if name not in files:
                raise DamagedCheckpoint(f"checkpoint {folder} is damaged: its file {name} is missing")
            if _sha256(files[name]) != digest:
                raise DamagedCheckpoint(f"checkpoint {folder} is damaged: its file {name} is not what was written")

    def _manifest(self, step: int) -> dict[str, Any]:
        file = self.folder / str(step) / MANIFEST
        try:
            manifest = json.loads(file.read_text())
            return {"files": manifest["files"], "arrays": manifest["arrays"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpoint(f"checkpoint {file.parent} has no readable {MANIFEST}: {error}") from error

    def newest_sound(self) -> int | None:
        """The newest undamaged step; says on stderr which damaged ones it passes over."""
        for candidate in reversed(self.steps()):
            try:
                self.verify(candidate)
                return candidate
            except DamagedCheckpoint as error:
                print(f"warning: {error}; trying the one before it", file=sys.stderr)
        return None

    def best(self) -> int | None:
        """The sound step with the highest score, or None if none has a score."""
        scores = {step: self.meta(step)["score"] for step in self.steps()}
        ranked = [(score, step) for step, score in scores.items() if score is not None]
        return max(ranked)[1] if ranked else None

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON object of a step."""
        try:
            return json.loads((self.folder / str(step) / _META / "metadata").read_text())
        except (OSError, ValueError) as error:
            raise DamagedCheckpoint(
                f"checkpoint {self.folder / str(step)} has no readable metadata: {error}"
            ) from error

    def restore(self, step: int, like: Any) -> Any:
        """The arrays of a step.

        Args:
          step: a sound one.
          like: a pytree of arrays or `jax.ShapeDtypeStruct`, whose structure and types they must have.

        Raises:
          DamagedCheckpoint: the files cannot be read, or hold something else.
        """
        folder = self.folder / str(step)
        held, asked = self._manifest(step)["arrays"], _describe(like)
        # Orbax would cast other types and cut or fill other shapes.
        for name in sorted(held.keys() | asked.keys()):
            if held.get(name) != asked.get(name):
                raise DamagedCheckpoint(
                    f"checkpoint {folder} holds {held.get(name, 'nothing')} at {name}, not {asked.get(name, 'nothing')}"
                )
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), like)
        try:
            with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as reader:
                return reader.restore(folder / _STATE, target)
        except Exception as error:  # Orbax raises anything from ValueError to a bare Exception.
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DamagedCheckpoint(f"checkpoint {folder} cannot be restored: {reason}") from error


def find_checkpoint(path: str, which: str = "latest") -> tuple[Checkpoints, int]:
    """Finds the checkpoint that `path` means.

    Args:
      path: a workdir, its checkpoint folder, or one step's folder.
      which: "latest", "best" (on the validation share) or a step number; not for a step's folder.

    Raises:
      UserError: there is no checkpoint, or not the one asked for.
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
        step = found.newest_sound()
        if step is None:
            raise UserError(f"every checkpoint in {found.folder} is damaged")
        return found, step
    if which == "best":
        step = found.best()
        if step is None:
            raise UserError(f"{path!r} has no best checkpoint: its run held out no validation share (data.validation)")
    elif which.isdecimal() and int(which) in found.steps():
        step = int(which)
    else:
        steps = ", ".join(map(str, found.steps()))
        raise UserError(f"no checkpoint {which!r} in {path!r}; accepted are latest, best, {steps}")
    found.verify(step)
    return found, step
