"""The clock of one core: programs timed in a process of their own, which has one thread whatever this one has."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fdjax.errors import UserError, first_line
from fdjax.frozen.layers import HostArrays
from fdjax.frozen.program import Program

Programs = Mapping[str, tuple[Program, HostArrays]]
# The number of threads is settled before jax is imported.
_CHILD = (
    "from fdjax import runtime; runtime.limit_threads(1); runtime.setup(); "
    "from fdjax.frozen.choice import time_programs; from fdjax.frozen.one_core import serve; serve(time_programs)"
)


def times_on_one_core(programs: Programs, batch: int, engine: str, *, part: bool) -> dict[str, float]:
    """As `fdjax.frozen.choice.time_programs`, on one core of the processor.

    Args:
      programs: by name.
      batch: images at once.
      engine: one of `fdjax.frozen.engines.ENGINES`.
      part: they are parts of networks, and read maps.

    Raises:
      UserError: the engine is not there or refuses all of them, or the other process is gone.
    """
    child = _child()
    try:
        assert child.stdin is not None and child.stdout is not None
        pickle.dump((dict(programs), batch, engine, part), child.stdin)
        child.stdin.flush()
        found, problem = pickle.load(child.stdout)
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        _child.cache_clear()
        raise UserError(f"the process that measures times on {engine} has ended: {first_line(error)}") from error
    if problem is not None:
        raise UserError(problem)
    return found


@functools.cache
def _child() -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        # A Ctrl-C is for the run, which then ends this process.
        start_new_session=True,
    )
    atexit.register(_end, child)
    return child


def _end(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        if child.stdin is not None:
            child.stdin.close()
        child.kill()


def serve(measure: Callable[..., dict[str, float]]) -> None:
    """What the other process does: answers by `measure` (`time_programs`), until nobody asks any more."""
    # What libraries print is no answer.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            programs, batch, engine, part = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: tuple[dict[str, Any], str | None]
        try:
            answer = measure(programs, batch, engine, part=part), None
        except Exception as error:  # Whatever it is, who asked is to know.
            answer = {}, str(error) if isinstance(error, UserError) else f"{engine}: {first_line(error)}"
        pickle.dump(answer, answers)
        answers.flush()
