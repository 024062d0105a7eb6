"""Traces a few steps with `jax.profiler`, for XProf (TensorBoard) or Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

# The first steps include the compilation, and are not traced.
_WARM_STEPS = 3


class Trace:
    """Traces some steps of a phase, soon after its beginning.

    Args:
      folder: directory for the trace.
      steps: the least number of steps to trace; 0: no trace.
    """

    def __init__(self, folder: Path, steps: int):
        self._folder, self._steps = folder, steps
        self._done, self._begun = 0, False

    def advance(self, steps: int, state: Any) -> str | None:
        """Counts `steps` more steps, which made `state`; returns a line to print once the trace is written."""
        if not self._steps:
            return None
        self._done += steps
        if not self._begun and self._done >= _WARM_STEPS:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._begun, self._done = True, 0
        elif self._begun and self._done >= self._steps:
            jax.block_until_ready(state)
            return self.close()
        return None

    def close(self) -> str | None:
        """Ends a trace that is in progress; returns a line to print, or None."""
        if not self._begun or not self._steps:
            return None
        jax.profiler.stop_trace()
        self._steps = 0
        return f"traced {self._done} steps into {self._folder}"
