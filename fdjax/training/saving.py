"""Writes checkpoints in the background, while the run goes on."""

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
    """Writes checkpoints, one at a time, in another thread.

    Args:
      checkpoints: the run's checkpoints.
      workdir: the run's workdir.
      stopping: waits for a save before it ends the process.
    """

    def __init__(self, checkpoints: Checkpoints, workdir: Path, stopping: Stopping):
        self._checkpoints, self._workdir, self._stopping = checkpoints, workdir, stopping
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, step: int, state: Any, meta: dict[str, Any], score: float | None) -> None:
        """Waits for the previous save, copies a state to the host, and begins to write it.

        Args:
          step: the step of the run.
          state: a pytree of arrays, replicated in this process; it may be donated afterwards.
          meta: JSON types; nothing may change them afterwards.
          score: as in `Checkpoints.save`.

        Raises:
          RunStopped: if the previous save failed.
        """
        self.wait()
        # On the CPU, np.asarray would share the device's memory, which the next step overwrites.
        copied = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
        self._thread = threading.Thread(target=self._write, args=(step, copied, meta, score), name="saving")
        self._thread.start()

    def _write(self, step: int, state: Any, meta: dict[str, Any], score: float | None) -> None:
        try:
            with self._stopping.saving():
                self._checkpoints.save(step, state, meta, score)
                write_json(self._workdir / SAVED_FILE, {"step": step})
        except BaseException as error:  # The run's own thread raises it again.
            self._error = error

    def check(self) -> None:
        """Raises the error of a save that has failed, usually `RunStopped`; does not wait for a save in progress."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def join(self) -> None:
        """Waits until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Waits until the checkpoint is on disk; raises as `check` does."""
        self.join()
        self.check()
