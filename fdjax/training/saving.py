"""Checkpoints that are written while the run goes on."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fdjax.checkpoint import Checkpoints
from fdjax.training.stopping import Stopping
from fdjax.training.workdir import SAVED_FILE, write_json


class BackgroundSaves:
    """Writes one checkpoint at a time in a thread of its own.

    Args:
      checkpoints: of the run.
      workdir: of the run.
      stopping: does not cut a save short.
    """

    def __init__(self, checkpoints: Checkpoints, workdir: Path, stopping: Stopping):
        self._checkpoints, self._workdir, self._stopping = checkpoints, workdir, stopping
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, step: int, state: Any, meta: dict[str, Any], score: float | None) -> None:
        """Copies a state to the host and begins to write it, once the save before is on disk.

        Args:
          step: of the run.
          state: a pytree of arrays, all of them whole in this process; its buffers may be donated afterwards.
          meta: JSON types that nobody changes afterwards.
          score: as in `Checkpoints.save`.

        Raises:
          RunStopped: the save before failed.
        """
        self.wait()
        # A copy even where the host could look at the device's own memory, which the next step overwrites.
        copied = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
        self._thread = threading.Thread(target=self._write, args=(step, copied, meta, score), name="saving")
        self._thread.start()

    def _write(self, step: int, state: Any, meta: dict[str, Any], score: float | None) -> None:
        try:
            with self._stopping.saving():
                self._checkpoints.save(step, state, meta, score)
                write_json(self._workdir / SAVED_FILE, {"step": step})
        except BaseException as error:  # It is raised again where the run can end by it.
            self._error = error

    def check(self) -> None:
        """Raises what the save before failed with, `RunStopped` as a rule; a save that is under way goes on."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def join(self) -> None:
        """Returns once nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Returns once the checkpoint is on disk; raises as `check` does."""
        self.join()
        self.check()
