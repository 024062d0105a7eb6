"""Times programs on one core: in another process, which has one thread whatever this process has."""

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
# The number of threads has to be set before jax is imported.
_CHILD = (
    "from fdjax import runtime; runtime.limit_threads(1); runtime.setup(); "
    "from fdjax.frozen.choice import time_programs; from fdjax.frozen.one_core import serve; serve(time_programs)"
)


def times_on_one_core(programs: Programs, batch: int, engine: str, *, part: bool) -> dict[str, float]:
    """Does as `fdjax.frozen.choice.time_programs`, on one core of the processor.

    Args:
      programs: programs and their arrays, by name.
      batch: the batch size, in images.
      engine: one of `fdjax.frozen.engines.ENGINES`.
      part: whether the programs are parts of networks, which read maps.

    Returns:
      The median of each in milliseconds, by name; programs that the engine refuses are left out.

    Raises:
      UserError: if the engine is not installed or refuses all programs, or the other process has ended.
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
        # Ctrl-C goes to the run alone, which then ends this process.
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
    """Serves requests in the other process by `measure` (`time_programs`), until its input ends."""
    # Output of libraries goes to stderr, so that it does not mix with the answers.
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
        except Exception as error:  # Any exception is sent back as the answer.
            answer = {}, str(error) if isinstance(error, UserError) else f"{engine}: {first_line(error)}"
        pickle.dump(answer, answers)
        answers.flush()
