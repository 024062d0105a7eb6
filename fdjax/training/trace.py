"""Traces of a few steps by `jax.profiler`, to be read with XProf (TensorBoard) or Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

# The first steps hold the compilation.
_WARM_STEPS = 3


class Trace:
    """Traces some steps of a phase, soon after its beginning.

    Args:
      folder: where the trace goes.
      steps: how many at least; 0 for none.
    """

    def __init__(self, folder: Path, steps: int):
        self._folder, self._steps = folder, steps
        self._done, self._begun = 0, False

    def advance(self, steps: int, state: Any) -> str | None:
        """After `steps` more, which made `state`; returns a line to print when the trace is written."""
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
        """Ends a trace that is under way."""
        if not self._begun or not self._steps:
            return None
        jax.profiler.stop_trace()
        self._steps = 0
        return f"traced {self._done} steps into {self._folder}"
